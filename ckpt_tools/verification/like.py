"""Owns the comparison with another directory of the same model (``--like``): the base, or the run's own.

Weights prove nothing about the files beside them. A changed ``rms_norm_eps`` or two exchanged entries of a
vocabulary leave a directory that loads, and computes something else. Keys of the config that do not change
the computation are on an allow-list; every other difference is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ckpt_tools.errors import CkptError
from ckpt_tools.hub.config import embedding_rows, text_value
from ckpt_tools.hub.files import read_object
from ckpt_tools.hub.reference.process import ask_any
from ckpt_tools.hub.tokenizer import Tokenizer
from ckpt_tools.storage.naming import as_path
from ckpt_tools.verification.directory import CONFIG, Directory
from ckpt_tools.verification.like_tokenizer import compare_tokenizers
from ckpt_tools.verification.problem import Findings, Severity
from ckpt_tools.verification.run import Run

ORDER = 45
_GENERATION = "generation_config.json"

# Keys that say who wrote a config, how a run saved memory, or what a training loss did.
_FREE = {
    "_name_or_path",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_commit_hash",
    "_experts_implementation",
    "_from_model_config",
    "attn_implementation",
    "dtype",
    "gradient_checkpointing",
    "id2label",
    "initializer_range",
    "label2id",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "use_cache",
    # Of training alone: a model that is loaded for use drops nothing.
    "activation_dropout",
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "classifier_dropout",
    "dropout",
    "embd_pdrop",
    "embedding_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "resid_pdrop",
    "summary_first_dropout",
}
_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "pad"}
_ABSENT = object()


def check(run: Run) -> None:
    """Compare the directory with that of ``like``, if one is named."""
    if run.request.like is None:
        return
    like = as_path(run.request.like)
    directory, findings = run.directory, run.findings
    if directory.config is not None:
        _compare_configs(directory, directory.config, read_object(like / CONFIG), findings)
    resized = _is_resized(directory, read_object(like / CONFIG))
    compare_tokenizers(directory.path, like, findings, may_grow=resized)
    _compare_generation(directory.path, like, findings)
    findings.checked.append(f"config, tokenizer and generation config against {like}")


def _is_resized(directory: Directory, like: Mapping[str, Any]) -> bool:
    """Whether the embedding has other rows than the other config says, and the own config says so too."""
    known = {n: (e.dtype, e.shape) for n, e in directory.tensors.items() if e.dtype is not None}
    rows = embedding_rows(known)
    config = directory.config or {}
    return rows is not None and rows == text_value(config, "vocab_size") != text_value(
        like, "vocab_size"
    )


def _compare_configs(
    directory: Directory, config: Mapping[str, Any], like: Mapping[str, Any], findings: Findings
) -> None:
    resized = _is_resized(directory, like)
    for key, ours, theirs in sorted(_differences(*_filled(dict(config), dict(like)))):
        severity = _severity(directory, key, ours, theirs, resized)
        if severity is not None:
            findings.add(
                "config-differs",
                f"{key} is {_shown(ours)}, and {_shown(theirs)} in the directory of --like",
                file=CONFIG,
                severity=severity,
                hint=None
                if severity == "warning"
                else "Copy the value, if that directory is right.",
            )


def _filled(
    ours: dict[str, Any], theirs: dict[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Both configs with transformers' defaults; as they are where it does not know one of them."""
    try:
        filled = ask_any("ckpt_tools.verification.like_child", json.dumps([ours, theirs]))
    except CkptError:
        return ours, theirs
    if not all(isinstance(each, dict) for each in filled):
        return ours, theirs
    # What transformers drops or renames must not hide a difference.
    kept = {key for key in (*ours, *theirs) if all(key not in each for each in filled)}
    first, second = (
        {**each, **{key: raw[key] for key in kept if key in raw}}
        for each, raw in zip(filled, (ours, theirs), strict=True)
    )
    return first, second


def _differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for key in {*ours, *theirs}:
        a, b = ours.get(key, _ABSENT), theirs.get(key, _ABSENT)
        if key in _FREE or a == b or (a in (None, _ABSENT) and b in (None, _ABSENT)):
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", a, b


def _severity(
    directory: Directory, key: str, ours: Any, theirs: Any, resized: bool
) -> Severity | None:
    """How bad a difference is; None where it is none."""
    last = key.rpartition(".")[2]
    if last == "vocab_size" and resized:
        return None
    if key == "architectures":
        # Another head on the same model is what a reward model is; its tensors are checked with the config.
        return "warning"
    if key.partition(".")[0] == "auto_map":
        return None if _own(ours) == _own(theirs) else "error"
    if key.partition(".")[0] == "quantization_config" and ours in (None, _ABSENT):
        return None
    if last in _TOKENS and ours == _id_of(directory, _TOKENS[last]):
        return "warning"
    return "error"


def _own(reference: object) -> object:
    """A class of ``auto_map`` without the repository of its code."""
    return reference.rpartition("--")[2] if isinstance(reference, str) else reference


def _id_of(directory: Directory, role: Any) -> int | None:
    """The id of a special token of the directory's own tokenizer."""
    tokenizer = Tokenizer(directory.path)
    try:
        token = tokenizer.special(role)
        return None if token is None else tokenizer.id_of(token)
    except CkptError:
        return None


def _compare_generation(ours: Path, theirs: Path, findings: Findings) -> None:
    try:
        first, second = (
            read_object(place / _GENERATION) if (place / _GENERATION).is_file() else None
            for place in (ours, theirs)
        )
    except CkptError:
        return  # the check of generation configs says so
    if second is None:
        findings.skipped.append(f"generation config against {theirs}: it has none")
        return
    if first is None:
        findings.add("generation-differs", "it is not there, and --like has one", file=_GENERATION)
        return
    for key, a, b in sorted(_differences(first, second)):
        findings.add(
            "generation-differs",
            f"{key} is {_shown(a)}, and {_shown(b)} in the directory of --like",
            file=_GENERATION,
        )


def _shown(value: object) -> str:
    text = "absent" if value is _ABSENT else json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
