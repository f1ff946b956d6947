"""Writes planned files: the only module that writes tensor bytes.

Each worker is a thread with one block buffer and one :class:`~ckpt_tools.gather.Gatherer`: it takes the
next block, fills the buffer, and writes it where the plan says. Reading, casting and writing release the
interpreter lock, so threads suffice within a machine; each casts on one core, because the cores are taken
by the other workers. Knows plans and file descriptors; knows nothing of names, formats or directories'
final places.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ckpt_tools.errors import OutputFailed
from ckpt_tools.gather import Gatherer
from ckpt_tools.plan import Block, Plan

Progress = Callable[[int], None]
_MAX_WORKERS = 16


@dataclass(frozen=True, slots=True)
class Written:
    """What a write did.

    Attributes:
        bytes_read: bytes read from the sources.
        bytes_written: bytes of the files written.
        move_seconds: time in which the bytes were moved.
        sync_seconds: time in which the disk was waited for afterwards.
    """

    bytes_read: int
    bytes_written: int
    move_seconds: float
    sync_seconds: float


def default_workers() -> int:
    """One worker for each processor that this process may use, up to 16."""
    return min(len(os.sched_getaffinity(0)), _MAX_WORKERS)


def write(
    plan: Plan,
    directory: Path,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Written:
    """Write every file of ``plan`` into ``directory`` and wait until they are on disk.

    Args:
        plan: the layout; its tensors are read from wherever they lie.
        directory: an existing directory without these files.
        workers: number of threads; the files do not depend on it.
        progress: called with the number of bytes after each block, from any worker's thread.

    Raises:
        DamagedCheckpoint: a source file ended early or cannot be read.
        OutputFailed: the disk is full or refused a write.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        outputs = [_create(directory, file.name, file.size, stack) for file in plan.files]
        for fd, file in zip(outputs, plan.files, strict=True):
            _write_all(fd, file.header, 0, directory)
        bytes_read = _move_blocks(plan, outputs, directory, workers or default_workers(), progress)
        if plan.index is not None:
            name, content = plan.index
            fd = _create(directory, name, len(content), stack)
            _write_all(fd, content, 0, directory)
            outputs.append(fd)
        moved = time.monotonic()
        _sync(outputs, directory)
    return Written(bytes_read, plan.nbytes, moved - started, time.monotonic() - moved)


def _create(directory: Path, name: str, size: int, stack: ExitStack) -> int:
    try:
        fd = os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        stack.callback(os.close, fd)
        os.ftruncate(fd, size)
    except OSError as error:
        raise _refused(error, directory / name) from error
    return fd


def _move_blocks(
    plan: Plan, outputs: list[int], directory: Path, workers: int, progress: Progress | None
) -> int:
    blocks = _Shared(plan.blocks())
    stop = threading.Event()

    def work() -> int:
        buffer = bytearray(plan.block_bytes)
        with Gatherer() as gatherer:
            while not stop.is_set() and (block := blocks.take()) is not None:
                gatherer.fill(buffer, block.slices)
                view = memoryview(buffer)[: block.nbytes]
                _write_all(outputs[block.file], view, block.offset, directory)
                if progress is not None:
                    progress(block.nbytes)
            return gatherer.bytes_read

    with _one_intra_op_thread(), ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(work) for _ in range(workers)]
        try:
            wait(jobs, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
        return sum(job.result() for job in jobs)


class _Shared:
    """An iterator of blocks that threads take from in turn."""

    def __init__(self, blocks: Iterator[Block]) -> None:
        self._blocks = blocks
        self._lock = threading.Lock()

    def take(self) -> Block | None:
        with self._lock:
            return next(self._blocks, None)


@contextmanager
def _one_intra_op_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_all(fd: int, data: bytes | memoryview, offset: int, directory: Path) -> None:
    view = memoryview(data)
    while view:
        try:
            count = os.pwrite(fd, view, offset)
        except OSError as error:
            raise _refused(error, directory) from error
        view, offset = view[count:], offset + count


def _sync(outputs: list[int], directory: Path) -> None:
    try:
        with ThreadPoolExecutor(min(len(outputs), 8) or 1) as pool:
            list(pool.map(os.fsync, outputs))
    except OSError as error:
        raise _refused(error, directory) from error


def _refused(error: OSError, path: Path) -> OutputFailed:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "Free some room, or name an output on another disk; nothing was left behind."
        return OutputFailed("no space left on the output's disk", path=path, hint=hint)
    return OutputFailed(f"cannot be written ({error.strerror})", path=path)
