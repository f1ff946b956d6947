"""Owns carrying out moves: it reads runs of file bytes and puts their elements in place in a buffer.

One :class:`Gatherer` belongs to one thread. It keeps its files and its read buffers, so memory does not
depend on the size of the tensors. The runs of a window are read in the order of their bytes in the files, and
neighbours are read in one request. With many ranks, a window holds a small piece of each of many parameters
from each rank, and these pieces are neighbours in the rank's file. The place of a file says how large a
request is, and how many requests one thread makes at a time. A gatherer may be told to make more.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate, repeat
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.storage.places import LOCAL, Readable, Streaming
from ckpt_tools.storage.reading import open_for_reading
from ckpt_tools.storage.residence import Residence
from ckpt_tools.tensors.catalogue import Computed, Move, Tensor
from ckpt_tools.tensors.checksums import ReadLog
from ckpt_tools.tensors.requests import Part, Request, Slice, requests_of, split
from ckpt_tools.tensors.threads import load_torch

if TYPE_CHECKING:
    import torch

_OPEN_FILES = 64
_ALIGNMENT = 64
# Two factors of one merged weight, and room for those of a neighbour.
_KEPT_TENSORS = 6


class Gatherer:
    """Fills buffers with windows of tensors. For one thread; close it after use.

    Args:
        log: where the checksums of the bytes that are read are noted, if they are wanted.
        residence: opens the files, where they are read once.

    Attributes:
        at_once: the number of requests that it makes at a time, if a place says no larger one.
        bytes_read: the bytes that it read.
        waited: seconds of the thread that passed without work while bytes were read.
    """

    def __init__(self, log: ReadLog | None = None, residence: Residence | None = None) -> None:
        load_torch()
        import torch

        self._torch = torch
        self._files: OrderedDict[Path, Readable] = OrderedDict()
        self._kept: OrderedDict[int, tuple[Tensor, torch.Tensor]] = OrderedDict()
        self._scratch = bytearray()
        self._threads: ThreadPoolExecutor | None = None
        self._log = log
        self._noting = threading.Lock()
        self._open_file = open_for_reading if residence is None else residence.open
        self.at_once = 1
        self.bytes_read = 0
        self.waited = 0.0

    def __enter__(self) -> Gatherer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files that are kept open, and end the threads."""
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None
        while self._files:
            self._files.popitem()[1].close()

    def fill(self, buffer: bytearray, slices: Iterable[Slice]) -> None:
        """Put every slice in its place in ``buffer``.

        Raises:
            DamagedCheckpoint: a file is too short, or cannot be read.
        """
        work: list[tuple[Move, Slice]] = []
        for part in slices:
            for move in part.tensor.moves(part.start, part.stop):
                if isinstance(move.source, Computed):
                    self._compute(move.source, move, part, buffer)
                else:
                    work.append((move, part))
        work.sort(key=lambda pair: (pair[0].file, pair[0].offset))
        waiting: list[Request] = []
        nbytes = 0
        for request in requests_of(work, buffer, self.at_once):
            nbytes += request.buffer_bytes
            if waiting and 0 < request.how.scratch_bytes < nbytes:
                self._carry_out(waiting, buffer)
                waiting, nbytes = [], request.buffer_bytes
            waiting.append(request)
            if len(waiting) >= min(max(request.how.at_once, self.at_once), _OPEN_FILES):
                self._carry_out(waiting, buffer)
                waiting, nbytes = [], 0
        if waiting:
            self._carry_out(waiting, buffer)

    def _carry_out(self, requests: Sequence[Request], buffer: bytearray) -> None:
        """Read what is requested, all at once, and put each run in place, cast on the way."""
        views = self._views(requests)
        files = [self._open(request.file) for request in requests]
        idle = _idle()
        if len(requests) == 1:
            self._fetch(files[0], requests[0], views[0], buffer)
        else:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(_OPEN_FILES)
            list(self._threads.map(self._fetch, files, requests, views, repeat(buffer)))
        self.waited += _idle() - idle
        self.bytes_read += sum(request.nbytes for request in requests)
        for request, view in zip(requests, views, strict=True):
            if len(request.parts) == 1:
                self._put(request.parts[0], view, buffer)

    def _fetch(self, file: Readable, request: Request, view: memoryview, buffer: bytearray) -> None:
        """Read a request. Several parts are put in place, because each needs the buffer of the last."""
        if len(request.parts) == 1:
            _read(file, request.parts[0], view)
            return
        with _streamed(file, request) as stream:
            for part in request.parts:
                _read(stream, part, view[: part.nbytes])
                self._put(part, view[: part.nbytes], buffer)

    def _put(self, part: Part, view: memoryview, buffer: bytearray) -> None:
        """Note a part that was read, and put its runs in place."""
        if self._log is not None:
            self._note(self._log, part, view)
        for move, piece in part.moves:
            values = self._torch.frombuffer(
                view,
                dtype=move.dtype.torch,
                count=move.span,
                offset=move.offset - part.offset,
            )
            self._place(values, move, piece, buffer)

    def _note(self, log: ReadLog, part: Part, view: memoryview) -> None:
        """Note the runs of a part: each move by itself, because a gap may lie outside of its record."""
        with self._noting:
            if part.into is not None:
                log.note(part.file, part.offset, view)
            for move, _ in part.moves:
                at = move.offset - part.offset
                log.note(part.file, move.offset, view[at : at + move.nbytes])

    def _views(self, requests: Sequence[Request]) -> list[memoryview]:
        """Where each request puts its bytes: in its place, or one after the other in the scratch buffer."""
        sizes = [request.buffer_bytes for request in requests]
        stops = list(accumulate(size + -size % _ALIGNMENT for size in sizes))
        if len(self._scratch) < stops[-1]:
            self._scratch = bytearray(max(stops[-1], LOCAL.nbytes))
        scratch = memoryview(self._scratch)
        return [
            scratch[start:][:size] if request.parts[0].into is None else request.parts[0].into
            for request, size, start in zip(requests, sizes, (0, *stops), strict=False)
        ]

    def _compute(self, tensor: Computed, move: Move, part: Slice, buffer: bytearray) -> None:
        for small in split(move, LOCAL.nbytes):
            start = small.offset // small.dtype.itemsize
            stop = start + small.nbytes // small.dtype.itemsize
            self._place(tensor.compute(start, stop, self), small, part, buffer)

    def _place(self, values: torch.Tensor, move: Move, part: Slice, buffer: bytearray) -> None:
        """Put the elements of a run in place, with every cast on the way."""
        for dtype in move.dtypes[:-1]:
            values = values.to(dtype.torch)
        window = self._torch.frombuffer(
            buffer,
            dtype=part.tensor.dtype.torch,
            count=part.stop - part.start,
            offset=part.at,
        )
        if move.steps:
            run = values.as_strided(move.sizes, move.steps)
        else:
            run = values.view(move.sizes)
        window.as_strided(move.sizes, move.strides, move.at).copy_(run)

    def window(self, tensor: Tensor, start: int, stop: int) -> torch.Tensor:
        """Flat elements ``[start, stop)`` of ``tensor`` in memory, shape ``(stop - start,)``."""
        if start == stop:
            return self._torch.empty(0, dtype=tensor.dtype.torch)
        buffer = bytearray((stop - start) * tensor.dtype.itemsize)
        self.fill(buffer, [Slice(tensor, start, stop, 0)])
        return self._torch.frombuffer(buffer, dtype=tensor.dtype.torch)

    def whole(self, tensor: Tensor) -> torch.Tensor:
        """All of a small tensor in memory. The last few tensors are kept."""
        kept = self._kept.pop(id(tensor), None)
        loaded = kept[1] if kept else self.window(tensor, 0, tensor.numel).view(tensor.shape)
        # The tensor is kept with its values, so that no other tensor can get its id.
        self._kept[id(tensor)] = (tensor, loaded)
        while len(self._kept) > _KEPT_TENSORS:
            self._kept.popitem(last=False)
        return loaded

    def _open(self, path: Path) -> Readable:
        file = self._files.get(path)
        if file is None:
            if len(self._files) >= _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            try:
                file = self._open_file(path)
            except OSError as error:
                raise DamagedCheckpoint(
                    f"cannot be opened ({error.strerror})", path=path
                ) from error
        self._files[path] = file
        self._files.move_to_end(path)
        return file


def load(tensor: Tensor) -> torch.Tensor:
    """The whole of ``tensor`` in memory, as a new contiguous CPU tensor."""
    with Gatherer() as gatherer:
        return gatherer.window(tensor, 0, tensor.numel).view(tensor.shape)


def _streamed(file: Readable, request: Request) -> AbstractContextManager[Readable]:
    """The file while the parts of a request are read: one answer, where its place offers that."""
    if isinstance(file, Streaming):
        return file.stream(request.offset, request.nbytes)
    return nullcontext(file)


def _idle() -> float:
    """Seconds, from any start, that this thread did not work."""
    return time.monotonic() - time.thread_time()


def _read(file: Readable, part: Part, into: memoryview) -> None:
    done = 0
    while done < len(into):
        at = part.offset + done
        try:
            count = file.read_into(into[done:], at)
        except OSError as error:
            raise DamagedCheckpoint(
                f"cannot be read at byte {at:,} ({error.strerror})", path=part.file
            ) from error
        if not count:
            raise DamagedCheckpoint(
                f"the file ends at byte {at:,}, before the bytes that it should hold",
                path=part.file,
                hint="The file is truncated, or was changed while it was read. Copy it again.",
            )
        done += count
