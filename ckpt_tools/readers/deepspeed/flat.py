"""Flat vectors of masters: cutting tensors out of one, and finding out which tensors lie in it.

A vector lies in one file or, as partitions, in several. Usually its order is recorded. Where it is not,
or not faithfully, :func:`match_by_value` proposes one: a stretch is given a name only where the masters,
cast, begin and end as the module's weight of that name does. A proposal is no proof; whoever uses one
has the rest compared in full. Knows vectors and weights; knows no stage and no file name.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.readers.containers.restricted_pickle import TensorRef
from ckpt_tools.storage.pool import read_at
from ckpt_tools.tensors.catalogue import FlatRange, Fragment, Shape, Stored
from ckpt_tools.tensors.dtypes import BFLOAT16, FLOAT16, FLOAT32, DType

_SAMPLE = 64
_CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}


class FlatVector:
    """One vector as the parts that hold it, one after the other.

    Args:
        refs: the parts, each a contiguous tensor.
        lengths: how many elements of each count; the rest is padding.

    Raises:
        DamagedCheckpoint: the parts differ in dtype.
    """

    def __init__(self, refs: Sequence[TensorRef], lengths: Sequence[int]) -> None:
        self.dtype = next((r.dtype for r in refs if r.numel), refs[0].dtype)
        self._files = [ref.storage.path for ref in refs]
        self._offsets = [ref.byte_offset if ref.numel else 0 for ref in refs]
        self.starts = [0, *accumulate(lengths)]
        if any(ref.dtype != self.dtype for ref in refs if ref.numel):
            raise DamagedCheckpoint(
                "the ranks' partitions differ in dtype", path=self._files[0].parent
            )

    @property
    def numel(self) -> int:
        """Elements of the whole vector."""
        return self.starts[-1]

    def tensor(self, start: int, shape: Shape, name: str) -> Stored:
        """The tensor of this shape whose elements begin at ``start``; ``name`` is for errors."""
        stop = start + math.prod(shape)
        if stop > self.numel:
            raise DamagedCheckpoint(
                f"the partitions end at element {self.numel:,}, before it ends at {stop:,}",
                path=self._files[-1],
                tensor=name,
                hint="A rank's file is of another save, or was cut short.",
            )
        return Stored(self.dtype, shape, list(self._cut(start, stop)))

    def _cut(self, start: int, stop: int) -> Iterator[Fragment]:
        rank, begin = max(bisect_right(self.starts, start) - 1, 0), start
        while start < stop:
            upto = min(stop, self.starts[rank + 1])
            if upto > start:
                inside = (start - self.starts[rank]) * self.dtype.itemsize
                region = FlatRange(start - begin, upto - begin)
                yield Fragment(self._files[rank], self._offsets[rank] + inside, region)
            start, rank = upto, rank + 1

    def check_used(self, end: int, world_size: int) -> None:
        """Nothing but alignment padding (below ``2 * world_size``) lies after the last parameter."""
        slack = self.numel - end
        if slack >= 2 * world_size:
            raise DamagedCheckpoint(
                f"the partitions hold {slack:,} elements more than the parameters need",
                path=self._files[-1],
                hint="The model file is of another save than the optimizer files.",
            )

    def bits(self, start: int, count: int, dtype: DType) -> list[int]:
        """A few elements, cast to ``dtype``, as the integers of their bits; none if it cannot be.

        Without torch, so that a look at a checkpoint stays quick.
        """
        data = b"".join(map(self._bytes_of, self._cut(start, start + count)))
        if (self.dtype, dtype) == (FLOAT32, FLOAT16):
            data = b"".join(map(_half, struct.unpack(f"<{count}f", data)))
        elif (self.dtype, dtype) == (FLOAT32, BFLOAT16):
            words = struct.unpack(f"<{count}I", data)
            return [(word + 0x7FFF + (word >> 16 & 1)) >> 16 for word in words]
        elif dtype != self.dtype:
            return []
        return list(struct.unpack(f"<{count}{_CODES[dtype.itemsize]}", data))

    def _bytes_of(self, fragment: Fragment) -> bytes:
        return read_at(fragment.file, fragment.offset, fragment.region.numel * self.dtype.itemsize)


def named_weights(content: Mapping[str, Any]) -> dict[str, TensorRef]:
    """The floating tensors of a model file's ``module`` that are neither buffers nor second names."""
    left_out = {*(content.get("buffer_names") or ()), *(content.get("shared_params") or ())}
    return {
        name: ref
        for name, ref in content["module"].items()
        if isinstance(ref, TensorRef) and name not in left_out and ref.dtype.is_floating
    }


def match_by_value(
    vectors: Sequence[FlatVector], weights: Mapping[str, TensorRef], *, slack: int = 1
) -> dict[str, Stored] | None:
    """Propose which weights lie in the vectors, and where.

    Args:
        vectors: the masters, each vector wholly taken up by weights.
        weights: the 16-bit weights; where several fit, the first that is still free is taken.
        slack: fewer elements than this may be left at the end of a vector.

    Returns:
        The masters by name, or None where a stretch fits no weight.
    """
    free = dict(weights)
    masters: dict[str, Stored] = {}
    for vector in vectors:
        position = 0
        while position < vector.numel:
            name = next(_fitting(vector, position, free), None)
            if name is None:
                if vector.numel - position < slack:
                    break
                return None
            ref = free.pop(name)
            masters[name] = vector.tensor(position, ref.shape, name)
            position += ref.numel
    return masters


def _fitting(vector: FlatVector, position: int, free: Mapping[str, TensorRef]) -> Iterator[str]:
    for name, ref in free.items():
        if ref.numel and position + ref.numel <= vector.numel and ref.is_contiguous:
            weight = FlatVector([ref], [ref.numel])
            if all(
                vector.bits(position + low, count, ref.dtype) == weight.bits(low, count, ref.dtype)
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
