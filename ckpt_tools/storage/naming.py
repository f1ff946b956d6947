"""Owns the path that stands for what a caller named: a path of this machine, or an address."""

from __future__ import annotations

import os
from pathlib import Path

from ckpt_tools.storage.addresses import PathLike, is_address, parsed


def as_path(value: PathLike) -> Path:
    """The path that a caller named; of an address, a path in the tree of its store.

    A path stays the same object, because it may be that of a pool.

    Raises:
        UsageError: the address is malformed, or the packages for it are not installed.
        StoreFailed: the store cannot be reached, or refuses.
    """
    if isinstance(value, Path):
        return value
    if is_address(value):
        from ckpt_tools.storage.remote.trees import opened

        return opened(parsed(os.fspath(value)))
    return Path(value)
