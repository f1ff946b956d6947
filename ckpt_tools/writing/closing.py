"""Closes planned files once their data is on disk: reads ranges back for checksums, and writes the rest.

Only files whose container needs it are read. Whoever wrote a range, and in which run, does not matter.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path

from ckpt_tools.errors import OutputFailed
from ckpt_tools.tensors.threads import pool
from ckpt_tools.writing.bytes import refused, write_all
from ckpt_tools.writing.layout import Plan, PlannedFile

_READ_BYTES = 1 << 20


def close_files(
    plan: Plan, directory: Path, workers: int, active: Callable[[int], None] | None = None
) -> None:
    """Write what follows from the data of each file.

    Args:
        plan: the layout.
        directory: where its files are; their data is complete.
        workers: number of threads.
        active: called with the number of bytes after each read, from any thread.

    Raises:
        OutputFailed: a file cannot be read back, or the disk refused.
    """
    for file in plan.files:
        if file.closing is not None:
            _close(file, directory / file.name, workers, active)


def _close(
    file: PlannedFile, path: Path, workers: int, active: Callable[[int], None] | None
) -> None:
    assert file.closing is not None
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise refused(error, path) from error

    def checksum(places: tuple[int, int]) -> int:
        return _checksum(fd, *places, path, active)

    try:
        with pool(workers) as threads:
            checksums = list(threads.map(checksum, file.closing.ranges))
        for offset, content in file.closing.parts(checksums):
            write_all(fd, content, offset, path)
        os.fsync(fd)
    except OSError as error:
        raise refused(error, path) from error
    finally:
        os.close(fd)


def _checksum(
    fd: int, start: int, stop: int, path: Path, active: Callable[[int], None] | None
) -> int:
    buffer = memoryview(bytearray(min(_READ_BYTES, stop - start)))
    crc = 0
    while start < stop:
        count = os.preadv(fd, [buffer[: stop - start]], start)
        if not count:
            raise OutputFailed("it became shorter while it was written", path=path)
        crc = zlib.crc32(buffer[:count], crc)
        start += count
        if active is not None:
            active(count)
    return crc
