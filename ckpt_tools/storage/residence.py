"""Owns leaving the page cache as it was: a file that came from the disk to be read once leaves it again.

A checkpoint may be larger than the memory. The kernel would keep every page of it, and take the memory from
other programs. A file that was in the page cache before stays there.
"""

from __future__ import annotations

import ctypes
import os
import threading
from functools import cache
from pathlib import Path

from ckpt_tools.storage.places import LocalFile, Readable
from ckpt_tools.storage.reading import open_for_reading

# Dropping a shorter run costs more than it frees.
_SHORTEST = 128 << 10
# The kernel keeps pages in folios of up to so many bytes, and drops a folio as a whole: the one at the end of
# a run leaves with the run after it.
_LARGEST_FOLIO = 2 << 20
# The number of cachestat(2) on every processor; Linux has it since 6.5.
_CACHESTAT = 451


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("nbytes", ctypes.c_uint64))


class _Cached(ctypes.Structure):
    """Counts of pages."""

    _fields_ = (
        ("resident", ctypes.c_uint64),
        ("dirty", ctypes.c_uint64),
        ("writeback", ctypes.c_uint64),
        ("evicted", ctypes.c_uint64),
        ("recently_evicted", ctypes.c_uint64),
    )


class Residence:
    """Opens files for all threads, and knows which were in the page cache when they were opened first."""

    def __init__(self) -> None:
        self._resident: dict[Path, bool] = {}
        self._lock = threading.Lock()

    def open(self, path: Path) -> Readable:
        """Open a file of any place; raises as :func:`ckpt_tools.storage.pool.open_for_reading` does."""
        file = open_for_reading(path)
        if not isinstance(file, LocalFile) or self._was_resident(path, file):
            return file
        return _ReadOnce(file)

    def open_absent(self, path: Path) -> LocalFile | None:
        """Open a file of this machine that was not in the page cache; None for others. Raises as above."""
        file = open_for_reading(path)
        if isinstance(file, LocalFile) and not self._was_resident(path, file):
            return file
        file.close()
        return None

    def _was_resident(self, path: Path, file: LocalFile) -> bool:
        with self._lock:
            resident = self._resident.get(path)
            if resident is None:
                resident = self._resident[path] = is_resident(file.fileno())
        return resident


class _ReadOnce:
    """A file whose pages leave the page cache after they were read."""

    def __init__(self, file: LocalFile) -> None:
        self._file = file

    def read_into(self, view: memoryview, offset: int) -> int:
        """See :meth:`ckpt_tools.storage.places.Readable.read_into`."""
        count = self._file.read_into(view, offset)
        if count >= _SHORTEST:
            start = max(offset - _LARGEST_FOLIO, 0)
            end = offset + count
            os.posix_fadvise(self._file.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)
        return count

    def close(self) -> None:
        """See :meth:`ckpt_tools.storage.places.Readable.close`."""
        self._file.close()


def is_resident(fd: int) -> bool:
    """Whether half of a file or more is in the page cache, or the kernel does not say."""
    pages = -(-os.fstat(fd).st_size // os.sysconf("SC_PAGE_SIZE"))
    found = _Cached()
    asked = _Range(0, 0)  # no bytes: up to the end of the file
    failed = _libc().syscall(
        ctypes.c_long(_CACHESTAT), ctypes.c_int(fd), ctypes.byref(asked), ctypes.byref(found), 0
    )
    return bool(failed) or 2 * found.resident >= pages


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
