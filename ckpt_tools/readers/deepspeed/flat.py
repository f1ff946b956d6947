"""Owns flat vectors of masters: cutting tensors out of a vector, and finding the order of its tensors.

A vector is in one file or, as partitions, in several. The order is usually recorded. If it is missing or not
reliable, :func:`match_by_value` proposes one: a stretch gets the name of a weight only if its first and last
elements, cast, equal those of the weight. This is not a proof, so the caller must compare all elements.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from ckpt_tools.errors import DamagedCheckpoint, listed
from ckpt_tools.readers.containers.restricted_pickle import TensorRef
from ckpt_tools.storage.reading import read_at
from ckpt_tools.tensors.catalogue import FlatRange, Fragment, Shape, Stored
from ckpt_tools.tensors.dtypes import BFLOAT16, FLOAT16, FLOAT32, DType

# Elements that are compared at each end of a weight.
_SAMPLE = 64
# Comparisons with all weights of one size. A model has a few dozen sizes.
_MOST_COMPARED, _COMPARED_A_WEIGHT = 10_000, 64
_CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}
_Bits = tuple[int, ...]


class FlatVector:
    """One vector that consists of parts, one after the other.

    Args:
        refs: the parts, each a contiguous tensor.
        lengths: the number of elements of each part that count; the rest is padding.

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
        """Number of elements of the whole vector."""
        return self.starts[-1]

    def tensor(self, start: int, shape: Shape, name: str) -> Stored:
        """The tensor of the given shape whose elements start at ``start``; ``name`` is for errors."""
        stop = start + math.prod(shape)
        if stop > self.numel:
            raise DamagedCheckpoint(
                f"it ends at element {stop:,}, but the partitions end at element {self.numel:,}",
                path=self._suspect(),
                tensor=name,
                hint=self._togetherness(
                    "The file of a rank belongs to another save, or is truncated."
                ),
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
        """Check that only alignment padding (below ``2 * world_size``) follows the last parameter."""
        slack = self.numel - end
        if slack >= 2 * world_size:
            raise DamagedCheckpoint(
                f"the partitions hold {slack:,} elements more than the parameters need",
                path=self._suspect(),
                hint=self._togetherness(
                    "The model file and the optimizer files belong to different saves."
                ),
            )

    def _lengths(self) -> list[int]:
        return [stop - start for start, stop in pairwise(self.starts)]

    def _odd(self) -> int | None:
        """The one rank whose partition has another length than all others; the last may be shorter."""
        lengths = self._lengths()
        common, count = Counter(lengths).most_common(1)[0]
        last = len(lengths) - 1
        odd = [
            rank
            for rank, length in enumerate(lengths)
            if length != common and not (rank == last and length < common)
        ]
        return odd[0] if len(odd) == 1 and count > 1 else None

    def _suspect(self) -> Path:
        """The file whose length is wrong; the directory where that may be any file."""
        if len(self._files) == 1:
            return self._files[0]
        odd = self._odd()
        return self._files[0].parent if odd is None else self._files[odd]

    def _togetherness(self, otherwise: str) -> str:
        """The hint that says which files belong together, where their lengths show it."""
        odd = self._odd()
        if odd is None:
            return otherwise
        lengths = self._lengths()
        common = Counter(lengths).most_common(1)[0][0]
        others = listed([path.name for rank, path in enumerate(self._files) if rank != odd], 4)
        return (
            f"Its partition has {lengths[odd]:,} elements, those of the other ranks have {common:,}: it "
            f"belongs to another save. These files belong together: {others}."
        )

    def bits(self, start: int, count: int, dtype: DType) -> list[int]:
        """A few elements, cast to ``dtype``, as the integers of their bits; empty for an unknown cast.

        This is done without torch, whose import takes seconds.
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
    """The floating tensors of a model file's ``module``, without buffers and second names."""
    left_out = {*(content.get("buffer_names") or ()), *(content.get("shared_params") or ())}
    return {
        name: ref
        for name, ref in content["module"].items()
        if isinstance(ref, TensorRef) and name not in left_out and ref.dtype.is_floating
    }


def match_by_value(
    vectors: Sequence[FlatVector], weights: Mapping[str, TensorRef], *, slack: int = 1
) -> dict[str, Stored] | None:
    """Propose the order of the weights in the vectors.

    Args:
        vectors: the masters; weights fill each vector completely.
        weights: the 16-bit weights; if several fit, the first unused one is taken.
        slack: the number of elements left at the end of a vector must be below this.

    Returns:
        The masters by name, or None if a stretch fits no weight, or if the weights have many more sizes than
        those of a model.
    """
    unused = _Unused(weights)
    masters: dict[str, Stored] = {}
    for vector in vectors:
        position = 0
        while position < vector.numel:
            name = unused.first_fitting(vector, position)
            if name is None:
                if vector.numel - position < slack:
                    break
                return None
            ref = unused.take(name)
            masters[name] = vector.tensor(position, ref.shape, name)
            position += ref.numel
    return masters


class _Unused:
    """The weights that no stretch has yet.

    A stretch is compared with the first of them, and then with all of one size at once. Comparing it with
    each takes the square of their number.
    """

    def __init__(self, weights: Mapping[str, TensorRef]) -> None:
        self._refs = {n: ref for n, ref in weights.items() if ref.numel and ref.is_contiguous}
        self._order = {name: index for index, name in enumerate(self._refs)}
        self._left = _MOST_COMPARED + _COMPARED_A_WEIGHT * len(self._refs)

    def take(self, name: str) -> TensorRef:
        """The weight of this name, which is used now."""
        return self._refs.pop(name)

    def first_fitting(self, vector: FlatVector, position: int) -> str | None:
        """The first weight whose ends equal those of a stretch; None if there is none, or after much work."""
        first = next(iter(self._refs), None)
        if first is not None and self._fits(first, vector, position):
            return first
        heads: dict[DType, list[int]] = {}
        found: list[str] = []
        for (dtype, numel), by_ends in self._by_size.items():
            if position + numel > vector.numel:
                continue
            self._left -= 1
            if self._left < 0:
                return None
            if dtype not in heads:
                length = min(_SAMPLE, vector.numel - position)
                heads[dtype] = vector.bits(position, length, dtype)
            by_tail = by_ends.get((*heads[dtype][: min(numel, _SAMPLE)],))
            if by_tail is not None:
                names = by_tail.get(_tail(vector, position + numel, numel, dtype), deque())
                while names and names[0] not in self._refs:
                    names.popleft()
                found += [*names][:1]
        return min(found, key=self._order.__getitem__, default=None)

    def _fits(self, name: str, vector: FlatVector, position: int) -> bool:
        ref = self._refs[name]
        stop = position + ref.numel
        return stop <= vector.numel and _ends(ref) == (
            (*vector.bits(position, min(ref.numel, _SAMPLE), ref.dtype),),
            _tail(vector, stop, ref.numel, ref.dtype),
        )

    @cached_property
    def _by_size(self) -> dict[tuple[DType, int], dict[_Bits, dict[_Bits, deque[str]]]]:
        """The names of the weights by dtype and size, and by their first and last elements."""
        found: dict[tuple[DType, int], dict[_Bits, dict[_Bits, deque[str]]]] = {}
        for name, ref in self._refs.items():
            head, tail = _ends(ref)
            by_tail = found.setdefault((ref.dtype, ref.numel), {}).setdefault(head, {})
            by_tail.setdefault(tail, deque()).append(name)
        return found


def _ends(ref: TensorRef) -> tuple[_Bits, _Bits]:
    """The first and the last elements of a weight."""
    vector = FlatVector([ref], [ref.numel])
    head = vector.bits(0, min(ref.numel, _SAMPLE), ref.dtype)
    return (*head,), _tail(vector, ref.numel, ref.numel, ref.dtype)


def _tail(vector: FlatVector, stop: int, numel: int, dtype: DType) -> _Bits:
    """The last elements of a stretch of this length."""
    length = min(numel, _SAMPLE)
    return (*vector.bits(stop - length, length, dtype),)


def _half(value: float) -> bytes:
    try:
        return struct.pack("<e", value)
    except OverflowError:
        return struct.pack("<e", math.copysign(math.inf, value))
