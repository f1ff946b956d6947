"""Owns the writing of tensor bytes to planned files. No other module writes tensor bytes.

Each worker is a thread with one block buffer and one ``Gatherer``. It takes the next block, fills the buffer,
digests it, and writes it to the planned place. Reading, casting, digesting and writing release the
interpreter lock, so threads are enough within a machine. Each thread casts on one core, because the other
workers use the other cores.

The kernel lets one thread at a time write into a file, and a thread that waits for that burns its core. So
workers take blocks of different files while there are several, and those of one file write in turns.

Where workers wait for bytes most of the time, :mod:`~ckpt_tools.writing.depth` lets more of them work.
"""

from __future__ import annotations

import errno
import os
import resource
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from types import TracebackType

from ckpt_tools.errors import OutputFailed
from ckpt_tools.storage.places import LOCAL, Requests
from ckpt_tools.storage.residence import Residence
from ckpt_tools.tensors.checksums import ReadLog
from ckpt_tools.tensors.gather import Gatherer
from ckpt_tools.tensors.threads import MAX_WORKERS, default_workers, pool
from ckpt_tools.writing.behind import Behind
from ckpt_tools.writing.depth import Depth, levels, side_by_side
from ckpt_tools.writing.layout import Plan
from ckpt_tools.writing.units import Block, Units

Progress = Callable[[int], None]
Record = Callable[[Block, Sequence[bytes]], None]
# The sources that all workers have open, and as many again for the rest of the process.
_OTHER_FILES = 2 * 64 * MAX_WORKERS


@dataclass(frozen=True, slots=True)
class Written:
    """The counts and times of a write.

    Attributes:
        bytes_read: bytes read from the sources.
        bytes_written: bytes of tensor data written.
        move_seconds: time to move the bytes.
        sync_seconds: time to wait for the disk afterwards.
    """

    bytes_read: int = 0
    bytes_written: int = 0
    move_seconds: float = 0.0
    sync_seconds: float = 0.0

    @classmethod
    def one_after_another(cls, parts: Sequence[Written]) -> Written:
        """The sum of writes that one rank made."""
        return cls(*(sum(getattr(part, f.name) for part in parts) for f in fields(cls)))

    @classmethod
    def side_by_side(cls, parts: Sequence[Written]) -> Written:
        """The sum of the writes of several ranks; seconds are those of the slowest."""
        summed = cls.one_after_another(parts)
        return replace(
            summed,
            move_seconds=max(part.move_seconds for part in parts),
            sync_seconds=max(part.sync_seconds for part in parts),
        )


def laid_out(plan: Plan, directory: Path) -> set[str]:
    """The names of the files of ``plan`` that exist in ``directory`` with the right size and header."""
    return {
        file.name
        for file in plan.files
        if _is_laid_out(directory / file.name, file.header, file.size)
    }


def lay_out(plan: Plan, directory: Path) -> None:
    """Make every file of ``plan`` in ``directory`` with its size and header, and the index.

    Files that :func:`laid_out` finds stay unchanged.

    Args:
        plan: the layout.
        directory: an existing directory.

    Raises:
        OutputFailed: the disk is full or refused a write.
    """
    there = laid_out(plan, directory)
    for file in plan.files:
        if file.name not in there:
            _make(directory / file.name, file.header, file.size)
    if plan.index is not None:
        name, content = plan.index
        _make(directory / name, content, len(content))


def _is_laid_out(path: Path, header: bytes, size: int) -> bool:
    try:
        with path.open("rb") as stream:
            return os.fstat(stream.fileno()).st_size == size and stream.read(len(header)) == header
    except OSError:
        return False


def _make(path: Path, start: bytes, size: int) -> None:
    try:
        path.unlink(missing_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(fd, size)
            write_all(fd, start, 0, path)
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise refused(error, path) from error


class Outputs:
    """The open files of one plan. Close it after use."""

    def __init__(self, plan: Plan, directory: Path) -> None:
        _allow_open_files(2 * len(plan.files))
        self._directory = directory
        self._stack = ExitStack()
        self._fds: list[int] = []
        self._behind: list[Behind] = []
        self._turns = [threading.Lock() for _ in plan.files]
        try:
            for file in plan.files:
                fd = os.open(directory / file.name, os.O_RDWR | os.O_CLOEXEC)
                self._stack.callback(os.close, fd)
                self._fds.append(fd)
                behind = Behind(directory / file.name)
                self._stack.callback(behind.close)
                self._behind.append(behind)
        except OSError as error:
            self._stack.close()
            raise refused(error, directory) from error

    def __enter__(self) -> Outputs:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Interrupted, threads may still write: another file must not get the number of a closed one.
        if kind is None or issubclass(kind, Exception):
            self._stack.close()

    def write(self, file: int, data: memoryview, offset: int) -> None:
        """Write ``data`` at byte ``offset`` of file number ``file``, when no other thread writes there."""
        with self._turns[file]:
            write_all(self._fds[file], data, offset, self._directory)
        try:
            self._behind[file].wrote(offset, len(data))
        except OSError as error:
            raise refused(error, self._directory) from error

    def read(self, file: int, into: memoryview, offset: int) -> bool:
        """Fill ``into`` from byte ``offset`` of file number ``file``; False where the disk cannot."""
        done = 0
        while done < len(into):
            try:
                count = os.preadv(self._fds[file], [into[done:]], offset + done)
            except OSError:
                return False
            if not count:
                return False
            done += count
        return True

    def sync(self, files: Iterable[int]) -> None:
        """Wait until the bytes of these files are on disk.

        Raises:
            OutputFailed: the disk reports an error.
        """
        fds = [self._fds[file] for file in files]
        try:
            with pool(min(len(fds), 8) or 1) as threads:
                list(threads.map(os.fsync, fds))
        except OSError as error:
            raise refused(error, self._directory) from error

    def drop(self, files: Iterable[int]) -> None:
        """Let the page cache forget these files, which were synced."""
        for file in files:
            self._behind[file].synced()


def _allow_open_files(count: int) -> None:
    """Raise the process's limit of open files, often 1,024, if the outputs need more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def write(
    units: Units,
    outputs: Outputs,
    todo: Sequence[range],
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    record: Record | None = None,
    ended: threading.Event | None = None,
    log: ReadLog | None = None,
    requests: Requests = LOCAL,
    depth: Depth | None = None,
    residence: Residence | None = None,
) -> Written:
    """Write units of a plan, and wait until they are on disk.

    Args:
        units: the plan's units.
        outputs: its files.
        todo: the units to write.
        workers: number of threads where no thread waits for bytes. The files do not depend on it.
        progress: called with the number of bytes after each block, from any worker's thread.
        record: called with each written block and its digests, from any worker's thread.
        ended: once it is set, no further block is started, and the write is incomplete.
        log: takes the checksums of the bytes that are read.
        requests: how the sources are read best. A store is slow for one request and fast for many, so
            blocks are larger then, and the number of threads does not depend on the processors.
        depth: decides how many requests are under way. By default it follows from the others.
        residence: opens the sources.

    Raises:
        DamagedCheckpoint: a source file ended early or cannot be read.
        OutputFailed: the disk is full or refused a write.
    """
    started = time.monotonic()
    block_bytes = units.block_bytes_for(requests)
    blocks = _Shared(units, todo, block_bytes)
    if depth is None:
        depth = Depth(levels(workers or default_workers(), block_bytes, requests))
    touched: set[int] = set()
    residence = residence or Residence()

    def work(stays: Callable[[], bool]) -> tuple[int, int, ReadLog | None]:
        buffer = bytearray(block_bytes)
        done = 0
        own = None if log is None else ReadLog()
        with Gatherer(own, residence) as gatherer:
            following: Block | None = None
            held: Block | None = None
            while True:
                if following is None and stays():
                    following = held = blocks.take(held)
                block, following = following, None
                if block is None or (ended is not None and ended.is_set()):
                    break
                began, waited = time.monotonic(), gatherer.waited
                gatherer.at_once = depth.level.at_once
                if requests.is_ahead(block_bytes) and stays():
                    following = held = blocks.take(held)
                    if following is not None:
                        gatherer.begin(buffer, following.slices)
                view = memoryview(buffer)[: block.nbytes]
                _clear_gaps(view, block)
                gatherer.fill(buffer, block.slices)
                digests = units.digests(block, view) if record is not None else ()
                outputs.write(block.file, view, block.offset)
                touched.add(block.file)
                done += block.nbytes
                if record is not None:
                    record(block, digests)
                if progress is not None:
                    progress(block.nbytes)
                depth.moved(block.nbytes, gatherer.waited - waited, time.monotonic() - began)
            blocks.leave(held)
            return gatherer.bytes_read, done, own

    done = side_by_side(work, depth)
    moved = time.monotonic()
    outputs.sync(touched)
    outputs.drop(touched)
    for _, _, own in done:
        if log is not None and own is not None:
            log.include(own)
    bytes_read, bytes_written = sum(one[0] for one in done), sum(one[1] for one in done)
    return Written(bytes_read, bytes_written, moved - started, time.monotonic() - moved)


def _clear_gaps(view: memoryview, block: Block) -> None:
    """Set the bytes of a block that belong to no tensor to zero; the buffer held another block."""
    end = 0
    for piece in block.slices:
        view[end : piece.at] = bytes(piece.at - end)
        end = piece.at + (piece.stop - piece.start) * piece.tensor.dtype.itemsize
    view[end:] = bytes(len(view) - end)


class _Shared:
    """The blocks that threads share, in the order of each file.

    Args:
        units: the plan's units.
        todo: the units to write.
        block_bytes: bytes of the largest block.
    """

    def __init__(self, units: Units, todo: Iterable[range], block_bytes: int) -> None:
        parts: dict[int, list[range]] = {}
        for part in todo:
            for file, within in units.by_file(part):
                parts.setdefault(file, []).append(within)
        # Of each file that has blocks left; the first file that no thread works at is among the first few.
        self._blocks = {
            file: chain.from_iterable(units.blocks(part, block_bytes) for part in within)
            for file, within in parts.items()
        }
        self._threads = dict.fromkeys(parts, 0)
        self._lock = threading.Lock()

    def take(self, done: Block | None) -> Block | None:
        """The next block of the file with the fewest threads; a thread stays at its file if it can.

        Args:
            done: the block that the thread took before.
        """
        with self._lock:
            self._leave(done)
            while self._blocks:
                file = self._least_busy()
                block = next(self._blocks[file], None)
                if block is not None:
                    self._threads[file] += 1
                    return block
                del self._blocks[file]
            return None

    def leave(self, done: Block | None) -> None:
        """Let others take blocks of the file that a thread was at."""
        with self._lock:
            self._leave(done)

    def _leave(self, done: Block | None) -> None:
        if done is not None:
            self._threads[done.file] -= 1

    def _least_busy(self) -> int:
        free = (file for file in self._blocks if not self._threads[file])
        first = next(free, None)
        return min(self._blocks, key=self._threads.__getitem__) if first is None else first


def write_all(fd: int, data: bytes | memoryview, offset: int, path: Path) -> None:
    """Write all of ``data`` at byte ``offset``; raises OutputFailed."""
    view = memoryview(data)
    while view:
        try:
            count = os.pwrite(fd, view, offset)
        except OSError as error:
            raise refused(error, path) from error
        if not count:
            raise OutputFailed(
                "the disk takes no bytes and reports no error",
                path=path,
                hint="Name an output on another disk.",
            )
        view, offset = view[count:], offset + count


def refused(error: OSError, path: Path) -> OutputFailed:
    """The error for a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "Free some space, or name an output on another disk."
        return OutputFailed("no space left on the output's disk", path=path, hint=hint)
    return OutputFailed(f"cannot be written ({error.strerror})", path=path)
