"""Owns the stamps of files: size, time and inode, which differ where a file changed between two moments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ckpt_tools.errors import DamagedCheckpoint, listed
from ckpt_tools.storage.folders import entries_of, local_paths

Stamp = tuple[int, int, int]


def stamp_of(path: Path) -> Stamp | None:
    """The stamp of a file as it is now; None if there is none."""
    try:
        # A path of a pool knows facts of its listing; its file on this machine tells the present. Each range
        # of a file in a store is demanded in the version of the listing.
        found = next(iter(local_paths(path)), path).stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


def stamps_in(path: Path) -> dict[Path, Stamp | None]:
    """The stamps of a file, or of what lies in a directory, without what lies further below."""
    return {entry: stamp_of(entry) for entry in (entries_of(path) if path.is_dir() else [path])}


def changed_since(before: Mapping[Path, Stamp | None]) -> list[Path]:
    """The files that were written, replaced or removed since their stamps were taken."""
    return [path for path, stamp in before.items() if stamp_of(path) != stamp]


def refusal_of(changed: list[Path], count: int) -> DamagedCheckpoint:
    """The error about sources that changed.

    Args:
        changed: the files.
        count: the number of all sources.
    """
    return DamagedCheckpoint(
        f"{len(changed)} of {count} source files changed while they were read: "
        f"{listed([path.name for path in changed])}",
        path=changed[0],
        hint="Wait until the training run has finished its save, then convert again.",
    )
