"""Owns the look through a run's directory: the checkpoints below it, a few levels deep.

The look is bounded in levels and in entries. It follows no links. It enters no checkpoint that it found, and
no directory of an optimizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt_tools.errors import CkptError
from ckpt_tools.storage.folders import entries_of
from ckpt_tools.tensors.checkpoint import Location

LEVELS = 4
MOST_ENTRIES = 20_000
_OPTIMIZER = re.compile(r"(?:optim|optimizer|optimizer_states?)(?:_\d+)?")


@dataclass(frozen=True)
class Found:
    """What lies below a directory.

    Attributes:
        locations: the checkpoints, in the order of the tree.
        errors: why something that looks like a checkpoint is none.
        is_whole: whether every directory was looked at.
    """

    locations: Sequence[Location]
    errors: Sequence[CkptError]
    is_whole: bool


def look_below(root: Path, find: Callable[[Path], list[Location]]) -> Found:
    """The checkpoints below a directory.

    Args:
        root: the directory.
        find: the locations of checkpoints in one directory.
    """
    found: dict[tuple[str, Path, str | None], Location] = {}
    errors: list[CkptError] = []
    level, left = [root], MOST_ENTRIES
    for _ in range(LEVELS):
        children: list[Path] = []
        for directory in level:
            entries = _entries(directory)
            children += [entry for entry in entries[:left] if _is_entered(entry)]
            left -= len(entries)
            if left < 0:
                break
        level = []
        for child in children:
            try:
                locations = find(child)
            except CkptError as error:
                errors.append(error)
                continue
            found |= {(one.format, one.directory, one.part): one for one in locations}
            if not locations:
                level.append(child)
        if left < 0:
            return Found([*found.values()], errors, is_whole=False)
    return Found([*found.values()], errors, is_whole=not any(map(_has_directories, level)))


def _entries(directory: Path) -> list[Path]:
    try:
        return entries_of(directory)
    except OSError:
        return []


def _is_entered(entry: Path) -> bool:
    if entry.name.startswith(".") or _OPTIMIZER.fullmatch(entry.name):
        return False
    return entry.is_dir() and not entry.is_symlink()


def _has_directories(directory: Path) -> bool:
    return any(map(_is_entered, _entries(directory)))
