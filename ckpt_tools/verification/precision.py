"""One dtype policy: the floating tensors are of one dtype, but for those that the model keeps in fp32.

Owns what a mixture of dtypes means. It must not know how tensors are stored.
"""

from __future__ import annotations

from ckpt_tools.hub.reference import ReferenceModel
from ckpt_tools.tensors.dtypes import BFLOAT16, FLOAT16, FLOAT32, DType
from ckpt_tools.verification.config import dominant_dtype, is_quantized
from ckpt_tools.verification.directory import Directory
from ckpt_tools.verification.problem import Findings, listed


def check_precision(
    directory: Directory, reference: ReferenceModel | None, findings: Findings
) -> None:
    """Note tensors of another dtype than the rest."""
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
            f"{len(names)} tensors are {dtype}, the rest is {common}: {listed(names)}",
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
