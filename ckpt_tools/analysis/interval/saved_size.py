"""Owns the measurement of one save of a run: the bytes of an existing checkpoint on disk.

Only metadata and file sizes are read. A reader finds the part with the weights. The files that a training
loop writes at the top of a save show the directory of the complete save, with optimizer and random states.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ckpt_tools.errors import AmbiguousCheckpoint

# Of the Transformers Trainer, of Accelerate's `save_state` and of OLMo-core's Trainer.
_TOP_OF_A_SAVE = ("trainer_state.json", "random_states_*.pkl", "train/rank*.pt")


@dataclass(frozen=True, slots=True)
class SavedSize:
    """The size of one save.

    Attributes:
        path: the directory that was measured.
        files: number of files below it.
        nbytes: their bytes.
    """

    path: Path
    files: int
    nbytes: int


def saved_size(path: str | os.PathLike[str], *, tag: str | None = None) -> SavedSize:
    """Measure all files of one save of a run.

    Args:
        path: the checkpoint.
        tag: the name of the checkpoint, if the directory holds several.

    Raises:
        CkptError: the path does not name exactly one checkpoint, or the checkpoint is damaged, so that its
            size is too small.
    """
    from ckpt_tools import readers

    try:
        location = readers.locate(Path(path), tag)
    except AmbiguousCheckpoint:
        # Any of several models in one save leads to the save. Several saves stay ambiguous.
        location = readers.locate(Path(path), tag, model=0)
    checkpoint = readers.read(location)
    if checkpoint.lost is not None:
        raise checkpoint.lost
    directory = location.directory
    if directory.name in ("", ".."):
        directory = directory.resolve()
    if not _is_top(directory) and _is_top(directory.parent):
        directory = directory.parent
    sizes = [file.stat().st_size for file in directory.rglob("*") if file.is_file()]
    return SavedSize(directory, len(sizes), sum(sizes))


def _is_top(directory: Path) -> bool:
    return any(any(directory.glob(pattern)) for pattern in _TOP_OF_A_SAVE)
