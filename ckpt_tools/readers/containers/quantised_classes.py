"""Owns torchao's quantised tensors in a file of torch: the plain weight, as ``dequantize()`` gives it.

The classes on the list keep codes, a scale a block, and zero points, and their ``dequantize()`` is
``(code - zero point) * scale``. Other classes are refused by name.

Sources: torchao 0.18 ``quantization/quantize_/workflows`` (``int8``, ``float8``, ``intx``) and
``quantization/quant_primitives.py`` (``_dequantize_affine``, ``_dequantize_affine_float8``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ckpt_tools.errors import listed
from ckpt_tools.readers.containers.pickled import Opaque, TensorRef
from ckpt_tools.readers.containers.subclasses import class_of
from ckpt_tools.readers.containers.torch_file import stored
from ckpt_tools.tensors.catalogue import Shape, Tensor
from ckpt_tools.tensors.dequantise import Dequantised, Setting, fits
from ckpt_tools.tensors.dtypes import FLOAT32, DType

_FLOATS = ("float8_e4m3fn", "float8_e5m2")
_WEIGHTS = ("bfloat16", "float16", "float32")
# What each class keeps beside codes, scale and zero point; other attributes may change what the weight is.
_KNOWN = {
    "Int8Tensor": {"act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "reduce_range"},
    "Float8Tensor": {"mm_config", "act_quant_kwargs", "kernel_preference"},
    "IntxUnpackedToInt8Tensor": {"target_dtype", "activation_quantization"},
}
_PARTS = {"qdata", "scale", "zero_point", "block_size"}


def dequantised(value: object) -> Dequantised | None:
    """The weight that a quantised tensor of a class on the list stands for; None for every other value."""
    kind = class_of(value)
    package, _, name = (kind or "").rpartition(".")
    if not isinstance(value, Opaque) or package.split(".")[0] != "torchao" or name not in _KNOWN:
        return None
    state = value.state[0] if isinstance(value.state, tuple) and value.state else value.state
    if not isinstance(state, Mapping):
        return None
    odd = {key for key, held in state.items() if held is not None} - _PARTS - _KNOWN[name]
    dtype, shape = value.args[1:3]
    parts = {"codes": state.get("qdata"), "scale": state.get("scale")}
    if state.get("zero_point") is not None:
        parts["zero_point"] = state["zero_point"]
    refs = {role: part for role, part in parts.items() if isinstance(part, TensorRef)}
    if odd or refs.keys() != parts.keys() or not isinstance(dtype, DType) or len(shape) < 2:
        return None
    block = _block(name, state, refs, tuple(shape))
    if block is None or not _is_known(name, refs, dtype):
        return None
    within = FLOAT32 if name == "Float8Tensor" else dtype
    times = within if within == refs["scale"].dtype else FLOAT32
    settings: dict[str, Setting] = {
        "rows": block[-2], "columns": block[-1], "within": within.name, "times": times.name,
    }  # fmt: skip
    held = {role: stored(ref) for role, ref in refs.items()}
    made = Dequantised("scaled", held, settings, tuple(shape), dtype)
    return made if fits(made) else None


def _is_known(name: str, refs: Mapping[str, TensorRef], dtype: DType) -> bool:
    """Whether codes, scales and zero points are of the dtypes whose arithmetic is known."""
    codes = _FLOATS if name == "Float8Tensor" else ("int8",)
    points = refs.get("zero_point")
    return (
        dtype.name in _WEIGHTS
        and refs["codes"].dtype.name in codes
        and refs["scale"].dtype.name in _WEIGHTS
        and (points is None or (points.dtype.name == "int8" and name != "Float8Tensor"))
    )


def _block(
    name: str, state: Mapping[str, Any], refs: Mapping[str, TensorRef], shape: Shape
) -> Shape | None:
    """The sizes of a block of one scale; None if blocks do not divide the last two axes alone."""
    scale = refs["scale"].shape
    if refs["scale"].numel == 1:
        return shape if len(shape) == 2 else (*(1 for _ in shape[:-2]), *shape[-2:])
    block = state.get("block_size")
    if name == "Float8Tensor" and len(scale) == len(shape) and all(scale):
        # torchao takes the blocks of float8 from the shape of the scale.
        block = [size // count for size, count in zip(shape, scale, strict=True)]
    if not isinstance(block, list | tuple) or len(block) != len(shape):
        return None
    if not all(isinstance(size, int) and size > 0 for size in block):
        return None
    grid = [size // part for size, part in zip(shape, block, strict=True)]
    whole = all(size % part == 0 for size, part in zip(shape, block, strict=True))
    one_each = all(part == 1 for part in block[:-2]) or math.prod(shape[:-2]) == 1
    if not whole or not one_each or math.prod(grid) != refs["scale"].numel:
        return None
    points = refs.get("zero_point")
    return tuple(block) if points is None or points.numel == math.prod(grid) else None


def quantised_remarks(tensors: Mapping[str, Tensor | None]) -> tuple[str, ...]:
    """What to say of quantised tensors among those that were read."""
    names = [name for name, tensor in tensors.items() if isinstance(tensor, Dequantised)]
    if not names:
        return ()
    return (
        f"quantised by torchao, and read as the weights that its dequantize() gives: {listed(names)}",
    )
