"""Owns write-behind: written bytes go to the disk at once, and their pages then leave the page cache.

Without it the kernel collects dirty pages up to a tenth of the memory or more, writes them in one go when a
sync asks for it, and takes a new page for each page of the output. A new page costs more than writing it to
a fast disk, above all on a virtual machine, where the host must provide it. With it the same few pages are
used again, and the page cache keeps what other programs have in it.

Nothing here proves that bytes are on the disk: a disk has a cache of its own. Only a sync proves it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections import deque
from functools import cache
from pathlib import Path

# Bytes of one file that are on their way to the disk: enough to keep a disk with a long way to it busy.
WINDOW_BYTES = 64 << 20

# Flags of sync_file_range(2).
_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4
# How a kernel or a file system says that it does not offer the call.
_NOT_OFFERED = frozenset((errno.ENOSYS, errno.EINVAL, errno.ESPIPE, errno.EOPNOTSUPP, errno.EPERM))


class Behind:
    """The write-behind of one file. Several threads may use it; close it after use.

    It has an open file of its own. The kernel tells a failed write once to each open file, so an error that
    is met here is met by the sync of the writer's file too.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._waiting: deque[tuple[int, int]] = deque()
        self._nbytes = 0
        self._lock = threading.Lock()

    def wrote(self, offset: int, nbytes: int) -> None:
        """Start to write a run of bytes to the disk; wait for earlier runs beyond the window, and drop these.

        Raises:
            OSError: the disk reports an error.
        """
        if not sync_range(self._fd, offset, nbytes, _WRITE):
            return
        with self._lock:
            self._waiting.append((offset, nbytes))
            self._nbytes += nbytes
            due = []
            while self._nbytes > WINDOW_BYTES:
                due.append(self._waiting.popleft())
                self._nbytes -= due[-1][1]
        for start, length in due:
            sync_range(self._fd, start, length, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)
            _drop(self._fd, start, length)

    def synced(self) -> None:
        """Drop what is left in the page cache: the file was synced."""
        with self._lock:
            self._waiting.clear()
            self._nbytes = 0
        _drop(self._fd, 0, 0)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def sync_range(fd: int, offset: int, nbytes: int, flags: int) -> bool:
    """Call sync_file_range(2), which Python does not offer.

    Returns:
        Whether the system offers it for this file.

    Raises:
        OSError: the disk reports an error.
    """
    call = getattr(_libc(), "sync_file_range", None)
    if call is None:
        return False
    done = call(fd, ctypes.c_longlong(offset), ctypes.c_longlong(nbytes), ctypes.c_uint(flags))
    if not done:
        return True
    number = ctypes.get_errno()
    if number in _NOT_OFFERED:
        return False
    raise OSError(number, os.strerror(number))


def _drop(fd: int, offset: int, nbytes: int) -> None:
    """Let clean pages leave the page cache; 0 bytes: up to the end of the file."""
    try:
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
    except OSError:
        return  # advice alone


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
