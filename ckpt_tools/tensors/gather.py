"""Owns carrying out moves: it reads runs of file bytes and puts their elements in place in a buffer.

One :class:`Gatherer` belongs to one thread. It keeps its files and its read buffers, so memory does not
depend on the size of the tensors. The runs of a window are read in the order of their bytes in the files, and
neighbours are read in one request. With many ranks, a window holds a small piece of each of many parameters
from each rank, and these pieces are neighbours in the rank's file. The place of a file says how large a
request is, and how many requests one thread makes at a time. A gatherer may be told to make more.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.storage.places import LOCAL, Fetching, Readable
from ckpt_tools.storage.reading import open_for_reading
from ckpt_tools.storage.residence import Residence
from ckpt_tools.tensors.catalogue import Computed, Move, Tensor
from ckpt_tools.tensors.checksums import ReadLog
from ckpt_tools.tensors.read_only import hide_warning
from ckpt_tools.tensors.requests import Request, Slice, requests_of, split
from ckpt_tools.tensors.threads import load_torch

if TYPE_CHECKING:
    import torch

_OPEN_FILES = 64
_ALIGNMENT = 64
# Two factors of one merged weight, and room for those of a neighbour.
_KEPT_TENSORS = 6


@dataclass(slots=True)
class _Work:
    """What filling some slices takes.

    Attributes:
        slices: the slices. While they are held, no others have their id.
        computed: moves of elements that are computed, each with its slice.
        requests: the requests for all other elements.
    """

    slices: Iterable[Slice]
    computed: list[tuple[Computed, Move, Slice]]
    requests: Iterable[Request]


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
        self._begun: dict[int, _Work] = {}
        self._scratch = bytearray()
        self._threads: ThreadPoolExecutor | None = None
        self._log = log
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

    def begin(self, buffer: bytearray, slices: Iterable[Slice]) -> None:
        """Ask for the bytes of slices that are filled later, where they do not arrive in ``buffer``."""
        work = self._work(buffer, slices)
        work.requests = list(work.requests)
        for request in work.requests[:_OPEN_FILES]:
            if request.is_fetched:
                request.arriving = self._submit(request, None)
        self._begun[id(slices)] = work

    def fill(self, buffer: bytearray, slices: Iterable[Slice]) -> None:
        """Put every slice in its place in ``buffer``.

        Raises:
            DamagedCheckpoint: a file is too short, or cannot be read.
        """
        work = self._begun.pop(id(slices), None) or self._work(buffer, slices)
        for tensor, move, part in work.computed:
            self._compute(tensor, move, part, buffer)
        waiting: list[Request] = []
        for request in work.requests:
            waiting.append(request)
            if len(waiting) >= min(request.at_once, _OPEN_FILES):
                self._carry_out(waiting, buffer)
                waiting = []
        if waiting:
            self._carry_out(waiting, buffer)

    def _work(self, buffer: bytearray, slices: Iterable[Slice]) -> _Work:
        computed: list[tuple[Computed, Move, Slice]] = []
        moves: list[tuple[Move, Slice]] = []
        for part in slices:
            for move in part.tensor.moves(part.start, part.stop):
                if isinstance(move.source, Computed):
                    computed.append((move.source, move, part))
                else:
                    moves.append((move, part))
        moves.sort(key=lambda pair: (pair[0].file, pair[0].offset))
        return _Work(slices, computed, requests_of(moves, buffer, self.at_once))

    def _submit(self, request: Request, into: memoryview | None) -> Future[memoryview]:
        """Let another thread carry out a request."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_OPEN_FILES)
        return self._threads.submit(_receive, self._open(request.file), request, into)

    def _carry_out(self, requests: Sequence[Request], buffer: bytearray) -> None:
        """Read what is requested, all at once, and put each run in place, cast on the way."""
        places = self._places(requests)
        idle = _idle()
        if len(requests) == 1 and requests[0].arriving is None:
            views = [_receive(self._open(requests[0].file), requests[0], places[0])]
        else:
            pairs = zip(requests, places, strict=True)
            arriving = [request.arriving or self._submit(request, at) for request, at in pairs]
            views = [each.result() for each in arriving]
        self.waited += _idle() - idle
        self.bytes_read += sum(request.nbytes for request in requests)
        for request, view in zip(requests, views, strict=True):
            if self._log is not None:
                self._note(self._log, request, view)
            for move, part in request.moves:
                values = self._torch.frombuffer(
                    view,
                    dtype=move.dtype.torch,
                    count=move.span,
                    offset=move.offset - request.offset,
                )
                self._place(values, move, part, buffer)

    def _note(self, log: ReadLog, request: Request, view: memoryview) -> None:
        """Note the runs of a request: each move by itself, because a gap may lie outside of its record."""
        if request.into is not None:
            log.note(request.file, request.offset, view)
        for move, _ in request.moves:
            at = move.offset - request.offset
            log.note(request.file, move.offset, view[at : at + move.nbytes])

    def _places(self, requests: Sequence[Request]) -> list[memoryview | None]:
        """Where each request puts its bytes: in its place, or one after the other in the scratch buffer.

        None where they stay in the memory of the library that they arrive in.
        """
        stops = list(
            accumulate(r.nbytes + -r.nbytes % _ALIGNMENT if r.is_scattered else 0 for r in requests)
        )
        if len(self._scratch) < stops[-1]:
            self._scratch = bytearray(max(stops[-1], LOCAL.nbytes))
        scratch = memoryview(self._scratch)
        return [
            scratch[start:][: request.nbytes] if request.is_scattered else request.into
            for request, start in zip(requests, (0, *stops), strict=False)
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


def _idle() -> float:
    """Seconds, from any start, that this thread did not work."""
    return time.monotonic() - time.thread_time()


def _receive(file: Readable, request: Request, into: memoryview | None) -> memoryview:
    """The bytes of a request, which are in ``into``, if that is given."""
    if into is not None:
        _read(file, request, into)
        return into
    assert isinstance(file, Fetching)
    hide_warning()
    found = file.fetch(request.offset, request.nbytes)
    if len(found) < request.nbytes:
        raise _ended(request, request.offset + len(found))
    return found


def _read(file: Readable, request: Request, into: memoryview) -> None:
    done = 0
    while done < len(into):
        at = request.offset + done
        try:
            count = file.read_into(into[done:], at)
        except OSError as error:
            raise DamagedCheckpoint(
                f"cannot be read at byte {at:,} ({error.strerror})", path=request.file
            ) from error
        if not count:
            raise _ended(request, at)
        done += count


def _ended(request: Request, at: int) -> DamagedCheckpoint:
    return DamagedCheckpoint(
        f"the file ends at byte {at:,}, before the bytes that it should hold",
        path=request.file,
        hint="The file is truncated, or was changed while it was read. Copy it again.",
    )
