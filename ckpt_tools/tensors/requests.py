"""Owns which runs of a file's bytes are read in one request.

Moves that lie close to each other in a file are one request, up to the size that the place of the file
states.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
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
class Request:
    """A run of a file's bytes that is read at once.

    Attributes:
        file: the file.
        offset: its first byte.
        nbytes: the number of bytes.
        at_once: the number of requests that are made at a time.
        is_fetched: whether the bytes arrive in memory of a library.
        arriving: these bytes, where they were asked for before.
        into: where the bytes belong, where they need no change.
        moves: otherwise what is made of the bytes.
    """

    file: Path
    offset: int
    nbytes: int
    at_once: int
    is_fetched: bool = False
    arriving: Future[memoryview] | None = None
    into: memoryview | None = None
    moves: list[tuple[Move, Slice]] = field(default_factory=list)

    @property
    def is_scattered(self) -> bool:
        """Whether the bytes go through the scratch buffer."""
        return self.into is None and not self.is_fetched

    def takes(self, move: Move, requests: Requests) -> bool:
        """Whether ``move`` can be read in this request too."""
        return (
            self.into is None
            and move.file == self.file
            # The last part of a long move may begin after the next move, where tensors share bytes.
            and move.offset >= self.offset
            and move.offset - (self.offset + self.nbytes) <= requests.gap_bytes
            and move.offset + move.nbytes - self.offset <= requests.nbytes
            # torch views a buffer as elements only where they are aligned.
            and (move.offset - self.offset) % move.dtype.itemsize == 0
        )


def requests_of(
    work: Iterable[tuple[Move, Slice]], buffer: bytearray, at_once: int
) -> Iterator[Request]:
    """Moves, sorted by file and offset, as few requests."""
    file, requests = None, LOCAL
    count = at_once
    pending: Request | None = None
    for move, part in work:
        if move.file is not file and move.file != file:
            file, requests = move.file, requests_for(move.file)
            count = max(requests.at_once, at_once)
        if move.is_plain and move.nbytes >= requests.gap_bytes and not requests.fetched:
            view = memoryview(buffer)[part.at + move.at * move.dtype.itemsize :][: move.nbytes]
            step = requests.nbytes if count > 1 else move.nbytes
            for start in range(0, move.nbytes, step):
                into = view[start : start + step]
                yield Request(file, move.offset + start, len(into), count, into=into)
            continue
        for small in split(move, requests.nbytes):
            if pending is None or not pending.takes(small, requests):
                if pending is not None:
                    yield pending
                pending = Request(file, small.offset, small.nbytes, count, requests.fetched)
            end = max(pending.offset + pending.nbytes, small.offset + small.nbytes)
            pending.nbytes = end - pending.offset
            pending.moves.append((small, part))
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
