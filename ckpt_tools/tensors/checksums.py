"""CRC-32 of the bytes of files as they are read, joined from runs without reading a byte twice.

Owns :class:`ReadLog` and the arithmetic of CRC-32 of joined runs. The CRC of ``a + b`` follows from those of
``a`` and ``b`` and the length of ``b``: appending ``n`` bytes multiplies the register by ``x**(8 n)``
modulo the polynomial of CRC-32.

Source: Mark Adler, ``crc32_combine`` of zlib (``crc32.c``); polynomial 0xEDB88320, bits reflected.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

_POLYNOMIAL = 0xEDB88320
# x**0 of the reflected register.
_ONE = 1 << 31

Buffer = bytes | bytearray | memoryview


def joined(first: int, second: int, length: int) -> int:
    """The CRC-32 of two runs, one after the other; ``length`` is the number of bytes of the second."""
    return _times(_shift(length), first) ^ second


def _times(a: int, b: int) -> int:
    """The product of two polynomials modulo that of CRC-32."""
    product = 0
    bit = _ONE
    while a:
        if a & bit:
            product ^= b
            a ^= bit
        bit >>= 1
        b = b >> 1 ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


@lru_cache(maxsize=4096)
def _shift(length: int) -> int:
    """``x**(8 length)`` modulo the polynomial."""
    power, square = _ONE, _ONE >> 8
    while length:
        if length & 1:
            power = _times(square, power)
        square = _times(square, square)
        length >>= 1
    return power


@dataclass
class _Runs:
    """Runs of one file; no two of them touch."""

    stop_and_crc: dict[int, tuple[int, int]] = field(default_factory=dict)
    start_of: dict[int, int] = field(default_factory=dict)

    def add(self, start: int, stop: int, crc: int) -> None:
        """Add a run, joined with those that end or begin where it does."""
        if (before := self.start_of.pop(start, None)) is not None:
            _, first = self.stop_and_crc.pop(before)
            start, crc = before, joined(first, crc, stop - start)
        if (after := self.stop_and_crc.pop(stop, None)) is not None:
            self.start_of.pop(after[0], None)
            crc, stop = joined(crc, after[1], after[0] - stop), after[0]
        held = self.stop_and_crc.get(start)
        if held is not None and held[0] >= stop:
            return
        if held is not None:
            self.start_of.pop(held[0], None)
        self.stop_and_crc[start] = (stop, crc)
        self.start_of[stop] = start


class ReadLog:
    """The runs of file bytes that were read, each with its CRC-32. For one thread."""

    def __init__(self) -> None:
        self._files: dict[Path, _Runs] = {}

    def note(self, file: Path, offset: int, data: Buffer) -> None:
        """Note a run that was read."""
        self.add(file, offset, offset + len(data), zlib.crc32(data))

    def add(self, file: Path, start: int, stop: int, crc: int) -> None:
        """Add a run with a known CRC-32."""
        if stop > start:
            self._files.setdefault(file, _Runs()).add(start, stop, crc)

    def include(self, other: ReadLog) -> None:
        """Add the runs of another log."""
        for file in other.files:
            for start, stop, crc in other.runs(file):
                self.add(file, start, stop, crc)

    @property
    def files(self) -> list[Path]:
        """The files of which something was read."""
        return list(self._files)

    def runs(self, file: Path) -> Iterator[tuple[int, int, int]]:
        """Start, stop and CRC-32 of the runs of a file, in order. Runs that were read twice may overlap."""
        held = self._files[file].stop_and_crc if file in self._files else {}
        for start in sorted(held):
            stop, crc = held[start]
            yield start, stop, crc
