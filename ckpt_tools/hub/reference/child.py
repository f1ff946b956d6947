"""Owns every use of transformers' modeling code: the child process that describes the model of a config.

The child runs apart because that code takes seconds and much memory to import, and because it imports
accelerate and peft where they are installed. The child hides these libraries. The model is built on the
meta device, so time and memory do not depend on its size. Code outside transformers runs only if the
question allows it.

The child reads one JSON object on standard input and prints one on standard output.
"""

from __future__ import annotations

import gc
import json
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ckpt_tools.hub.reference.process import imported_files, question_and_answers
from ckpt_tools.hub.reference.recipes import to_json

# Not needed to build a model, and slow or forbidden to import.
_ABSENT = ("accelerate", "peft", "deepspeed", "sklearn", "tensorflow", "flax")


def main() -> None:
    """Answer the question on standard input."""
    with question_and_answers() as (question, answers):
        # A tenth of the time went into collecting garbage of imports, of which there is none.
        gc.disable()
        for name in _ABSENT:
            sys.modules[name] = None  # type: ignore[assignment]
        json.dump(_answer(question), answers)


def _answer(question: Mapping[str, Any]) -> dict[str, Any]:
    from transformers.utils import logging

    log: Any = logging
    log.set_verbosity_error()
    log.disable_progress_bar()
    config = dict(question["config"])
    # Weights that training saved are not quantized, and placement needs no quantizer either.
    config.pop("quantization_config", None)
    try:
        found = find_classes(config, question)
    except Exception as error:
        return {"invalid": f"{type(error).__name__}: {error}"}
    if found is None:
        return {"unknown": True}
    model_class, parsed = found
    try:
        limit = None if question["trust_remote_code"] else question["modules"]
        model = build_on_meta(model_class, parsed, limit)
    except TooManyModules:
        return {"endless": question["modules"]}
    except Exception as error:
        return {"invalid": f"{type(error).__name__}: {error}"}
    answer = {"model": _describe(model, question["like_names"])}
    # What custom code makes of a config may depend on anything.
    return answer if question["trust_remote_code"] else answer | {"files": imported_files()}


def find_classes(config: dict[str, Any], question: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """The model class and the parsed config, or None if transformers has no such class."""
    import transformers

    architecture, model_type = question["architecture"], config["model_type"]
    # This imports torch only if the class exists.
    model_class = getattr(transformers, architecture, None)
    if model_class is None and not question["trust_remote_code"]:
        return None
    from transformers import PreTrainedModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
        config_class: Any = model_class.config_class
        if config_class.model_type != model_type:
            if model_type not in CONFIG_MAPPING:
                return None
            config_class = CONFIG_MAPPING[model_type]
        # Infinity and NaN are tagged objects in the file.
        return model_class, config_class.from_dict(config_class._decode_special_floats(config))
    if not question["trust_remote_code"]:
        return None
    return _custom_classes(architecture, config, question["code_dir"])


def _custom_classes(
    architecture: str, config: dict[str, Any], code_dir: str
) -> tuple[Any, Any] | None:
    """The classes that the files beside the config define; called only on explicit request."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    places = config.get("auto_map") or {}
    place = next((v for v in places.values() if str(v).endswith(f".{architecture}")), None)
    if place is None or "AutoConfig" not in places:
        return None
    config_class: Any = get_class_from_dynamic_module(places["AutoConfig"], code_dir)
    return get_class_from_dynamic_module(place, code_dir), config_class.from_dict(config)


class TooManyModules(Exception):
    """A config describes a model of more modules than are allowed."""


@contextmanager
def _at_most(modules: int | None) -> Iterator[None]:
    """Let at most so many modules be made: a number in a config can ask for any number of them."""
    from torch.nn import Module

    make, made = Module.__init__, 0

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal made
        made += 1
        if modules is not None and made > modules:
            raise TooManyModules
        make(self, *args, **kwargs)

    Module.__init__ = counted  # type: ignore[method-assign]
    try:
        yield
    finally:
        Module.__init__ = make  # type: ignore[method-assign]


def build_on_meta(model_class: Any, config: Any, modules: int | None = None) -> Any:
    """The model without weights; the default dtype is 16-bit, so fp32 tensors are fp32 by its own choice.

    Args:
        model_class: its class.
        config: its parsed config.
        modules: how many modules it may have; by default any number.

    Raises:
        TooManyModules: it has more.
    """
    import torch
    from transformers import initialization

    config._attn_implementation = "eager"
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with (
            _at_most(modules),
            torch.device("meta"),
            initialization.no_init_weights(),
            initialization.meta_device_safe_creation_ops(),
        ):
            model = model_class(config)
    finally:
        torch.set_default_dtype(default)
    model.tie_weights()
    return model


def _describe(model: Any, like_names: Collection[str] | None) -> dict[str, Any]:
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = model.state_dict()
    named = model.named_parameters(remove_duplicate=False)
    parameters = {name for name, parameter in named if parameter.is_floating_point()}
    ignored = [name for name in model._keys_to_ignore_on_save or () if name in state]
    written = {name: tensor for name, tensor in state.items() if name not in ignored}
    kept = remove_tied_weights_from_state_dict(dict(written), model)
    names = {_storage(tensor): name for name, tensor in kept.items()}
    ties = {name: names[_storage(written[name])] for name in written if name not in kept}
    # Tied names get tensors of their own, to find the name under which each would be saved.
    untied = {
        name: tensor.new_empty(tensor.shape) if name in ties else tensor
        for name, tensor in written.items()
    }
    saved = _saved(model, untied, None)
    aliases: dict[str, str] = {}
    if like_names is not None:
        aliases = {hub: live for hub, (_, live) in saved.items() if isinstance(live, str)}
        # After loading the directory, transformers may write other names than those of the directory:
        # some of its renamings match names that need no change.
        for conversions in (_conversions_used(model, like_names), []):
            other = _saved(model, untied, conversions)
            saved = min(other, saved, key=lambda s: len(_written(s, ties) ^ set(like_names)))
    float32 = _kept_in_float32(model, state)
    return {
        "architecture": type(model).__name__,
        "model_type": model.config.model_type,
        "live": {name: [list(tensor.shape), name in parameters] for name, tensor in state.items()},
        "saved": saved,
        "aliases": aliases,
        "ties": ties,
        "ignored": ignored,
        "dispensable": sorted(_matching_loads(model, "missing", state)),
        "passed_over": sorted(_matching_loads(model, "unexpected", like_names or ())),
        "float32_under_bfloat16": sorted(float32["bfloat16"]),
        "float32_under_float16": sorted(float32["float16"]),
    }


def _saved(
    model: Any, state: Mapping[str, Any], conversions: list[Any] | None
) -> dict[str, tuple[list[int], Any]]:
    """Shape and recipe of each tensor that ``save_pretrained`` makes of a state.

    Args:
        model: the model.
        state: the part of its state that is written.
        conversions: the conversions used when it was loaded; None for a model made from its config.
    """
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    from ckpt_tools.hub.reference.tracing import Tracer

    model._weight_conversions = conversions
    with torch.no_grad(), Tracer(state) as tracer:
        # The conversion empties its input, so it gets a copy.
        saved = revert_weight_conversion(model, dict(state))
    return {
        name: (list(tensor.shape), to_json(tracer.recipe(tensor))) for name, tensor in saved.items()
    }


def _written(saved: Mapping[str, tuple[list[int], Any]], ties: Mapping[str, str]) -> set[str]:
    """The hub names of the tensors that are not left out as tied."""
    return {name for name, (_, recipe) in saved.items() if str(recipe) not in ties}


def _conversions_used(model: Any, names: Collection[str]) -> list[Any]:
    """The conversions that loading a directory with these names uses and keeps for saving."""
    from transformers import core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, loading.WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, loading.WeightConverter)]
    state = model.state_dict()
    for name in sorted(names, key=loading.dot_natural_key):
        loading.rename_source_key(name, renamings, converters, model.base_model_prefix, state)
    return [conversion for conversion in conversions if conversion.was_used()]


def _kept_in_float32(model: Any, state: Mapping[str, Any]) -> dict[str, set[str]]:
    """For each 16-bit dtype, the live names that a model loaded in this dtype holds in fp32."""
    import torch

    created = {name for name, tensor in state.items() if tensor.dtype == torch.float32}
    return {
        str(dtype).removeprefix("torch."): created | _matching(model._get_dtype_plan(dtype), state)
        for dtype in (torch.bfloat16, torch.float16)
    }


def _matching_loads(model: Any, kind: str, names: Iterable[str]) -> set[str]:
    """Names that loading does not report as ``kind``: missing or unexpected."""
    patterns = set(getattr(model, f"_keys_to_ignore_on_load_{kind}") or ())
    if kind == "unexpected":
        # Older versions saved these with every model (`PreTrainedModel._adjust_missing_and_unexpected_keys`).
        patterns |= {r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"}
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}


def _matching(patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    from transformers.core_model_loading import build_glob_alternation

    globs: list[Any] = list(patterns)
    if not globs:
        return set()
    alternation, _, _ = build_glob_alternation(globs)
    return {name for name in names if alternation.search(name)}


def _storage(tensor: Any) -> int:
    return int(tensor.untyped_storage()._cdata)


if __name__ == "__main__":
    main()
