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

from ckpt_tools.gather import Slice
from ckpt_tools.plan import Plan, PlannedFile, Slot

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

        Args:
            rank: whose share.
            machines: number of the machine that each rank runs on. Between ranks of two machines the
                border lies on a multiple of 1 MiB of its file.
        """
        return range(self._border(rank, machines), self._border(rank + 1, machines))

    def _border(self, rank: int, machines: Sequence[int]) -> int:
        unit = len(self) * rank // len(machines)
        if not 0 < rank < len(machines) or machines[rank - 1] == machines[rank]:
            return unit
        while unit < len(self):
            index, start, _ = self.span(unit)
            if start % PAGES == 0 or unit == self._bases[index]:
                break
            # The next page's first unit; that of the next file where this one ends before.
            number = -(-start // PAGES) * PAGES // self.nbytes
            header = len(self.plan.files[index].header)
            unit = min(
                self._bases[index] + number - header // self.nbytes, self._bases[index + 1]
            )
        return unit

    def blocks(self, units: range) -> Iterator[Block]:
        """Consecutive units in the largest runs that a buffer of ``plan.block_bytes`` takes."""
        step = max(self.plan.block_bytes // self.nbytes, 1)
        first = units.start
        while first < units.stop:
            index, start, _ = self.span(first)
            # Blocks end at multiples of their size, so that neighbours' reads are of whole runs too.
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

    def digests(self, block: Block, data: memoryview) -> list[bytes]:
        """For each unit of a block, the digests of its pieces, one after the other."""
        found = []
        for unit in range(block.first, block.last):
            index, start, stop = self.span(unit)
            parts = self._parts(index, start, stop)
            spans = ((low - block.offset, high - block.offset) for _, low, high in parts)
            found.append(b"".join(xxhash.xxh3_128_digest(data[a:b]) for a, b in spans))
        return found

    def tensor_digests(self, digests: Mapping[int, bytes]) -> dict[str, str]:
        """The digest of each tensor, in hexadecimal.

        That of a tensor's one piece, or of the digests of its pieces one after the other.

        Args:
            digests: of every unit, what :meth:`digests` gave.
        """
        pieces: dict[str, bytearray] = {name: bytearray() for name in self.plan.tensors}
        for unit in range(len(self)):
            index, start, stop = self.span(unit)
            for number, (slot, _, _) in enumerate(self._parts(index, start, stop)):
                at = number * DIGEST_BYTES
                pieces[slot.name] += digests[unit][at : at + DIGEST_BYTES]
        return {name: _joined(found).hex() for name, found in pieces.items()}


def _joined(pieces: bytearray) -> bytes:
    return bytes(pieces) if len(pieces) == DIGEST_BYTES else xxhash.xxh3_128_digest(bytes(pieces))


def _units_of(file: PlannedFile, nbytes: int) -> int:
    first = len(file.header) // nbytes
    return -(-file.size // nbytes) - first if file.size > len(file.header) else 0
