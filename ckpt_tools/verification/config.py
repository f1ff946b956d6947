"""Owns the check of ``config.json`` against names, dtypes and shapes of the tensors, and of mixed dtypes.

:mod:`~ckpt_tools.verification.model` compares the tensors with the complete model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_tools.errors import counted, listed
from ckpt_tools.hub.architectures import contradiction
from ckpt_tools.hub.config import embedding_rows, text_value
from ckpt_tools.hub.reference import ReferenceModel
from ckpt_tools.tensors.dtypes import BFLOAT16, BY_NAME, FLOAT16, FLOAT32, DType
from ckpt_tools.verification.container import Entry
from ckpt_tools.verification.directory import CONFIG, Directory, read_object
from ckpt_tools.verification.problem import Findings
from ckpt_tools.verification.run import Run

ORDER = 20


def read_config(directory: Directory, findings: Findings, *, weights_alone: bool = False) -> None:
    """Read the model's config and keep it in ``directory``.

    Args:
        directory: the directory.
        findings: takes the problems.
        weights_alone: whether the directory was written without a config on request.
    """
    if CONFIG not in directory.files:
        if directory.tensors:
            findings.add(
                "config-missing",
                "no file describes the model of the tensors",
                file=CONFIG,
                hint="Copy the config.json that the model was trained with.",
                severity="warning" if weights_alone else None,
            )
        return
    data = read_object(directory, CONFIG, "config-invalid", findings)
    if data is None:
        return
    if not isinstance(data.get("model_type"), str):
        findings.add(
            "config-invalid",
            "model_type is missing, so no loader can read it",
            file=CONFIG,
            hint="Copy the config.json that the model was trained with.",
        )
        return
    names = data.get("architectures")
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        findings.add("config-invalid", "architectures is not a list of names", file=CONFIG)
        data["architectures"] = None
    directory.config = data


def is_quantized(directory: Directory) -> bool:
    """Whether the tensors are quantized, with names and shapes of the quantizer."""
    config = directory.config or {}
    return any(config.get(key) for key in ("quantization_config", "compression_config"))


def check(run: Run) -> None:
    """Compare the config with the tensors, and the dtypes with each other."""
    check_config(run.directory, run.reference, run.findings)
    check_precision(run.directory, run.reference, run.findings)


def check_config(
    directory: Directory, reference: ReferenceModel | None, findings: Findings
) -> None:
    """Compare the config with the tensors."""
    config, tensors = directory.config, directory.tensors
    if config is None or not tensors:
        return
    _check_architecture(config, tensors, findings)
    if is_quantized(directory):
        _check_computing_dtype(config, findings)
        findings.skipped.append("dtype and vocabulary of the config: the weights are quantized")
        return
    _check_dtype(config, tensors, findings)
    if reference is None:
        _check_vocabulary(config, tensors, findings)
    findings.checked.append("config.json: dtype, vocabulary and class against the tensors")


def _check_architecture(
    config: Mapping[str, Any], tensors: Mapping[str, Entry], findings: Findings
) -> None:
    names = config.get("architectures")
    if not names:
        findings.add(
            "config-architecture",
            "architectures is missing: some loaders cannot choose a class",
            file=CONFIG,
            severity="warning",
            hint='Add "architectures": ["<class of the model>"].',
        )
        return
    odd = contradiction(names[0], tensors)
    if odd is not None:
        findings.add(
            "config-architecture",
            f"it names {names[0]}, but the tensors include {odd}, which that class does not have",
            file=CONFIG,
        )


def _check_dtype(
    config: Mapping[str, Any], tensors: Mapping[str, Entry], findings: Findings
) -> None:
    said = config.get("dtype") or config.get("torch_dtype")
    found = dominant_dtype(tensors)
    if not isinstance(said, str) or said == "auto" or found is None:
        return
    name = said.removeprefix("torch.")
    if name not in BY_NAME:
        findings.add("config-invalid", f"torch has no dtype {said!r}", file=CONFIG)
    elif BY_NAME[name] != found:
        findings.add(
            "config-dtype",
            f"it has {name}, the tensors are {found}; some loaders then cast every tensor",
            file=CONFIG,
            hint=f'Set "dtype": "{found}".',
        )


def _check_computing_dtype(config: Mapping[str, Any], findings: Findings) -> None:
    """A quantised model computes in a dtype of 16 bits or more; torch creates no modules of 8-bit floats."""
    said = config.get("dtype") or config.get("torch_dtype")
    dtype = BY_NAME.get(said.removeprefix("torch.")) if isinstance(said, str) else None
    if dtype is not None and (not dtype.is_floating or dtype.itemsize < 2):
        findings.add(
            "config-dtype",
            f"it has {dtype}, the dtype of codes; transformers cannot create a model in it",
            file=CONFIG,
            hint='Set "dtype" to the dtype that the model computes in, such as "bfloat16".',
        )


def dominant_dtype(tensors: Mapping[str, Entry]) -> DType | None:
    """The floating dtype of most bytes; None if no tensor is floating."""
    counts: dict[DType, int] = {}
    for entry in tensors.values():
        if entry.dtype is not None and entry.dtype.is_floating:
            counts[entry.dtype] = counts.get(entry.dtype, 0) + entry.nbytes
    return max(counts, key=lambda dtype: counts[dtype], default=None)


def _check_vocabulary(
    config: Mapping[str, Any], tensors: Mapping[str, Entry], findings: Findings
) -> None:
    """The check without the model's shapes: custom code can pad the embedding, but not cut it."""
    known = {n: (e.dtype, e.shape) for n, e in tensors.items() if e.dtype is not None}
    rows, size = embedding_rows(known), text_value(config, "vocab_size")
    if rows is not None and isinstance(size, int) and rows < size:
        note_vocabulary(size, rows, [], findings)


def note_vocabulary(size: int, rows: int, names: list[str], findings: Findings) -> None:
    """Add the problem that vocab_size does not fit the tensors."""
    where = f" ({listed(names)})" if names else ""
    findings.add(
        "config-vocabulary",
        f"vocab_size is {size}; the embedding has {rows} rows{where}",
        file=CONFIG,
        tensor=names[0] if names else None,
        hint=f'Set "vocab_size": {rows} if the tensors are right.',
    )


def check_precision(
    directory: Directory, reference: ReferenceModel | None, findings: Findings
) -> None:
    """Add a problem for tensors of another dtype than the rest, except those the model keeps in fp32."""
    tensors = directory.tensors
    common = dominant_dtype(tensors)
    if common is None:
        return
    if is_quantized(directory):
        findings.skipped.append("one dtype for all: the weights are quantized")
        return
    kept = _kept_in_float32(reference, common)
    others: dict[DType, list[str]] = {}
    for name, entry in tensors.items():
        dtype = entry.dtype
        if dtype is None or not dtype.is_floating or dtype == common:
            continue
        if dtype == FLOAT32 and name in kept:
            continue
        others.setdefault(dtype, []).append(name)
    for dtype, names in others.items():
        findings.add(
            "dtype-mixed",
            f"{counted(len(names), 'tensor')} in {dtype}, the others in {common}: {listed(names)}",
            tensor=names[0],
        )
    findings.checked.append(f"one dtype: {common}")


def _kept_in_float32(reference: ReferenceModel | None, common: DType) -> frozenset[str]:
    if reference is None:
        return frozenset()
    under = {
        BFLOAT16: reference.float32_under_bfloat16,
        FLOAT16: reference.float32_under_float16,
    }
    return under.get(common, frozenset())
