"""Owns whether a link may be followed: it must not leave the directory that the user named.

An unpacked archive can hold a link to any file that the user can read. Copied into the output, or read as
weights, that file would be published with the model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ckpt_tools.errors import UsageError
from ckpt_tools.storage.folders import local_paths
from ckpt_tools.storage.reading import is_near


def refuse_leaving(path: Path, directory: Path) -> None:
    """Refuse a path below a directory whose links lead out of it.

    The cache of the hub is allowed: its files in ``snapshots`` link to ``blobs`` of the same model.

    Args:
        path: a file or a folder.
        directory: the directory that the user named, which may be a link itself.

    Raises:
        UsageError: it leads out of the directory.
    """
    if not is_near(path):
        return  # a store has no links
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
    if target.is_relative_to(home):
        return
    if home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs":
        return
    raise UsageError(
        f"a link leads out of {directory}, to {target}",
        path=path,
        hint="Put a copy in the place of the link, or pass --follow-links if you trust the directory.",
    )


def refuse_any_leaving(files: Iterable[Path], directories: Sequence[Path]) -> None:
    """Refuse files below directories whose links lead out of them.

    Args:
        files: files that are read. Those below none of the directories, or on other machines, are let pass.
        directories: those that the user named.

    Raises:
        UsageError: a file leads out of its directory.
    """
    for file in files:
        for path in local_paths(file):
            home = next((d for d in directories if path != d and path.is_relative_to(d)), None)
            if home is not None:
                refuse_leaving(path, home)


def home_of(source: Path, name: str) -> Path:
    """The directory below which a file has a name."""
    return source.parents[len(Path(name).parts) - 1]
