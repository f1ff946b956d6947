"""Owns the judgement of values: NaN, infinity, zeros and constants that a trained weight does not have.

:mod:`~ckpt_tools.verification.scan` counts them. The weights of a norm can be all ones, or all zeros in
models that add one to them. Biases can be zero, and so can embedding rows that pad the vocabulary. A matrix
that is completely zero or constant was never written, or never loaded before the save.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ckpt_tools.hub.adapter_config import NAME as ADAPTER_CONFIG
from ckpt_tools.hub.reference import Live, ReferenceModel, leaves
from ckpt_tools.verification.container import Entry
from ckpt_tools.verification.directory import Directory
from ckpt_tools.verification.problem import Findings, Severity
from ckpt_tools.verification.scan import STEP_BYTES, Summary

# Tensors that do not multiply. They can be zero or constant.
_ADDED = re.compile(r"bias|scale|zero_point|(cls|mask|class|register)_(token|embedding)s?$")
# Tables with rows that pad the vocabulary or were never used.
_TABLE = re.compile(r"embed|wte|wpe|lm_head|shared|word|position|score|classifier|output\.weight$")
# Matrices that transformers starts with zeros. Training without images leaves them so.
_FROM_ZEROS = re.compile(r"(^|\.)mm_input_projection_weight$")
_LORA_B = re.compile(r"\.lora_(B|embedding_B)(\.weight)?$")
_RESTORE = "Write or download the file again. If training saved it so, use an earlier checkpoint."

Seen = Mapping[tuple[str, str], Summary]


def judge(
    directory: Directory, reference: ReferenceModel | None, seen: Seen, findings: Findings
) -> None:
    """Add a problem for each tensor with invalid values."""
    buffers = _buffers(reference)
    for entry, summary in _floating(directory.tensors, seen):
        is_buffer = entry.name in buffers
        _judge_finite(entry, summary, is_buffer, findings)
        if not is_buffer and _is_matrix(entry):
            _judge_spread(entry, summary, None, findings)
    _judge_norms(directory.tensors, seen, findings)
    for folder, tensors in directory.adapters.items():
        _judge_adapter(folder, tensors, seen, findings)


def _floating(tensors: Mapping[str, Entry], seen: Seen) -> Iterator[tuple[Entry, Summary]]:
    for entry in tensors.values():
        summary = seen.get((entry.file, entry.name))
        if summary is not None and summary.first:
            yield entry, summary


def _buffers(reference: ReferenceModel | None) -> set[str]:
    """Hub names of buffers."""
    if reference is None:
        return set()
    hub = {**reference.saved, **reference.tied}
    return {
        name
        for name, tensor in hub.items()
        if any(
            isinstance(leaf, Live) and reference.live[leaf.name].kind == "buffer"
            for leaf in leaves(tensor.recipe)
        )
    }


def _judge_finite(entry: Entry, summary: Summary, is_buffer: bool, findings: Findings) -> None:
    # A buffer such as a mask can hold minus infinity.
    severity: Severity | None = "warning" if is_buffer else None
    for kind, count, what in (
        ("nan", summary.nans, "not a number"),
        ("inf", summary.infinities, "infinite"),
    ):
        if count:
            findings.add(
                kind,
                f"{count:,} of its values are {what}",
                file=entry.file,
                tensor=entry.name,
                hint=_RESTORE,
                severity=severity,
            )


def _is_matrix(entry: Entry) -> bool:
    """Whether it is a matrix that multiplies: several rows and columns, and not a bias."""
    axes = sum(size > 1 for size in entry.shape)
    return axes > 1 and not _ADDED.search(entry.name.rpartition(".weight")[0] or entry.name)


def _judge_spread(
    entry: Entry, summary: Summary, severity: Severity | None, findings: Findings
) -> None:
    if not summary.largest:
        kind, detail = "all-zero", "all its values are zero"
        if _FROM_ZEROS.search(entry.name):
            severity = "warning"
    elif summary.is_constant:
        kind, detail = "constant", "all its values are the same"
    elif summary.zero_steps and not _TABLE.search(entry.name):
        kind, severity = "zero-block", None
        detail = (
            f"it has runs of zeros, at least {summary.zero_steps * STEP_BYTES:,} bytes in total"
        )
    else:
        return
    findings.add(kind, detail, file=entry.file, tensor=entry.name, hint=_RESTORE, severity=severity)


def _judge_norms(tensors: Mapping[str, Entry], seen: Seen, findings: Findings) -> None:
    """Vectors that are zero in some layers only. If all are zero, the model adds one to them."""
    by_role: dict[str, list[tuple[Entry, bool]]] = {}
    for entry, summary in _floating(tensors, seen):
        if not _is_matrix(entry) and entry.name.endswith(".weight") and sum(entry.shape) > 1:
            role = re.sub(r"\.\d+\.", ".*.", entry.name)
            by_role.setdefault(role, []).append((entry, not summary.largest))
    for same in by_role.values():
        if all(is_zero for _, is_zero in same):
            continue
        for entry, is_zero in same:
            if is_zero:
                findings.add(
                    "all-zero",
                    "all its values are zero, but not in other layers",
                    file=entry.file,
                    tensor=entry.name,
                    hint=_RESTORE,
                    severity="warning",
                )


def _judge_adapter(
    folder: str, tensors: Mapping[str, Entry], seen: Seen, findings: Findings
) -> None:
    held = list(_floating(tensors, seen))
    factors = [(entry, s) for entry, s in held if _LORA_B.search(entry.name)]
    for entry, summary in held:
        _judge_finite(entry, summary, False, findings)
        if _is_matrix(entry) and not _LORA_B.search(entry.name):
            # Some other kinds of adapters start at zero or one.
            _judge_spread(entry, summary, None if ".lora_" in entry.name else "warning", findings)
    if factors and all(not summary.largest for _, summary in factors):
        file = f"{folder}/{ADAPTER_CONFIG}" if folder else ADAPTER_CONFIG
        findings.add(
            "adapter-untrained",
            f"all {len(factors)} LoRA B matrices are zero, as before training",
            file=file,
            hint="Use the adapter of a later step.",
        )
