"""Masters of DeepSpeed without ZeRO (stage 0): all in the model file, and without names.

The fused optimizers keep one flat fp32 vector per parameter group, the unfused one a list of tensors per
group, both in the order of the optimizer's own groups, which is usually, but not necessarily, that of the
module. So an order is proposed, and accepted only where the masters, cast, begin and end as the module's
weights of that name do; the caller is told to compare the rest in full. Where no order fits, the
masters are left out, and said to be.

Source: ``deepspeed/runtime/fp16/fused_optimizer.py`` and ``unfused_optimizer.py`` (``state_dict``).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt_tools.catalogue import FlatRange, Fragment, Shape, Stored
from ckpt_tools.dtypes import BFLOAT16, FLOAT16, FLOAT32, DType
from ckpt_tools.readers.restricted_pickle import TensorRef
from ckpt_tools.readers.zero_shards import ShardSet

_SAMPLE = 64
_CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}


@dataclass(frozen=True)
class _Run:
    """Masters that follow each other in one piece of the file; all of one group, or one tensor."""

    path: Path
    offset: int
    dtype: DType
    numel: int

    def part(self, start: int, shape: Shape) -> Stored:
        """The tensor of this shape that begins at element ``start``."""
        numel = math.prod(shape)
        at = self.offset + start * self.dtype.itemsize
        fragments = [Fragment(self.path, at, FlatRange(0, numel))] if numel else []
        return Stored(self.dtype, shape, fragments)

    def bits(self, start: int, count: int, dtype: DType) -> list[int]:
        """A few elements, cast to ``dtype``, as the integers of their bits."""
        with self.path.open("rb", buffering=0) as stream:
            stream.seek(self.offset + start * self.dtype.itemsize)
            data = stream.read(count * self.dtype.itemsize)
        if dtype != self.dtype and (self.dtype, dtype) == (FLOAT32, FLOAT16):
            floats = struct.unpack(f"<{count}f", data)
            data = b"".join(_half(value) for value in floats)
        elif dtype != self.dtype and (self.dtype, dtype) == (FLOAT32, BFLOAT16):
            words = struct.unpack(f"<{count}I", data)
            return [(word + 0x7FFF + (word >> 16 & 1)) >> 16 for word in words]
        elif dtype != self.dtype:
            return []
        return list(struct.unpack(f"<{count}{_CODES[dtype.itemsize]}", data))


def unpartitioned_masters(shards: ShardSet) -> tuple[dict[str, Stored], list[str]]:
    """Masters of a stage 0 checkpoint by name, and why they must be compared with the module in full.

    Both are empty where the optimizer kept no masters (fp32 training), or none that can be named.
    """
    optimizer = shards.first.get("optimizer")
    if not isinstance(optimizer, dict):
        return {}, []
    runs = [
        _Run(Path(ref.storage.path), ref.byte_offset if ref.numel else 0, ref.dtype, ref.numel)
        for ref in _masters_in_order(optimizer)
    ]
    if not any(run.numel for run in runs):
        return {}, []
    buffers = set(shards.first.get("buffer_names") or ())
    aliases = set(shards.first.get("shared_params") or ())
    module = {
        name: ref
        for name, ref in shards.first.content["module"].items()
        if isinstance(ref, TensorRef) and name not in buffers | aliases and ref.dtype.is_floating
    }
    masters = _match(runs, module)
    if masters is None:
        return {}, []
    return masters, ["masters of stage 0 carry no names"]


def _masters_in_order(optimizer: dict[str, object]) -> list[TensorRef]:
    flat, nested = optimizer.get("fp32_groups_flat"), optimizer.get("fp32_groups")
    groups = flat if isinstance(flat, list) else nested if isinstance(nested, list) else []
    members = [m for group in groups for m in (group if isinstance(group, list) else [group])]
    return [member for member in members if isinstance(member, TensorRef)]


def _match(runs: Sequence[_Run], module: dict[str, TensorRef]) -> dict[str, Stored] | None:
    """Give each stretch of the runs the first name still free that it fits; None if one fits none."""
    free = dict(module)
    masters: dict[str, Stored] = {}
    for run in runs:
        position = 0
        while position < run.numel:
            name = next(_fitting(run, position, free), None)
            if name is None:
                return None
            ref = free.pop(name)
            masters[name] = run.part(position, ref.shape)
            position += ref.numel
    return masters


def _fitting(run: _Run, position: int, free: dict[str, TensorRef]) -> Iterator[str]:
    for name, ref in free.items():
        stop = position + ref.numel
        if ref.numel and stop <= run.numel and ref.is_contiguous:
            weight = _Run(Path(ref.storage.path), ref.byte_offset, ref.dtype, ref.numel)
            if all(
                run.bits(position + low, count, ref.dtype) == weight.bits(low, count, ref.dtype)
                for low, count in _samples(ref.numel)
            ):
                yield name


def _samples(numel: int) -> Sequence[tuple[int, int]]:
    """First element and length of each stretch that is compared."""
    if numel <= 2 * _SAMPLE:
        return [(0, numel)]
    return [(0, _SAMPLE), (numel - _SAMPLE, _SAMPLE)]


def _half(value: float) -> bytes:
    try:
        return struct.pack("<e", value)
    except OverflowError:
        return struct.pack("<e", math.copysign(math.inf, value))
