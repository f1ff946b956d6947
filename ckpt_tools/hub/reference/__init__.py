"""Owns the question which model a config describes, and its answer: names, shapes and the saved layout.

A child process (``child.py``) finds the answer with transformers, so this process imports neither
transformers nor torch. :func:`start` starts the child and returns at once; the caller reads metadata while
the child works. Answers are kept for the life of the process, and on disk (``kept.py``).
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ckpt_tools.errors import UsageError
from ckpt_tools.hub.reference.kept import ask
from ckpt_tools.hub.reference.recipes import (
    Joined,
    Live,
    NewValues,
    Recipe,
    Shape,
    Strided,
    from_json,
    leaves,
)

__all__ = [
    "Answer",
    "NewValues",
    "Joined",
    "Live",
    "LiveTensor",
    "Recipe",
    "ReferenceModel",
    "SavedTensor",
    "Strided",
    "describe",
    "leaves",
    "start",
]


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """A tensor of the model in memory, as its ``state_dict`` names it."""

    shape: Shape
    kind: Literal["parameter", "buffer"]


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor of the directory that ``save_pretrained`` writes.

    Attributes:
        shape: sizes.
        recipe: how it is made of live tensors; ``Live`` of a name where it is one of them.
    """

    shape: Shape
    recipe: Recipe


@dataclass(frozen=True)
class ReferenceModel:
    """A model as transformers builds and saves it, without weights.

    Attributes:
        architecture: name of the model class.
        model_type: the config's model type.
        live: the content of ``state_dict()`` of the model in memory, in its order: parameters and
            persistent buffers, each tied name as an entry of its own.
        saved: the tensors that ``save_pretrained`` writes, in its order, under hub names.
        tied: the tensors that it would also write, under hub names, if ``ties`` were not tied.
        ties: live names that it leaves out, each with the live name that it writes instead.
        aliases: other names that hub directories of this model may have, each with its live name.
        ignored: live names that it never writes (``_keys_to_ignore_on_save``).
        float32_under_bfloat16: live and hub names of the tensors that a model loaded in bf16 holds in fp32:
            ``_keep_in_fp32_modules_strict``, and tensors that its constructor makes in fp32.
        float32_under_float16: the same for fp16, with ``_keep_in_fp32_modules`` as well.
        dispensable: live names that a directory may lack (``_keys_to_ignore_on_load_missing``).
        passed_over: names of ``like_names`` that loading ignores silently if the model has no such
            tensor (``_keys_to_ignore_on_load_unexpected``).
    """

    architecture: str
    model_type: str
    live: Mapping[str, LiveTensor]
    saved: Mapping[str, SavedTensor]
    tied: Mapping[str, SavedTensor]
    ties: Mapping[str, str]
    aliases: Mapping[str, str]
    ignored: frozenset[str]
    float32_under_bfloat16: frozenset[str]
    float32_under_float16: frozenset[str]
    dispensable: frozenset[str] = frozenset()
    passed_over: frozenset[str] = frozenset()

    def is_parameter(self, name: str) -> bool:
        """Whether a tensor of the directory is made of parameters with a floating dtype in the model."""
        recipe = (self.saved.get(name) or self.tied[name]).recipe
        live = (self.live.get(leaf.name) for leaf in leaves(recipe) if isinstance(leaf, Live))
        return any(tensor is not None and tensor.kind == "parameter" for tensor in live)

    @cached_property
    def hub_names(self) -> Mapping[str, str]:
        """The hub name of each live tensor that is written unchanged, tied ones included."""
        hub = {**self.saved, **self.tied}
        return {t.recipe.name: name for name, t in hub.items() if isinstance(t.recipe, Live)}

    @cached_property
    def hub_ties(self) -> Mapping[str, str]:
        """``ties`` under hub names."""
        names = self.hub_names
        return {names.get(a, a): names.get(k, k) for a, k in self.ties.items()}


class Answer:
    """The answer of a child process that may still be at work."""

    def __init__(self, future: Future[ReferenceModel | None]) -> None:
        self._future = future

    def result(self) -> ReferenceModel | None:
        """Wait for the answer; :func:`describe` documents the value and the errors."""
        return self._future.result()


_answers: dict[str, Answer] = {}
_answers_lock = threading.Lock()


def start(
    config: Mapping[str, Any],
    *,
    like_names: Collection[str] | None = None,
    code_dir: Path | None = None,
    trust_remote_code: bool = False,
    tensors: int = 0,
) -> Answer:
    """Start to find out which model ``config`` describes; :func:`describe` documents the arguments."""
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    _refuse_endless(config)
    question = json.dumps(
        {
            "config": dict(config),
            "architecture": architecture,
            "like_names": None if like_names is None else sorted(like_names),
            "code_dir": None if code_dir is None else os.fspath(code_dir.resolve()),
            "trust_remote_code": trust_remote_code and code_dir is not None,
            "modules": max(_MOST_MODULES, _MODULES_A_TENSOR * tensors),
        },
        sort_keys=True,
    )
    with _answers_lock:
        answer = _answers.get(question)
        if answer is None:
            answer = _answers[question] = Answer(Future())
            if isinstance(architecture, str) and "model_type" in config:
                # A daemon thread: a run that fails in the meantime does not wait for the child.
                threading.Thread(target=_find, args=(question, answer._future), daemon=True).start()
            else:
                answer._future.set_result(None)
    return answer


# transformers makes so many in four seconds. Models have fewer, or a tensor for each few of their modules.
_MOST_MODULES, _MODULES_A_TENSOR = 100_000, 8
# A model of a thousand layers takes transformers seconds to describe.
_MOST_LAYERS = 10_000
_LAYERS = frozenset(
    (
        "decoder_layers",
        "depth",
        "encoder_layers",
        "n_blocks",
        "n_layer",
        "n_layers",
        "n_routed_experts",
        "num_blocks",
        "num_decoder_layers",
        "num_encoder_layers",
        "num_experts",
        "num_hidden_layers",
        "num_layers",
        "num_local_experts",
        "num_nextn_predict_layers",
    )
)


def _refuse_endless(config: Mapping[str, Any], depth: int = 8) -> None:
    """Refuse a config with more layers or experts than any model has; each is built in the child.

    Raises:
        UsageError: it has more.
    """
    for key, value in config.items():
        if isinstance(value, dict) and depth:
            _refuse_endless(value, depth - 1)
        elif key in _LAYERS and isinstance(value, int | float) and value > _MOST_LAYERS:
            raise UsageError(
                f"the config asks for {value:,} {key}, and no model has more than {_MOST_LAYERS:,}",
                hint="Correct the number in config.json, or pass the config of the run with --config.",
            )


def describe(
    config: Mapping[str, Any],
    *,
    like_names: Collection[str] | None = None,
    code_dir: Path | None = None,
    trust_remote_code: bool = False,
    tensors: int = 0,
) -> ReferenceModel | None:
    """The model that a finished ``config.json`` describes, as transformers builds and saves it.

    Args:
        config: the config; its first architecture is the model class.
        like_names: the tensor names of a directory. If given, the layout is that of a model which was
            loaded from this directory; otherwise that of a model made from the config alone.
        code_dir: the directory of the config, which may hold custom code.
        trust_remote_code: whether the child process may run custom code from ``code_dir``.
        tensors: number of tensors that the checkpoint holds. A model of many more modules is refused, unless
            it is custom code that is trusted.

    Returns:
        The model, or None if transformers has no such model: the custom code is not trusted, or the
        installed version has no such model type or architecture.

    Raises:
        UsageError: transformers refuses the config.
        CkptError: the child process failed.
    """
    return start(
        config,
        like_names=like_names,
        code_dir=code_dir,
        trust_remote_code=trust_remote_code,
        tensors=tensors,
    ).result()


def _find(question: str, future: Future[ReferenceModel | None]) -> None:
    try:
        future.set_result(_parsed(ask(f"{__name__}.child", question)))
    except BaseException as error:
        future.set_exception(error)


def _parsed(answer: Mapping[str, Any]) -> ReferenceModel | None:
    if "invalid" in answer:
        raise UsageError(
            f"transformers cannot build a model from the config: {answer['invalid']}",
            hint="Pass the config that the model was trained with: --config FILE.",
        )
    if "endless" in answer:
        raise UsageError(
            f"the config describes a model of more than {answer['endless']:,} modules, far more than the "
            "checkpoint has tensors",
            hint="Correct the numbers of layers and experts in config.json, or pass the config of the run "
            "with --config.",
        )
    if "unknown" in answer:
        return None
    model = answer["model"]
    live = {
        name: LiveTensor(tuple(shape), "parameter" if is_parameter else "buffer")
        for name, (shape, is_parameter) in model["live"].items()
    }
    ties = model["ties"]
    saved: dict[str, SavedTensor] = {}
    tied: dict[str, SavedTensor] = {}
    for name, (shape, form) in model["saved"].items():
        recipe = from_json(form)
        is_tied = any(isinstance(leaf, Live) and leaf.name in ties for leaf in leaves(recipe))
        (tied if is_tied else saved)[name] = SavedTensor(tuple(shape), recipe)
    return ReferenceModel(
        architecture=model["architecture"],
        model_type=model["model_type"],
        live=live,
        saved=saved,
        tied=tied,
        ties=ties,
        aliases=model["aliases"],
        ignored=frozenset(model["ignored"]),
        float32_under_bfloat16=_both_names(model["float32_under_bfloat16"], {**saved, **tied}),
        float32_under_float16=_both_names(model["float32_under_float16"], {**saved, **tied}),
        dispensable=frozenset(model["dispensable"]),
        passed_over=frozenset(model["passed_over"]),
    )


def _both_names(live: list[str], saved: Mapping[str, SavedTensor]) -> frozenset[str]:
    """The live names, and the hub names of tensors that are made of these alone."""
    names = set(live)
    made = {
        name
        for name, tensor in saved.items()
        if all(isinstance(leaf, Live) and leaf.name in names for leaf in leaves(tensor.recipe))
    }
    # A hub name may also be the live name of another tensor, which must not be included.
    others = {name for name, tensor in saved.items() if name not in made}
    return frozenset((names | made) - others)
