"""Owns the pass over the data: it reads bytes once and reports digests, NaN, infinity, zeros and constants.

:func:`scan` depends only on one piece of a file. Results of neighbouring pieces can be merged, so any thread
or rank can read any piece. Values are read as integers, in steps that fit in the processor's cache.

In every floating format here, the exponent bits are above the fraction bits. So without the sign, a larger
pattern is a larger value, and infinity and NaN are the largest patterns.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from ckpt_tools.storage.places import Readable, read_fully
from ckpt_tools.storage.reading import open_for_reading
from ckpt_tools.verification.container import Entry

BLOCK_BYTES = 2 << 20
# A step fits in the cache. A run of this many zero bytes is reported.
STEP_BYTES = 256 << 10
_LONGEST_ELEMENT = 8


class _Pattern(NamedTuple):
    """The bit patterns of a floating dtype.

    Attributes:
        integer: the unsigned integer of the same size.
        magnitude: the mask of all bits except the sign.
        infinity: the pattern of infinity; None if there is none.
        nan: the smallest pattern of a NaN.
        only: the one pattern of a NaN, where the larger ones are numbers.
    """

    integer: Any
    magnitude: int
    infinity: int | None
    nan: int
    only: int | None = None


_PATTERNS = {
    "F64": _Pattern(np.uint64, 2**63 - 1, 0x7FF << 52, (0x7FF << 52) + 1),
    "F32": _Pattern(np.uint32, 0x7FFF_FFFF, 0x7F80_0000, 0x7F80_0001),
    "C64": _Pattern(np.uint32, 0x7FFF_FFFF, 0x7F80_0000, 0x7F80_0001),
    "BF16": _Pattern(np.uint16, 0x7FFF, 0x7F80, 0x7F81),
    "F16": _Pattern(np.uint16, 0x7FFF, 0x7C00, 0x7C01),
    "F8_E5M2": _Pattern(np.uint8, 0x7F, 0x7C, 0x7D),
    "F8_E4M3": _Pattern(np.uint8, 0x7F, None, 0x7F),
    "F8_E8M0": _Pattern(np.uint8, 0xFF, None, 0xFF),
    # These have no negative zero; its pattern is the NaN.
    "F8_E4M3FNUZ": _Pattern(np.uint8, 0xFF, None, 0x80, only=0x80),
    "F8_E5M2FNUZ": _Pattern(np.uint8, 0xFF, None, 0x80, only=0x80),
}


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of one file.

    Attributes:
        file: its name, relative to the directory.
        start: the first byte.
        stop: the byte after the last.
        hashes: digests of a whole file, ``xxh3_128`` or ``sha256``.
    """

    file: str
    start: int
    stop: int
    hashes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.stop - self.start


@dataclass(slots=True)
class Summary:
    """The result for one tensor.

    Attributes:
        nans: number of NaN.
        infinities: number of infinite values.
        zero_steps: number of aligned runs of ``STEP_BYTES`` bytes that hold only zeros.
        largest: the largest pattern without the sign; 0 means that all values are zero.
        first: the bytes of the first value; empty if there is none.
        is_constant: whether all values have the same bytes.
        digests: the joined digests of the units.
    """

    nans: int = 0
    infinities: int = 0
    zero_steps: int = 0
    largest: int = 0
    first: bytes = b""
    is_constant: bool = True
    digests: bytearray = field(default_factory=bytearray)

    def merge(self, later: Summary) -> None:
        """Add the result of the bytes that follow."""
        self.nans += later.nans
        self.infinities += later.infinities
        self.zero_steps += later.zero_steps
        self.largest = max(self.largest, later.largest)
        if later.first:
            same = not self.first or self.first == later.first
            self.is_constant = self.is_constant and later.is_constant and same
            self.first = self.first or later.first
        self.digests += later.digests

    @property
    def digest(self) -> str:
        """The digest of the whole tensor, in hexadecimal.

        It is the digest of the only unit, or of the joined digests of all units.
        """
        if len(self.digests) == 16:
            return self.digests.hex()
        return xxhash.xxh3_128_hexdigest(bytes(self.digests))


@dataclass(frozen=True, slots=True)
class Seen:
    """The result of a piece.

    Attributes:
        tensors: the result of each tensor in it, by number in the list of entries.
        hashes: the requested digests, in hexadecimal.
        nbytes: bytes that were read.
    """

    tensors: Mapping[int, Summary]
    hashes: Mapping[str, str]
    nbytes: int


def scan(directory: Path, piece: Piece, entries: Sequence[Entry], unit_bytes: int | None) -> Seen:
    """Read a piece once.

    Args:
        directory: the directory of the file.
        piece: the piece.
        entries: the file's tensors, by ascending ``start``.
        unit_bytes: each digest covers the bytes of a tensor between multiples of this offset in the file;
            None for no digests.

    Raises:
        OSError: it cannot be read.
    """
    summaries: dict[int, Summary] = {}
    hashers = {name: _HASHERS[name]() for name in piece.hashes}
    done = at = 0
    with closing(open_for_reading(directory / piece.file)) as source:
        for start in range(piece.start, piece.stop, BLOCK_BYTES):
            stop = min(start + BLOCK_BYTES, piece.stop)
            # An element that begins in this block and ends in the next belongs to this block.
            view = _read(source, start, stop + _LONGEST_ELEMENT - 1)
            block = view[: stop - start]
            done += len(block)
            for hasher in hashers.values():
                hasher.update(block)
            while at < len(entries) and entries[at].stop <= start:
                at += 1
            for number, low, high in _parts(entries, at, start, start + len(block)):
                found = _look(view, start, entries[number], low, high)
                if unit_bytes is not None:
                    found.digests = _digests(view, start, low, high, unit_bytes)
                summaries.setdefault(number, Summary()).merge(found)
            if len(block) < stop - start:
                break
    return Seen(summaries, {name: h.hexdigest() for name, h in hashers.items()}, done)


_HASHERS: Mapping[str, Any] = {"sha256": hashlib.sha256, "xxh3_128": xxhash.xxh3_128}
_buffers = threading.local()


def _read(source: Readable, start: int, stop: int) -> memoryview:
    """The bytes, in a reused buffer of this thread; fewer at the end of the file."""
    if len(getattr(_buffers, "block", b"")) < stop - start:
        _buffers.block = bytearray(stop - start)
        _buffers.step = np.empty(STEP_BYTES, np.uint8)
    view = memoryview(_buffers.block)[: stop - start]
    return view[: read_fully(source, view, start)]


def _parts(
    entries: Sequence[Entry], at: int, start: int, stop: int
) -> Iterator[tuple[int, int, int]]:
    """The tensors from number ``at`` on in bytes ``[start, stop)``, with their first and last byte."""
    for number in range(at, len(entries)):
        entry = entries[number]
        if entry.start >= stop:
            return
        low, high = max(entry.start, start), min(entry.stop, stop)
        if low < high:
            yield number, low, high


def _digests(view: memoryview, base: int, low: int, high: int, unit_bytes: int) -> bytearray:
    found = bytearray()
    while low < high:
        stop = min(low - low % unit_bytes + unit_bytes, high)
        found += xxhash.xxh3_128_digest(view[low - base : stop - base])
        low = stop
    return found


def _look(view: memoryview, base: int, entry: Entry, low: int, high: int) -> Summary:
    """The result for the values that begin in bytes ``[low, high)`` of the file."""
    summary = Summary()
    pattern = _PATTERNS.get(entry.code)
    if pattern is None:
        return summary
    size = np.dtype(pattern.integer).itemsize
    first = entry.start + -(-(low - entry.start) // size) * size
    count = max(min(-(-(high - first) // size), (len(view) - (first - base)) // size), 0)
    if not count:
        return summary
    values = np.frombuffer(view, pattern.integer, count, first - base)
    summary.first = bytes(view[first - base : first - base + size])
    summary.is_constant = bool((values[:32] == values[0]).all() and (values == values[0]).all())
    without_sign = _buffers.step.view(pattern.integer)
    at = 0
    while at < count:
        # Steps end at multiples of their size in the file, so they do not depend on the pieces.
        place = first + at * size
        end = min(-(-(STEP_BYTES - place % STEP_BYTES) // size), len(without_sign), count - at)
        part = values[at : at + end]
        into = without_sign[: len(part)]
        np.bitwise_and(part, pattern.magnitude, out=into)
        largest = int(into.max())
        summary.largest = max(summary.largest, largest)
        summary.zero_steps += not largest and len(part) == len(without_sign)
        if largest >= pattern.nan or largest == pattern.infinity:
            is_nan = into >= pattern.nan if pattern.only is None else into == pattern.only
            summary.nans += int(is_nan.sum())
            if pattern.infinity is not None:
                summary.infinities += int((into == pattern.infinity).sum())
        at += end
    return summary
