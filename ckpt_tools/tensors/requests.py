"""Owns which runs of a file's bytes are read in one request, and in which parts.

Moves that lie close to each other in a file are one run, up to the size that the place of the file states. A
place whose requests take long to begin has large requests. They are read in parts, each of which is put in
place before the next, so buffers do not grow with the requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from ckpt_tools.storage.places import LOCAL, Requests
from ckpt_tools.storage.reading import requests_for
from ckpt_tools.tensors.catalogue import Move, Tensor, row_major_strides, window_slabs


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


@dataclass(slots=True)
class Part:
    """A run of a file's bytes that is read into one buffer.

    Attributes:
        file: the file.
        offset: its first byte.
        nbytes: the number of bytes.
        how: how the place of the file is read best.
        into: where the bytes belong, where they need no change.
        moves: otherwise what is made of the bytes.
    """

    file: Path
    offset: int
    nbytes: int
    how: Requests
    into: memoryview | None = None
    moves: list[tuple[Move, Slice]] = field(default_factory=list)

    @property
    def end(self) -> int:
        """The byte of the file after its last one."""
        return self.offset + self.nbytes

    def takes(self, move: Move, most: int) -> bool:
        """Whether ``move`` can be read into this buffer too."""
        return (
            self.into is None
            and move.file == self.file
            # The last part of a long move may begin after the next move, where tensors share bytes.
            and move.offset >= self.offset
            and move.offset - self.end <= self.how.gap_bytes
            and move.offset + move.nbytes - self.offset <= most
            # torch views a buffer as elements only where they are aligned.
            and (move.offset - self.offset) % move.dtype.itemsize == 0
        )


@dataclass(slots=True)
class Request:
    """Parts of a file that are read in one request, in the order of their bytes.

    Attributes:
        parts: the parts; none overlaps another.
    """

    parts: list[Part]

    @property
    def how(self) -> Requests:
        """How the place of the file is read best."""
        return self.parts[0].how

    @property
    def file(self) -> Path:
        """The file."""
        return self.parts[0].file

    @property
    def offset(self) -> int:
        """Its first byte."""
        return self.parts[0].offset

    @property
    def nbytes(self) -> int:
        """The number of bytes, with those of gaps."""
        return self.parts[-1].end - self.offset

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffer that its parts need one after the other."""
        return max(part.nbytes if part.into is None else 0 for part in self.parts)

    def takes(self, part: Part) -> bool:
        """Whether ``part`` can be read in this request too."""
        last = self.parts[-1]
        return (
            self.how.part_bytes > 0
            and last.into is None
            and part.into is None
            and part.file == last.file
            and 0 <= part.offset - last.end <= self.how.gap_bytes
            and part.end - self.offset <= self.how.nbytes
        )


def requests_of(
    work: Iterable[tuple[Move, Slice]], buffer: bytearray, at_once: int
) -> Iterator[Request]:
    """Moves, sorted by file and offset, as few requests.

    Args:
        work: the moves, each with the slice that it belongs to.
        buffer: where runs that need no change are read to.
        at_once: the number of requests that are made at a time, if a place says no larger one.
    """
    pending: Request | None = None
    for part in _parts_of(work, buffer, at_once):
        if pending is not None and pending.takes(part):
            pending.parts.append(part)
            continue
        if pending is not None:
            yield pending
        pending = Request([part])
    if pending is not None:
        yield pending


def _parts_of(
    work: Iterable[tuple[Move, Slice]], buffer: bytearray, at_once: int
) -> Iterator[Part]:
    file, how = None, LOCAL
    count, most = at_once, LOCAL.nbytes
    pending: Part | None = None
    for move, piece in work:
        if move.file is not file and move.file != file:
            file, how = move.file, requests_for(move.file)
            count, most = max(how.at_once, at_once), how.part_bytes or how.nbytes
        if move.is_plain and move.nbytes >= how.gap_bytes:
            view = memoryview(buffer)[piece.at + move.at * move.dtype.itemsize :][: move.nbytes]
            step = how.nbytes if count > 1 else move.nbytes
            for start in range(0, move.nbytes, step):
                into = view[start : start + step]
                yield Part(file, move.offset + start, len(into), how, into)
            continue
        for small in split(move, most):
            if pending is None or not pending.takes(small, most):
                if pending is not None:
                    yield pending
                pending = Part(file, small.offset, small.nbytes, how)
            pending.nbytes = max(pending.end, small.offset + small.nbytes) - pending.offset
            pending.moves.append((small, piece))
    if pending is not None:
        yield pending


def split(move: Move, most: int) -> Iterator[Move]:
    """The move in parts of at most ``most`` bytes."""
    if move.nbytes <= most:
        yield move
        return
    if move.steps:
        for half in _halves(move):
            yield from split(half, most)
        return
    count = move.nbytes // move.dtype.itemsize
    step = max(most // move.dtype.itemsize, 1)
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


def _halves(move: Move) -> Iterator[Move]:
    """A run with steps, cut along its outermost axis."""
    size, step, stride = move.sizes[0], move.steps[0], move.strides[0]
    for first, last in ((0, size // 2), (size // 2, size)):
        kept = slice(1 if last - first == 1 and len(move.sizes) > 1 else 0, None)
        yield replace(
            move,
            offset=move.offset + first * step * move.dtype.itemsize,
            sizes=(last - first, *move.sizes[1:])[kept],
            at=move.at + first * stride,
            strides=move.strides[kept],
            steps=move.steps[kept],
        )
