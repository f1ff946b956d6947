"""How many bytes one save of a run takes on disk, seen on a checkpoint that is there.

Metadata and file sizes alone are read. Which directory holds the whole of a save, its optimizer and random
states included, is told by the files that a training loop writes at its top: a reader is content with the
part that holds the weights.
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
    """Measure one save of a run: all files of it, not only those that hold weights.

    Args:
        path: the checkpoint.
        tag: which one, where the directory holds several.

    Raises:
        CkptError: there is no one checkpoint under the path, or it is damaged: what lacks a file is
            smaller than what the run writes.
    """
    from ckpt_tools import readers

    try:
        location = readers.locate(Path(path), tag)
    except AmbiguousCheckpoint:
        # Of several models in one save any one leads to it; several saves are ambiguous still.
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
