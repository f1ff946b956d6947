"""Owns the opening of a file wherever it lies, and how it is read best."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from ckpt_tools.storage.places import (
    LOCAL,
    LocalFile,
    Readable,
    Requests,
    read_fully,
)
from ckpt_tools.storage.pool import PooledPath


def open_for_reading(path: Path) -> Readable:
    """Open a file of any place.

    Raises:
        OSError: it cannot be opened.
        DamagedCheckpoint: as of :meth:`Pool.place_of`.
    """
    if isinstance(path, PooledPath) and path.within is not None:
        return path.pool.open(path.within)
    return LocalFile(path)


def requests_for(path: Path) -> Requests:
    """How a file is read best; raises as :meth:`Pool.place_of` does."""
    if isinstance(path, PooledPath) and path.within is not None and path.is_file():
        return path.pool.place_of(path.within).requests
    return LOCAL


def read_at(path: Path, offset: int, count: int) -> bytes:
    """Bytes of a file, fewer than ``count`` where it ends; raises as :func:`open_for_reading` does."""
    data = bytearray(count)
    with contextlib.closing(open_for_reading(path)) as file:
        return bytes(data[: read_fully(file, memoryview(data), offset)])


def slowest(files: Iterable[Path]) -> Requests:
    """How files are read best together: as the place of their pools with the largest requests."""
    pools = {id(file.pool): file.pool for file in files if isinstance(file, PooledPath)}
    found = (place.requests for pool in pools.values() for place in pool.places)
    return max(found, key=lambda requests: requests.nbytes * requests.at_once, default=LOCAL)


def is_near(path: Path) -> bool:
    """Whether a path is on this machine or another one, and not in a store that is read by requests."""
    return not (isinstance(path, PooledPath) and path.is_addressed)
