"""Cuts planned files into units: what is digested, journaled, and divided among ranks. Pure arithmetic.

A unit is the tensor data of one file between two neighbouring multiples of :attr:`Units.nbytes`, counted
from the start of the *file*: so a border between two units is a whole number of file-system pages, and
two machines that write neighbouring units of a large file write no page in common. A unit's pieces are
the parts of tensors in it, in the order in which they lie; each piece has a digest, and those of a tensor
give its own. Sizes and borders depend on the plan alone, so digests do not depend on who wrote what.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import xxhash

from ckpt_tools.tensors.gather import Slice
from ckpt_tools.writing.layout import Plan, PlannedFile, Slot

# Pages of a shared file system are written whole: this is more than any of them, and NFS's largest write.
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
        slices: what fills it.
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
        nbytes: bytes of a unit: a power of two from 64 B to 1 MiB, small enough that even a small plan
            has tens of thousands, so that dividing them evenly divides the bytes evenly.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        nbytes = _SMALLEST
        while nbytes < PAGES and nbytes * _FEWEST < plan.tensor_bytes:
            nbytes *= 2
        self.nbytes = nbytes
        counts = [_units_of(file, nbytes) for file in plan.files]
        self._bases = [0, *accumulate(counts)]
        self._data = [0, *accumulate(file.size - len(file.header) for file in plan.files)]
        self._offsets = [[slot.offset for slot in file.slots] for file in plan.files]

    def __len__(self) -> int:
        return self._bases[-1]

    def span(self, unit: int) -> tuple[int, int, int]:
        """Index of the unit's file, its first byte there and the byte after its last."""
        index = bisect_right(self._bases, unit) - 1
        file = self.plan.files[index]
        number = unit - self._bases[index] + len(file.header) // self.nbytes
        start = max(number * self.nbytes, len(file.header))
        return index, start, min((number + 1) * self.nbytes, file.size)

    def share(self, rank: int, machines: Sequence[int]) -> range:
        """The units that one of several ranks writes: consecutive, and as many bytes as any other's.

        The borders of even shares lie within a unit, and are moved to its start; those between ranks of
        two machines on to the next multiple of 1 MiB of the file, or to the next file.

        Args:
            rank: whose share.
            machines: number of the machine that each rank runs on.
        """
        return range(self._border(rank, machines), self._border(rank + 1, machines))

    def _border(self, rank: int, machines: Sequence[int]) -> int:
        if rank == len(machines):
            return len(self)
        first = rank
        while first and machines[first - 1] == machines[rank]:
            first -= 1
        # In a small plan the machine's own border may have moved beyond an even share of its first ranks.
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
            # The next page's first unit; that of the next file where this one ends before.
            number = -(-start // PAGES) * PAGES // self.nbytes
            header = len(self.plan.files[index].header)
            unit = min(self._bases[index] + number - header // self.nbytes, self._bases[index + 1])
        return unit

    def blocks(self, units: range) -> Iterator[Block]:
        """Consecutive units in the largest runs that a buffer of ``plan.block_bytes`` takes."""
        step = max(self.plan.block_bytes // self.nbytes, 1)
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

    def _slices(self, index: int, start: int, stop: int) -> tuple[Slice, ...]:
        slices = []
        for slot, low, high in self._parts(index, start, stop):
            itemsize = slot.tensor.dtype.itemsize
            first, last = (low - slot.offset) // itemsize, (high - slot.offset) // itemsize
            slices.append(Slice(slot.tensor, first, last, low - start))
        return tuple(slices)

    def _parts(self, index: int, start: int, stop: int) -> Iterator[tuple[Slot, int, int]]:
        """The tensors in bytes ``[start, stop)`` of a file, and which of its bytes they take."""
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
        """The same, cut at the borders of units."""
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

        That of a tensor's one piece, or of the digests of its pieces one after the other.

        Args:
            digests: of every unit, what :meth:`digests` gave.
        """
        pieces: dict[str, bytearray] = {name: bytearray() for name in self.plan.tensors}
        for index, file in enumerate(self.plan.files):
            header = len(file.header)
            shift = self._bases[index] - header // self.nbytes
            before, at = -1, 0
            for slot, low, _ in self._pieces(index, header, file.size):
                unit = low // self.nbytes + shift
                before, at = unit, at + DIGEST_BYTES if unit == before else 0
                pieces[slot.name] += digests[unit][at : at + DIGEST_BYTES]
        return {name: _joined(found).hex() for name, found in pieces.items()}


def _joined(pieces: bytearray) -> bytes:
    return bytes(pieces) if len(pieces) == DIGEST_BYTES else xxhash.xxh3_128_digest(bytes(pieces))


def _units_of(file: PlannedFile, nbytes: int) -> int:
    first = len(file.header) // nbytes
    return -(-file.size // nbytes) - first if file.size > len(file.header) else 0
