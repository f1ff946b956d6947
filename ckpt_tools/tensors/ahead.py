"""Owns reading ahead: the bytes that are needed first enter the page cache while torch is imported.

The import takes most of a second, and the disk would have nothing to do meanwhile. The kernel sends the bytes
to the null device. So nothing is copied, and the import keeps the interpreter. A file that is in the page
cache already, and one of another place, is left alone. An error ends it: whoever needs the bytes meets it
too, and reports it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ckpt_tools.errors import CkptError
from ckpt_tools.storage.residence import Residence
from ckpt_tools.tensors.catalogue import Stored, Tensor

# The page cache gets no more than this before bytes move.
MOST_BYTES = 1 << 30
# Ranks have a part of each tensor. The parts of so many bytes are read together, so that a request of the
# disk is long.
_WINDOW_BYTES = 256 << 20
_STEP_BYTES = 64 << 20
_GAP_BYTES = 1 << 20


class _Run(NamedTuple):
    file: Path
    start: int
    stop: int


@contextmanager
def reading_ahead(tensors: Iterable[Tensor], residence: Residence) -> Iterator[None]:
    """Read the files of tensors into the page cache, in a thread, as long as the block lasts.

    Args:
        tensors: the tensors, those that are needed first at the front.
        residence: opens the files; it takes note of what was in the page cache before.
    """
    ended = threading.Event()
    thread = threading.Thread(
        target=_read, args=(tensors, residence, ended), name="ahead", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        # The kernel finishes a step. Its bytes are needed next, so nothing waits for that.
        ended.set()


def _read(tensors: Iterable[Tensor], residence: Residence, ended: threading.Event) -> None:
    left = MOST_BYTES
    with contextlib.suppress(OSError, CkptError), open(os.devnull, "wb") as null:
        for run in _runs(tensors):
            file = residence.open_absent(run.file)
            if file is None:
                continue
            with contextlib.closing(file):
                at = run.start
                while at < run.stop:
                    step = min(run.stop - at, _STEP_BYTES, left)
                    if not step or ended.is_set():
                        return
                    count = os.sendfile(null.fileno(), file.fileno(), at, step)
                    if not count:
                        return
                    at, left = at + count, left - count


def _runs(tensors: Iterable[Tensor]) -> Iterator[_Run]:
    """The runs of file bytes that tensors are read from, in windows, those of one window by file."""
    stored = (tensor for tensor in tensors if isinstance(tensor, Stored))
    for tensor in stored:
        window, nbytes = [tensor], tensor.nbytes
        while nbytes < _WINDOW_BYTES and (more := list(islice(stored, 1))):
            window += more
            nbytes += more[0].nbytes
        yield from _joined(sorted(run for each in window for run in _runs_of(each)))


def _runs_of(tensor: Stored) -> Iterator[_Run]:
    for move in tensor.moves(0, tensor.numel):
        if isinstance(move.source, Path):
            yield _Run(move.source, move.offset, move.offset + move.nbytes)


def _joined(runs: Iterable[_Run]) -> Iterator[_Run]:
    """Sorted runs, with neighbours as one."""
    last: _Run | None = None
    for run in runs:
        if last is not None and last.file == run.file and run.start - last.stop <= _GAP_BYTES:
            last = last._replace(stop=max(last.stop, run.stop))
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last
