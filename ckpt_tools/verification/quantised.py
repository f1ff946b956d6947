"""Directories with a ``quantization_config``: that weights are quantised, and that none is so by halves.

Owns the questions that names and dtypes answer. Whether codes and scales fit each other is known to the
quantiser alone. The names are stated again here, so that what wrote the directory does not judge itself.
"""

from __future__ import annotations

from collections.abc import Mapping

from ckpt_tools.errors import counted, listed
from ckpt_tools.verification.config import is_quantized
from ckpt_tools.verification.container import Entry
from ckpt_tools.verification.directory import CONFIG
from ckpt_tools.verification.run import Run

ORDER = 25

# Last names of tensors beside the codes: below the weight's own name, and beside it in its module.
_BELOW = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_BESIDE = (
    *("SCB", "weight_format", "weight_scale", "weight_scale_inv", "weight_zero_point"),
    *("weight_packed", "weight_shape", "weight_g_idx", "weight_global_scale"),
    *("qweight", "qzeros", "g_idx"),
)


def check(run: Run) -> None:
    """Find side tensors of plain weights, and a config of a quantiser that quantised nothing."""
    directory, findings = run.directory, run.findings
    tensors = directory.tensors
    if not is_quantized(directory) or not tensors:
        return
    left = [name for name in tensors if _is_left(name, tensors)]
    if left:
        findings.add(
            "quantizer-leftover",
            f"plain weights have {counted(len(left), 'tensor')} of a quantiser beside them: {listed(left)}",
            file=tensors[left[0]].file,
            tensor=left[0],
            hint="Write the directory again from its sources; merge-lora leaves these out.",
        )
    if not any(_is_code(entry) for entry in tensors.values()) or (
        left and not _others(tensors, left)
    ):
        findings.add(
            "quantizer-unused",
            "it has a quantization_config, and no weight is quantised",
            file=CONFIG,
            hint="Remove quantization_config from config.json, unless loading is meant to quantise.",
        )
    findings.checked.append("quantised weights: none is plain beside its codes")


def _others(tensors: Mapping[str, Entry], left: list[str]) -> list[str]:
    """Codes that are not left over."""
    known = set(left)
    return [name for name, entry in tensors.items() if _is_code(entry) and name not in known]


def _is_left(name: str, tensors: Mapping[str, Entry]) -> bool:
    """Whether it is a side tensor of a weight that is there in plain values."""
    before, _, last = name.rpartition(".")
    if last in _BELOW:
        return _is_plain(tensors.get(before))
    if last.startswith("bitsandbytes__"):
        return _is_plain(tensors.get(before.removesuffix(".quant_state")))
    if last in _BESIDE:
        return _is_plain(tensors.get(f"{before}.weight"))
    return last.endswith(("_blocks", "_scales")) and _is_plain(tensors.get(name.rpartition("_")[0]))


def _is_plain(entry: Entry | None) -> bool:
    """Whether a tensor holds values; bitsandbytes may store its codes as one column of floats."""
    if entry is None or entry.dtype is None:
        return False
    return entry.dtype.is_floating and entry.dtype.itemsize > 1 and tuple(entry.shape)[-1:] != (1,)


def _is_code(entry: Entry) -> bool:
    dtype = entry.dtype
    return dtype is None or not dtype.is_floating or dtype.itemsize < 2
