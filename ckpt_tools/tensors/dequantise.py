"""Weights that a quantiser stored, as the values that its own dequantisation makes of them.

Owns the arithmetic, window by window; :mod:`ckpt_tools.transforms.quantised` finds the tensors, and
:mod:`ckpt_tools.readers.containers.quantised_classes` those of torchao's classes. Every scheme
takes the same steps in the same dtypes as the library that wrote the tensors, so the bits are the same:

- ``bitsandbytes-4bit``: ``table[code] * absmax[block]`` in fp32, rounded to the dtype of the quant state.
  With double quantisation, ``absmax`` is ``nested_map[code] * nested_absmax[block]`` in fp32, rounded to the
  nested dtype, plus the offset in that dtype.
- ``bitsandbytes-8bit``: ``(code * SCB[row]) * 0.007874015718698502`` in fp32.
- ``scaled``: ``(code - zero point) * scale`` in the dtype ``within``; one scale a block of rows and columns.
  torchao multiplies in another dtype, ``times``.
- ``mxfp4``: ``value[code] * 2 ** (exponent - 127)`` in fp32, rounded to bf16.

Sources: ``bitsandbytes/backends/default/ops.py`` and ``functional.py`` 0.50,
``compressed_tensors/quantization/lifecycle/forward_helpers.py`` 0.20,
``transformers/integrations/finegrained_fp8.py`` and ``mxfp4.py`` 5,
``torchao/quantization/quant_primitives.py`` 0.18. (The kernel of bitsandbytes 0.50 for
processors with AVX-512 differs from its other implementations where a row is no multiple of a block.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckpt_tools.tensors.catalogue import Computed, Shape, Tensor, Values
from ckpt_tools.tensors.dtypes import BY_NAME, DType

if TYPE_CHECKING:
    import torch

Setting = int | float | str
# The values of the sixteen codes of a four-bit float with two bits of exponent (E2M1).
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MXFP4_BLOCK = 32
_SIZES = ("block", "nested_block", "rows", "columns")
_DTYPES = ("within", "times", "nested_dtype")
# The values of the sixteen codes of bitsandbytes, as fp32 has them (``_get_4bit_code``).
_4BIT_TABLES = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (
        *(0.0, 0.0052083334885537624, 0.6666666865348816, 1.0),
        *(0.3333333432674408, 0.5, 0.1666666716337204, 0.25),
        *(-0.0, -0.0052083334885537624, -0.6666666865348816, -1.0),
        *(-0.3333333432674408, -0.5, -0.1666666716337204, -0.25),
    ),
}


@dataclass(frozen=True, repr=False, eq=False)
class Dequantised(Computed):
    """A weight as its quantiser's library dequantises it.

    Attributes:
        scheme: how its elements are computed.
        parts: the tensors that hold it, by their role.
        settings: numbers and names that the scheme needs.
        shape: sizes of the weight.
        dtype: element type that the library gives it.
    """

    scheme: str
    parts: Mapping[str, Tensor]
    settings: Mapping[str, Setting]
    shape: Shape
    dtype: DType

    @property
    def pieces(self) -> int:
        """Number of runs of its tensors."""
        return sum(part.pieces for part in self.parts.values())

    def compute(self, start: int, stop: int, values: Values) -> torch.Tensor:
        """The elements of the window."""
        return SCHEMES[self.scheme](self, start, stop, values).to(self.dtype.torch)

    def number(self, name: str) -> int:
        """A setting that is a whole number."""
        return int(self.settings[name])


def fits(tensor: Dequantised) -> bool:
    """Whether the sizes of the parts allow the computation."""
    parts, count = tensor.parts, math.prod(tensor.shape)
    sizes = [tensor.number(key) for key in _SIZES if key in tensor.settings]
    names = [str(tensor.settings[key]) for key in _DTYPES if key in tensor.settings]
    if any(size < 1 for size in sizes) or any(name not in BY_NAME for name in names):
        return False
    match tensor.scheme:
        case "bitsandbytes-4bit":
            blocks = -(-count // max(tensor.number("block"), 1))
            if tensor.settings["kind"] not in _4BIT_TABLES:
                return False
            held = parts["absmax"].numel, 2 * parts["codes"].nbytes
            nested = "nested_absmax" not in parts or (
                parts["nested_map"].numel == 256
                and parts["nested_absmax"].numel
                == -(-blocks // max(tensor.number("nested_block"), 1))
            )
            return nested and held == (blocks, count + count % 2)
        case "bitsandbytes-8bit":
            return (
                len(tensor.shape) == 2
                and parts["scale"].numel == tensor.shape[0]
                and (parts["codes"].shape == tensor.shape)
            )
        case "scaled":
            rows, columns = tensor.shape[-2:]
            grid = -(-rows // tensor.number("rows")) * -(-columns // tensor.number("columns"))
            stacked = math.prod(tensor.shape[:-2])
            return parts["codes"].shape == tensor.shape and all(
                parts[role].numel in (grid, grid * stacked)
                for role in ("scale", "zero_point")
                if role in parts
            )
        case "mxfp4":
            blocks = count // _MXFP4_BLOCK
            pair = parts["blocks"].numel, parts["scales"].numel
            return not tensor.shape[-1] % _MXFP4_BLOCK and pair == (count // 2, blocks)
    return False


def _bitsandbytes_4bit(tensor: Dequantised, start: int, stop: int, values: Values) -> torch.Tensor:
    import torch

    block, parts = tensor.number("block"), tensor.parts
    # The first element of a pair is in the high half of the byte.
    codes = _nibbles(parts["codes"], start, stop, values, high_first=True)
    first, last = start // block, (stop - 1) // block + 1
    absmax = values.window(parts["absmax"], first, last)
    if "nested_absmax" in parts:
        absmax = _nested(tensor, absmax, first, last, values)
    table = torch.tensor(_4BIT_TABLES[str(tensor.settings["kind"])])
    return table[codes] * absmax.float()[_blocks(start, stop, block) - first]


def _nested(
    tensor: Dequantised, codes: torch.Tensor, first: int, last: int, values: Values
) -> torch.Tensor:
    """The scales of blocks, which are quantised themselves."""
    block = tensor.number("nested_block")
    low = first // block
    scales = values.window(tensor.parts["nested_absmax"], low, (last - 1) // block + 1)
    found = values.whole(tensor.parts["nested_map"])[codes.int()]
    found *= scales[_blocks(first, last, block) - low]
    within = BY_NAME[str(tensor.settings["nested_dtype"])].torch
    return found.to(within).add_(float(tensor.settings["offset"]))


def _bitsandbytes_8bit(tensor: Dequantised, start: int, stop: int, values: Values) -> torch.Tensor:
    codes = values.window(tensor.parts["codes"], start, stop)
    width = tensor.shape[1]
    first = start // width
    scales = values.window(tensor.parts["scale"], first, (stop - 1) // width + 1)
    return codes * scales[_blocks(start, stop, width) - first] * 7.874015718698502e-3


def _scaled(tensor: Dequantised, start: int, stop: int, values: Values) -> torch.Tensor:
    within = BY_NAME[str(tensor.settings["within"])].torch
    times = BY_NAME[str(tensor.settings.get("times", tensor.settings["within"]))].torch
    codes = values.window(tensor.parts["codes"], start, stop).to(within)
    rows, columns = tensor.shape[-2:]
    by_rows, by_columns = tensor.number("rows"), tensor.number("columns")
    wide, high = -(-columns // by_columns), -(-rows // by_rows)
    flat = _blocks(start, stop, 1)
    row, column = flat // columns, flat % columns
    index = (row // rows) * (high * wide) + (row % rows) // by_rows * wide + column // by_columns

    def each(role: str, dtype: torch.dtype) -> torch.Tensor:
        found = values.whole(tensor.parts[role]).reshape(-1).to(dtype)
        # One grid may serve a whole stack of matrices.
        return found[index % len(found)]

    if "zero_point" in tensor.parts:
        codes = codes - each("zero_point", within)
    return codes.to(times) * each("scale", times)


def _mxfp4(tensor: Dequantised, start: int, stop: int, values: Values) -> torch.Tensor:
    import torch

    codes = _nibbles(tensor.parts["blocks"], start, stop, values, high_first=False)
    first, last = start // _MXFP4_BLOCK, (stop - 1) // _MXFP4_BLOCK + 1
    exponents = values.window(tensor.parts["scales"], first, last).int() - 127
    table = torch.tensor((*_E2M1, *(-value for value in _E2M1)))
    return torch.ldexp(table[codes], exponents[_blocks(start, stop, _MXFP4_BLOCK) - first])


def _nibbles(
    tensor: Tensor, start: int, stop: int, values: Values, *, high_first: bool
) -> torch.Tensor:
    """Half bytes ``[start, stop)`` of a tensor of any dtype, as indices."""
    import torch

    size = 2 * tensor.dtype.itemsize
    first, last = start // size, (stop - 1) // size + 1
    packed = values.window(tensor, first, last).view(torch.uint8)
    found = torch.empty(2 * len(packed), dtype=torch.int32)
    found[0::2], found[1::2] = packed >> 4, packed & 15
    if not high_first:
        found = found.view(-1, 2).flip(1).reshape(-1)
    return found[start - first * size : stop - first * size]


def _blocks(start: int, stop: int, size: int) -> torch.Tensor:
    """For each element of a window, the number of its block."""
    import torch

    return torch.arange(start, stop).div_(size, rounding_mode="floor")


SCHEMES: Mapping[str, Callable[[Dequantised, int, int, Values], torch.Tensor]] = {
    "bitsandbytes-4bit": _bitsandbytes_4bit,
    "bitsandbytes-8bit": _bitsandbytes_8bit,
    "scaled": _scaled,
    "mxfp4": _mxfp4,
}
