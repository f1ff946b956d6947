"""Owns the memory of which pickles were followed: files of ranks differ in a few numbers and texts.

A pickle that differs from one that was followed in the values of its numbers and texts alone has the same
opcodes, and the same limits. Comparing it takes a thousandth of the time of following it.
"""

from __future__ import annotations

import io
import threading
from dataclasses import replace

from ckpt_tools.readers.containers.pickle_limits import Followed, follow, values

# Pickles of this length at least, of so many lengths.
_SHORTEST, _LENGTHS = 1 << 12, 16
_LARGEST = 1 << 24


class _Known:
    """A pickle that was followed.

    Attributes:
        followed: what following it has shown.
    """

    def __init__(self, followed: Followed) -> None:
        self.followed = followed
        self._fixed: int | None = None  # a mask of the bytes that are no values
        self._bytes = 0

    def has_opcodes_of(self, data: bytes) -> bool:
        """Whether another pickle of this length differs in values alone."""
        if self._fixed is None:
            mask = bytearray(b"\xff") * len(data)
            for start, stop in values(self.followed.data):
                mask[start:stop] = bytes(stop - start)
            fixed = int.from_bytes(mask, "little")
            self._bytes = int.from_bytes(self.followed.data, "little") & fixed
            self._fixed = fixed
        return int.from_bytes(data, "little") & self._fixed == self._bytes


_known: dict[int, _Known] = {}
_lock = threading.Lock()


def follow_alike(file: io.BytesIO) -> Followed:
    """As :func:`follow`, of a pickle in memory, at once if it is like one that was followed."""
    start = file.tell()
    data = file.read()
    if not _SHORTEST <= len(data) <= _LARGEST:
        file.seek(start)
        return follow(file)
    known = _known.get(len(data))
    if known is not None and known.has_opcodes_of(data):
        return replace(known.followed, data=data)
    file.seek(start)
    followed = follow(file)
    if len(followed.data) == len(data):
        with _lock:
            if len(_known) >= _LENGTHS:
                _known.pop(next(iter(_known)))
            _known[len(data)] = _Known(followed)
    return followed
