"""Owns the division of planned files into units, which are digested, journaled, and divided among ranks.

A unit is the tensor data of one file between two neighbouring multiples of :attr:`Units.nbytes`, counted
from the start of the *file*. So a border between two units of a large file is a page border, and two machines
that write neighbouring units write no common page. A unit's pieces are the parts of tensors in it, in the
order of the file. Each piece has a digest, and the digests of a tensor's pieces give the tensor's digest.
Sizes and borders depend on the plan alone, so digests do not depend on the ranks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import xxhash

from ckpt_tools.storage.places import Requests
from ckpt_tools.tensors.requests import Slice
from ckpt_tools.writing.layout import Plan, PlannedFile, Slot

# A shared file system writes whole pages. This is larger than any page, and NFS's largest write.
PAGES = 1 << 20
_FEWEST = 1 << 15
_SMALLEST = 64
DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Block:
    """A run of consecutive units of one file, and the slices of tensors that fill it.

    Attributes:
        file: index of the file in the plan.
        offset: its first byte in the file.
        nbytes: bytes of the run.
        slices: the slices that fill it.
        first, last: its units, ``last`` not included.
    """

    file: int
    offset: int
    nbytes: int
    slices: tuple[Slice, ...]
    first: int
    last: int


class Units:
    """The units of a plan, numbered from 0 through all files.

    Args:
        plan: the layout.

    Attributes:
        plan: the layout.
        nbytes: bytes of a unit: a power of two from 64 B to 1 MiB. Even a small plan has tens of thousands
            of units, so equal shares of units are nearly equal shares of bytes.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        nbytes = _SMALLEST
        while nbytes < PAGES and nbytes * _FEWEST < plan.tensor_bytes:
            nbytes *= 2
        self.nbytes = nbytes
        counts = [_units_of(file, nbytes) for file in plan.files]
        self._bases = [0, *accumulate(counts)]
        self._data = [0, *accumulate(file.end - len(file.header) for file in plan.files)]
        self._offsets = [[slot.offset for slot in file.slots] for file in plan.files]

    def __len__(self) -> int:
        return self._bases[-1]

    def span(self, unit: int) -> tuple[int, int, int]:
        """Index of the unit's file, the unit's first byte in it, and the byte after its last."""
        index = bisect_right(self._bases, unit) - 1
        file = self.plan.files[index]
        number = unit - self._bases[index] + len(file.header) // self.nbytes
        start = max(number * self.nbytes, len(file.header))
        return index, start, min((number + 1) * self.nbytes, file.end)

    def share(self, rank: int, machines: Sequence[int]) -> range:
        """The units that one of several ranks writes: consecutive, with the same number of bytes.

        A border within a unit moves to the start of the unit. A border between two machines moves to the next
        multiple of 1 MiB of the file, or to the next file.

        Args:
            rank: the rank.
            machines: number of the machine that each rank runs on.
        """
        return range(self._border(rank, machines), self._border(rank + 1, machines))

    def _border(self, rank: int, machines: Sequence[int]) -> int:
        if rank == len(machines):
            return len(self)
        first = rank
        while first and machines[first - 1] == machines[rank]:
            first -= 1
        # In a small plan, the border of the machine can move beyond the shares of its first ranks.
        even = self._unit_at(self._data[-1] * rank // len(machines))
        return max(even, self._on_a_page(self._unit_at(self._data[-1] * first // len(machines))))

    def _unit_at(self, byte: int) -> int:
        """The unit with this byte of all tensor data."""
        if byte == self._data[-1]:
            return len(self)
        index = bisect_right(self._data, byte) - 1
        header = len(self.plan.files[index].header)
        offset = header + byte - self._data[index]
        return self._bases[index] + offset // self.nbytes - header // self.nbytes

    def _on_a_page(self, unit: int) -> int:
        """The first unit from this one on that begins a page, or a file."""
        while unit < len(self):
            index, start, _ = self.span(unit)
            if start % PAGES == 0 or unit == self._bases[index]:
                break
            # The first unit of the next page, or of the next file if this file ends first.
            number = -(-start // PAGES) * PAGES // self.nbytes
            header = len(self.plan.files[index].header)
            unit = min(self._bases[index] + number - header // self.nbytes, self._bases[index + 1])
        return unit

    def by_file(self, units: range) -> Iterator[tuple[int, range]]:
        """Index of each file with some of these units, and those."""
        first = units.start
        while first < units.stop:
            index = bisect_right(self._bases, first) - 1
            last = min(self._bases[index + 1], units.stop)
            yield index, range(first, last)
            first = last

    def blocks(self, units: range, block_bytes: int | None = None) -> Iterator[Block]:
        """Consecutive units in the largest runs that fit in a buffer of ``block_bytes``."""
        step = max((block_bytes or self.block_bytes) // self.nbytes, 1)
        first = units.start
        while first < units.stop:
            index, start, _ = self.span(first)
            last = min(first + step, units.stop, self._bases[index + 1])
            stop = self.span(last - 1)[2]
            yield Block(index, start, stop - start, self._slices(index, start, stop), first, last)
            first = last

    @property
    def block_bytes(self) -> int:
        """Bytes of the largest block."""
        return max(self.plan.block_bytes // self.nbytes, 1) * self.nbytes

    def block_bytes_for(self, requests: Requests) -> int:
        """Bytes of the largest block, of sources that are read by such requests."""
        if not requests.block_bytes:
            return self.block_bytes
        wanted = max(requests.block_bytes, self.block_bytes)
        return min(wanted, -(-self.plan.tensor_bytes // self.nbytes) * self.nbytes) or self.nbytes

    def _slices(self, index: int, start: int, stop: int) -> tuple[Slice, ...]:
        slices = []
        for slot, low, high in self._parts(index, start, stop):
            itemsize = slot.tensor.dtype.itemsize
            first, last = (low - slot.offset) // itemsize, (high - slot.offset) // itemsize
            slices.append(Slice(slot.tensor, first, last, low - start))
        return tuple(slices)

    def _parts(self, index: int, start: int, stop: int) -> Iterator[tuple[Slot, int, int]]:
        """The tensors in bytes ``[start, stop)`` of a file, with their first and last byte."""
        slots = self.plan.files[index].slots
        at = bisect_right(self._offsets[index], start) - 1
        for position in range(max(at, 0), len(slots)):
            slot = slots[position]
            if slot.offset >= stop:
                return
            low, high = max(slot.offset, start), min(slot.end, stop)
            if low < high:
                yield slot, low, high

    def _pieces(self, index: int, start: int, stop: int) -> Iterator[tuple[Slot, int, int]]:
        """The same parts, cut at the borders of units."""
        for slot, low, high in self._parts(index, start, stop):
            while low < high:
                border = min(low - low % self.nbytes + self.nbytes, high)
                yield slot, low, border
                low = border

    def digests(self, block: Block, data: memoryview) -> list[bytes]:
        """For each unit of a block, the digests of its pieces, one after the other."""
        found = [b""] * (block.last - block.first)
        start = block.offset
        for _, low, high in self._pieces(block.file, start, start + block.nbytes):
            number = low // self.nbytes - start // self.nbytes
            found[number] += xxhash.xxh3_128_digest(data[low - start : high - start])
        return found

    def tensor_digests(self, digests: Mapping[int, bytes]) -> dict[str, str]:
        """The digest of each tensor, in hexadecimal.

        It is the digest of the only piece, or of the joined digests of all pieces.

        Args:
            digests: the result of :meth:`digests` for every unit.
        """
        without = _joined(b"")
        found = {slot.name: without for file in self.plan.files for slot in file.slots}
        for index, file in enumerate(self.plan.files):
            header = len(file.header)
            shift = self._bases[index] - header // self.nbytes
            before, at = -1, 0
            pieces = self._pieces(index, header, file.end)
            for name, parts in groupby(pieces, key=lambda piece: piece[0].name):
                joined = bytearray()
                for _, low, _ in parts:
                    unit = low // self.nbytes + shift
                    before, at = unit, at + DIGEST_BYTES if unit == before else 0
                    joined += digests[unit][at : at + DIGEST_BYTES]
                found[name] = _joined(joined)
        return found


def _joined(pieces: bytes | bytearray) -> str:
    whole = bytes(pieces)
    return (whole if len(whole) == DIGEST_BYTES else xxhash.xxh3_128_digest(whole)).hex()


def _units_of(file: PlannedFile, nbytes: int) -> int:
    first = len(file.header) // nbytes
    return -(-file.end // nbytes) - first if file.end > len(file.header) else 0
