"""Carries out moves: reads runs of file bytes and puts their elements in place in a buffer.

The only module that reads tensor data. One :class:`Gatherer` belongs to one thread; it keeps its files
open and one read buffer, so memory does not depend on what is read. Runs of a window are read in the
order in which they lie in their files, neighbours in one request: with many ranks a window holds a small
piece of each of many parameters from each rank, and those pieces are neighbours in the rank's file.
Knows moves and buffers; knows nothing of names, formats or output files.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.storage.pool import Readable, open_for_reading
from ckpt_tools.tensors.catalogue import Computed, Move, Tensor, row_major_strides, window_slabs

if TYPE_CHECKING:
    import torch

# Large enough for disks and shared file systems, small enough that what is read is still in the
# processor's cache when it is cast.
REQUEST_BYTES = 1 << 20
# Reading a gap this long costs less than a second request.
_GAP_BYTES = 64 << 10
_OPEN_FILES = 64
# The factors of one merged weight: two, and room for those of a neighbour.
_KEPT_TENSORS = 6


@dataclass(frozen=True, slots=True)
class Slice:
    """A window of a tensor and its place in a buffer.

    Attributes:
        tensor: the tensor.
        start, stop: the window, in flat elements.
        at: byte in the buffer where the window's first element goes.
    """

    tensor: Tensor
    start: int
    stop: int
    at: int


class Gatherer:
    """Fills buffers with windows of tensors. For one thread; close it after use."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._files: OrderedDict[Path, Readable] = OrderedDict()
        self._kept: OrderedDict[int, tuple[Tensor, torch.Tensor]] = OrderedDict()
        self._scratch = bytearray(REQUEST_BYTES)
        self.bytes_read = 0

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
        """Close the files that are kept open."""
        while self._files:
            self._files.popitem()[1].close()

    def fill(self, buffer: bytearray, slices: Iterable[Slice]) -> None:
        """Put every slice in its place in ``buffer``.

        Raises:
            DamagedCheckpoint: a file ended before the bytes that it should hold, or cannot be read.
        """
        work: list[tuple[Move, Slice]] = []
        for part in slices:
            for move in part.tensor.moves(part.start, part.stop):
                if isinstance(move.source, Computed):
                    self._compute(move.source, move, part, buffer)
                else:
                    work.append((move, part))
        work.sort(key=lambda pair: (pair[0].file, pair[0].offset))
        pending: list[tuple[Move, Slice]] = []
        for move, part in work:
            if move.is_plain and move.nbytes >= _GAP_BYTES:
                at = part.at + move.at * move.dtype.itemsize
                self._read(move.file, move.offset, memoryview(buffer)[at : at + move.nbytes])
                continue
            for small in _split(move):
                if pending and not _joins(pending[0][0], pending[-1][0], small):
                    self._scatter(pending, buffer)
                    pending = []
                pending.append((small, part))
        if pending:
            self._scatter(pending, buffer)

    def _scatter(self, pending: Sequence[tuple[Move, Slice]], buffer: bytearray) -> None:
        """Read the neighbouring runs in one request and put each in place, cast on the way."""
        torch = self._torch
        first, last = pending[0][0], pending[-1][0]
        length = max(move.offset + move.nbytes for move, _ in pending) - first.offset
        assert length <= len(self._scratch) and last.file == first.file
        self._read(first.file, first.offset, memoryview(self._scratch)[:length])
        for move, part in pending:
            values = torch.frombuffer(
                self._scratch,
                dtype=move.dtype.torch,
                count=move.nbytes // move.dtype.itemsize,
                offset=move.offset - first.offset,
            )
            self._place(values, move, part, buffer)

    def _compute(self, tensor: Computed, move: Move, part: Slice, buffer: bytearray) -> None:
        for small in _split(move):
            start = small.offset // small.dtype.itemsize
            stop = start + small.nbytes // small.dtype.itemsize
            self._place(tensor.compute(start, stop, self), small, part, buffer)

    def _place(self, values: torch.Tensor, move: Move, part: Slice, buffer: bytearray) -> None:
        """Put the elements of a run in place, through every dtype that they pass on the way."""
        for dtype in move.dtypes[:-1]:
            values = values.to(dtype.torch)
        window = self._torch.frombuffer(
            buffer,
            dtype=part.tensor.dtype.torch,
            count=part.stop - part.start,
            offset=part.at,
        )
        window.as_strided(move.sizes, move.strides, move.at).copy_(values.view(move.sizes))

    def window(self, tensor: Tensor, start: int, stop: int) -> torch.Tensor:
        """Flat elements ``[start, stop)`` of ``tensor`` in memory, shape ``(stop - start,)``."""
        if start == stop:
            return self._torch.empty(0, dtype=tensor.dtype.torch)
        buffer = bytearray((stop - start) * tensor.dtype.itemsize)
        self.fill(buffer, [Slice(tensor, start, stop, 0)])
        return self._torch.frombuffer(buffer, dtype=tensor.dtype.torch)

    def whole(self, tensor: Tensor) -> torch.Tensor:
        """All of a small tensor in memory, kept while it is among the last that were asked for."""
        kept = self._kept.pop(id(tensor), None)
        loaded = kept[1] if kept else self.window(tensor, 0, tensor.numel).view(tensor.shape)
        # The tensor is kept with its values, so that no other can take its id meanwhile.
        self._kept[id(tensor)] = (tensor, loaded)
        while len(self._kept) > _KEPT_TENSORS:
            self._kept.popitem(last=False)
        return loaded

    def _read(self, path: Path, offset: int, into: memoryview) -> None:
        file = self._open(path)
        done = 0
        while done < len(into):
            try:
                count = file.read_into(into[done:], offset + done)
            except OSError as error:
                raise DamagedCheckpoint(
                    f"cannot be read at byte {offset + done:,} ({error.strerror})", path=path
                ) from error
            if not count:
                raise DamagedCheckpoint(
                    f"the file ends at byte {offset + done:,}, before the bytes that it should hold",
                    path=path,
                    hint="It is truncated or changed while it was read; copy it anew.",
                )
            done += count
        self.bytes_read += done

    def _open(self, path: Path) -> Readable:
        file = self._files.get(path)
        if file is None:
            if len(self._files) >= _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            try:
                file = open_for_reading(path)
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


def _split(move: Move) -> Iterator[Move]:
    """The move in parts that fit the read buffer."""
    if move.nbytes <= REQUEST_BYTES:
        yield move
        return
    count = move.nbytes // move.dtype.itemsize
    step = REQUEST_BYTES // move.dtype.itemsize
    local = row_major_strides(move.sizes)
    for start in range(0, count, step):
        for slab in window_slabs(move.sizes, start, min(start + step, count)):
            source = sum(o * s for o, s in zip(slab.offsets, local, strict=True))
            place = sum(o * s for o, s in zip(slab.offsets, move.strides, strict=True))
            yield replace(
                move,
                offset=move.offset + source * move.dtype.itemsize,
                sizes=slab.sizes,
                at=move.at + place,
            )


def _joins(first: Move, last: Move, move: Move) -> bool:
    """Whether ``move`` can be read in the request that runs from ``first`` to ``last``."""
    end = last.offset + last.nbytes
    return (
        move.file == first.file
        and move.offset - end <= _GAP_BYTES
        and move.offset + move.nbytes - first.offset <= REQUEST_BYTES
        # torch views a buffer as elements only where they are aligned.
        and (move.offset - first.offset) % move.dtype.itemsize == 0
    )
