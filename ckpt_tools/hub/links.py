"""Owns whether a link may be followed: it must not leave the directory that the user named.

An unpacked archive can hold a link to any file that the user can read. Copied into the output, or read as
weights, that file would be published with the model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from ckpt_tools.errors import UsageError, listed
from ckpt_tools.storage.folders import local_paths
from ckpt_tools.storage.reading import is_near

PathLike = str | os.PathLike[str]


def leads_out_to(path: Path, directory: Path) -> Path | None:
    """Where a path below a directory leads, if its links lead out of the directory; otherwise None.

    The cache of the hub is allowed: its files in ``snapshots`` link to ``blobs`` of the same model.
    """
    if not is_near(path):
        return None  # a store has no links
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
    if target.is_relative_to(home):
        return None
    for folder in (home, *home.parents):
        if folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs":
            return None
    return target


def links_out(files: Iterable[Path], directory: Path) -> Mapping[str, Path]:
    """The links through which files below a directory lead out of it, each with its target.

    The path of a link is relative to the directory. Where a folder is such a link, it is named instead of the
    files below it.
    """
    targets: dict[str, Path | None] = {}
    for file in files:
        for path in local_paths(file):
            parts = path.relative_to(directory).parts if path.is_relative_to(directory) else ()
            for name in accumulate(parts, "{}/{}".format):
                if name not in targets:
                    here = directory / name
                    targets[name] = leads_out_to(here, directory) if here.is_symlink() else None
                if targets[name] is not None:
                    break
    return {name: target for name, target in targets.items() if target is not None}


def remarks_on(files: Iterable[Path], directories: Iterable[PathLike]) -> list[str]:
    """A sentence for each directory out of which files of a checkpoint lead by a link.

    Args:
        files: the files and folders of the checkpoint.
        directories: those that the user named.
    """
    held, remarks = list(files), []
    for directory in directories:
        # By its name: a directory on another machine has no path on this one.
        home = Path(str(directory))
        links = [f"{name} -> {target}" for name, target in links_out(held, home).items()]
        if links:
            noun = "a link leads" if len(links) == 1 else "links lead"
            remarks.append(f"{noun} out of {home}: {listed(links, 4)}")
    return remarks


def refuse_leaving(path: Path, directory: Path) -> None:
    """Refuse a path below a directory whose links lead out of it, as :func:`leads_out_to` judges.

    Args:
        path: a file or a folder.
        directory: the directory that the user named, which may be a link itself.

    Raises:
        UsageError: it leads out of the directory.
    """
    target = leads_out_to(path, directory)
    if target is None:
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
