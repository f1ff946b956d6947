"""Owns every use of PEFT's saving code: the child process that finds out what PEFT writes of an adapter.

``get_peft_model_state_dict`` filters and renames a state, mostly without reading its values. The child passes
tensors without values, and finds each tensor of the result again by its identity. Of a prompt encoder, PEFT
writes the output; the child makes it when the parent passes the encoder's values. The base is built on the
meta device. The child reads one JSON object on standard input and prints one on standard output.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ckpt_tools.hub.reference.child import build_on_meta, find_classes
from ckpt_tools.hub.reference.process import imported_files, question_and_answers

# They set values that do not matter here, and may read the base's values or files.
_STARTS = (
    *("init_lora_weights", "prompt_tuning_init", "prompt_tuning_init_text"),
    "prompt_tuning_init_state_dict_path",
)
# These may set shapes too. They are left out only where PEFT cannot build the adapter with them.
_SHAPING_STARTS = ("init_weights", "init_ia3_weights")
_WITH_PEFT = "Load the training state into the model with PEFT, and call its save_pretrained."
_WHILE_TRAINING = (
    "Call save_pretrained in the training process. If random_seed is set in the config, load the training "
    "state into the model with PEFT: it makes the same indices again."
)
# Tuners whose adapter is not built without the base's values or other files, and what to do instead.
_REASONS = {
    "ADAMSS": ("PEFT clusters the values of the base's weights", _WITH_PEFT),
    "FROD": ("PEFT decomposes the values of the base's weights", _WITH_PEFT),
    "SHIRA": ("PEFT keeps shira_indices outside the state dict", _WHILE_TRAINING),
    "XLORA": ("PEFT reads the adapters that it mixes from their own directories", _WITH_PEFT),
}


def main() -> None:
    """Answer the question on standard input."""
    with question_and_answers() as (question, answers):
        # As in the other child: imports make no garbage.
        gc.disable()
        import peft  # noqa: F401  (if it is absent, the parent reports this import's error)

        found = [_answer(question["config"], adapter) for adapter in question["adapters"]]
        answer: dict[str, Any] = {"adapters": found}
        if not any("failure" in one for one in found):
            answer["files"] = imported_files()
        json.dump(answer, answers)


def _answer(config: Mapping[str, Any], adapter: Mapping[str, Any]) -> dict[str, Any]:
    reason = _REASONS.get(adapter["config"]["peft_type"])
    if reason is not None:
        return {"failure": reason[0], "hint": reason[1]}
    try:
        model = _adapted(dict(config), adapter)
        return _made(model, adapter) if "values" in adapter else _described(model, adapter)
    except NotImplementedError as error:
        # PyTorch raises it for what the meta device cannot do.
        failure = f"PEFT reads the base's values when it builds the adapter ({error})"
        return {"failure": failure.splitlines()[0], "hint": _WITH_PEFT}
    except Exception as error:
        return {"failure": f"{type(error).__name__}: {error}"}


def _adapted(config: dict[str, Any], adapter: Mapping[str, Any]) -> Any:
    """The adapted model, as it is while it trains.

    A prompt encoder that was loaded for inference is its table alone. The names of the state show it.
    """
    config.pop("quantization_config", None)
    model = _built(config, adapter, inference=False)
    if model.peft_config[adapter["name"]].is_prompt_learning:
        prefix = _encoder_prefix(adapter)
        held = {name for name in adapter["names"] if name.startswith(prefix)}
        if held != _encoder_names(model, prefix):
            loaded = _built(config, adapter, inference=True)
            if held == _encoder_names(loaded, prefix):
                return loaded
    return model


def _encoder_prefix(adapter: Mapping[str, Any]) -> str:
    return f"prompt_encoder.{adapter['name']}."


def _encoder_names(model: Any, prefix: str) -> set[str]:
    return {name for name in model.state_dict() if name.startswith(prefix)}


def _built(config: dict[str, Any], adapter: Mapping[str, Any], *, inference: bool) -> Any:
    failures = []
    for device, settings in _ways(adapter["config"]):
        try:
            return _build(
                config, adapter["name"], device, {**settings, "inference_mode": inference}
            )
        except LookupError:
            raise
        except Exception as error:
            failures.append(error)
    # The last way reads the least, so its error is about the config and not about absent values.
    raise failures[-1]


def _ways(settings: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Ways to build an adapter, cheapest first.

    Some tuners need values of their own, such as permutations, so the adapter is built on the processor.
    """
    from peft import PeftType, PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType(settings["peft_type"]))
    is_prompt = kind is not None and issubclass(kind, PromptLearningConfig)
    whole = {key: value for key, value in settings.items() if key not in _STARTS}
    least = {key: value for key, value in whole.items() if key not in _SHAPING_STARTS}
    for device in ("cpu",) if is_prompt else ("meta", "cpu"):
        yield device, whole
        if least != whole:
            yield device, least


def _build(config: dict[str, Any], name: str, device: str, settings: dict[str, Any]) -> Any:
    import torch
    from peft import PeftConfig, get_peft_model

    architecture = next(iter(config.get("architectures") or ()), "")
    found = find_classes(dict(config), {"architecture": architecture, "trust_remote_code": False})
    if found is None:
        raise LookupError(f"transformers has no {architecture}")
    base = build_on_meta(*found)
    with torch.device(device):
        configs: Any = PeftConfig
        peft_config = configs.from_peft_type(**{**settings, "base_model_name_or_path": None})
        return get_peft_model(base, peft_config, adapter_name=name)


def _described(model: Any, adapter: Mapping[str, Any]) -> dict[str, Any]:
    """What is written: tensors of the state by their names, and tensors that PEFT makes."""
    own = model.state_dict()
    tokens = {name: _token(own.get(name), dtype) for name, dtype in adapter["names"].items()}
    tokens = {**own, **tokens}
    encoder = _encoder_values(model, adapter)
    saved = _saved(model, adapter, tokens)
    parameters = model.named_parameters(remove_duplicate=False)
    names = {id(value): name for name, value in (*tokens.items(), *parameters)}
    others = _other_names(model)
    found: dict[str, list[str]] = {}
    made: dict[str, str] = {}
    for key, value in saved.items():
        name = names.get(id(value)) or _equal(value, encoder)
        if name is None:
            made[key] = str(value.dtype).removeprefix("torch.")
        else:
            found[key] = [name, *(other for other in others.get(name, ()) if other != name)]
    shapes = {key: list(value.shape) for key, value in saved.items()}
    odd = [name for names in found.values() for name in names[:1] if name not in own]
    if made and not encoder:
        failure = f"PEFT computes tensors when it saves, such as {next(iter(made))}"
        return {"failure": failure, "hint": _WITH_PEFT}
    inputs = {name: list(value.shape) for name, value in encoder.items()} if made else {}
    return {"names": found, "shapes": shapes, "odd": odd, "made": made, "inputs": inputs}


def _token(own: Any, dtype: str) -> Any:
    """A tensor without values that stands for one of the state."""
    import torch

    shape = (0,) if own is None else own.shape
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def _encoder_values(model: Any, adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Random values for each tensor of a prompt encoder, so that an unchanged table is recognised."""
    import torch

    prefix = _encoder_prefix(adapter)
    if not model.peft_config[adapter["name"]].is_prompt_learning:
        return {}
    encoder = model.prompt_encoder[adapter["name"]]
    values = {
        name: torch.rand(value.shape).to(
            getattr(torch, adapter["names"].get(prefix + name, "float32"))
        )
        for name, value in encoder.state_dict().items()
    }
    _load(encoder, values)
    return {prefix + name: value for name, value in values.items()}


def _load(encoder: Any, values: dict[str, Any]) -> None:
    encoder.load_state_dict(values, assign=True)
    # Dropout is for training steps; the file holds what inference reads.
    encoder.eval()


def _equal(value: Any, encoder: Mapping[str, Any]) -> str | None:
    import torch

    equal = (
        name
        for name, other in encoder.items()
        if value.dtype == other.dtype and torch.equal(value, other)
    )
    return next(equal, None)


def _other_names(model: Any) -> dict[str, list[str]]:
    """For each name of a tensor that has several, all of them: a checkpoint may hold only one."""
    names: dict[int, list[str]] = {}
    for tensors in (model.named_parameters, model.named_buffers):
        for name, tensor in tensors(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def _saved(model: Any, adapter: Mapping[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    from peft import get_peft_model_state_dict

    found: dict[str, Any] = get_peft_model_state_dict(
        model,
        state_dict=state,
        adapter_name=adapter["name"],
        save_embedding_layers=True if adapter["save_embeddings"] else "auto",
    )
    return found


def _made(model: Any, adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Write the output of a prompt encoder that has the values that the parent passes."""
    from safetensors.torch import load_file, save_file

    prefix = _encoder_prefix(adapter)
    values = load_file(adapter["values"])
    encoder = model.prompt_encoder[adapter["name"]]
    _load(encoder, {name.removeprefix(prefix): value for name, value in values.items()})
    made = _saved(model, adapter, model.state_dict())[adapter["saved"]]
    save_file({adapter["saved"]: made.detach().contiguous()}, adapter["into"])
    return {}


if __name__ == "__main__":
    main()
