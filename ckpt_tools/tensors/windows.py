"""Owns the cutting of tensors into windows, the threads that read windows, and comparison bit for bit.

A window is the same elements of several tensors in memory at a time. Its borders depend only on the size of
the tensors, and the results of the windows come back in their order, so that a result that is computed from
them does not depend on the number of threads. Small windows, and small pieces of many ranks, are read many at
once. Memory is a few buffers for each thread, whatever the size of the tensors.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain
from queue import SimpleQueue
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from ckpt_tools.errors import CkptError
from ckpt_tools.tensors.catalogue import Tensor
from ckpt_tools.tensors.gather import Gatherer
from ckpt_tools.tensors.requests import Slice
from ckpt_tools.tensors.threads import casting_on_one_core, pool

if TYPE_CHECKING:
    import torch

R = TypeVar("R")
Progress = Callable[[int], None]

WINDOW = 1 << 19
_BATCH_BYTES = 4 << 20
_MAX_BATCH_BYTES = 32 << 20
# If a tensor lies in many pieces, a window should hold this many bytes of each.
_WORTHWHILE_READ = 64 << 10
_ALIGNMENT = 16
_SAMPLE = 256
_SAMPLES_PER_TENSOR = 64


class Window(NamedTuple):
    """Elements ``[start, stop)``, flat and row-major, of the tensors of one group."""

    group: int
    start: int
    stop: int


Group = Sequence[Tensor]
Visit = Callable[[Window, Sequence["torch.Tensor"]], R]


def windows_of(groups: Sequence[Group]) -> Iterator[Window]:
    """Windows that cover every group, each with at most ``WINDOW`` elements; none for empty tensors."""
    for index, group in enumerate(groups):
        numel = group[0].numel
        for start in range(0, numel, WINDOW):
            yield Window(index, start, min(start + WINDOW, numel))


def visit_windows(
    groups: Sequence[Group],
    visit: Visit[R],
    *,
    workers: int,
    windows: Iterable[Window] | None = None,
    progress: Progress | None = None,
    failed: Callable[[Window, CkptError], R] | None = None,
) -> Iterator[tuple[Window, R]]:
    """Call ``visit`` with each window of each group.

    Args:
        groups: groups of tensors. All groups have the same number of tensors; the tensors of a group have the
            same number of elements.
        visit: called in a thread with a window and, for each tensor of the group, its elements: shape
            ``(stop - start,)``, of its dtype, valid until the call returns.
        workers: number of threads.
        windows: the windows; those of :func:`windows_of` by default.
        progress: called with a number of bytes read, from any thread.
        failed: gives the result of a window that cannot be read; by default the error is raised.

    Yields:
        Each window and its result, in the order of the windows.

    Raises:
        DamagedCheckpoint: a file is too short or cannot be read.
    """
    batches = _batches(groups, windows_of(groups) if windows is None else windows)
    first = next(batches, None)
    if first is None:
        # Nothing is read, so torch is not imported.
        return
    spare: SimpleQueue[_Reader[R]] = SimpleQueue()
    for _ in range(workers):
        spare.put(_Reader(groups, visit, failed))

    def work(batch: list[Window]) -> list[R]:
        reader = spare.get()
        try:
            done = reader.read(batch)
        finally:
            spare.put(reader)
        if progress is not None:
            progress(sum(reader.nbytes(window) for window in batch))
        return done

    pending: deque[tuple[list[Window], Future[list[R]]]] = deque()
    try:
        with casting_on_one_core(), pool(workers) as threads:
            for batch in chain((first,), batches):
                pending.append((batch, threads.submit(work, batch)))
                if len(pending) > 2 * workers:
                    yield from _results(*pending.popleft())
            while pending:
                yield from _results(*pending.popleft())
    finally:
        while not spare.empty():
            spare.get().gatherer.close()


def _results(batch: list[Window], future: Future[list[R]]) -> Iterator[tuple[Window, R]]:
    return zip(batch, future.result(), strict=True)


def _batches(groups: Sequence[Group], windows: Iterable[Window]) -> Iterator[list[Window]]:
    """Lists of neighbouring windows that are read at once."""
    batch: list[Window] = []
    nbytes = pieces = 0
    for window in windows:
        group = groups[window.group]
        batch.append(window)
        nbytes += max(tensor.dtype.itemsize for tensor in group) * (window.stop - window.start)
        pieces = max(pieces, *(tensor.pieces for tensor in group))
        if nbytes >= min(max(_BATCH_BYTES, pieces * _WORTHWHILE_READ), _MAX_BATCH_BYTES):
            yield batch
            batch, nbytes, pieces = [], 0, 0
    if batch:
        yield batch


@dataclass
class _Reader(Generic[R]):
    """One thread's files and buffers."""

    groups: Sequence[Group]
    visit: Visit[R]
    failed: Callable[[Window, CkptError], R] | None

    def __post_init__(self) -> None:
        self.gatherer = Gatherer()
        self._buffers: list[bytearray] = []

    def nbytes(self, window: Window) -> int:
        """Bytes of a window in all tensors of its group."""
        count = window.stop - window.start
        return sum(tensor.dtype.itemsize * count for tensor in self.groups[window.group])

    def read(self, batch: list[Window]) -> list[R]:
        """The result of each window."""
        try:
            shown = self._shown(batch)
        except CkptError as error:
            if self.failed is None:
                raise
            if len(batch) == 1:
                return [self.failed(batch[0], error)]
            # One window cannot be read; the others are still visited.
            return [result for window in batch for result in self.read([window])]
        return [self.visit(window, tensors) for window, tensors in zip(batch, shown, strict=True)]

    def _shown(self, batch: list[Window]) -> list[list[torch.Tensor]]:
        import torch

        shown: list[list[torch.Tensor]] = [[] for _ in batch]
        for side in range(len(self.groups[batch[0].group])):
            slices, at = [], 0
            for window in batch:
                tensor = self.groups[window.group][side]
                slices.append(Slice(tensor, window.start, window.stop, at))
                at += (window.stop - window.start) * tensor.dtype.itemsize
                at += -at % _ALIGNMENT
            if side == len(self._buffers):
                self._buffers.append(bytearray())
            if len(self._buffers[side]) < at:
                self._buffers[side] = bytearray(at)
            self.gatherer.fill(self._buffers[side], slices)
            for part, tensors in zip(slices, shown, strict=True):
                dtype, count = part.tensor.dtype.torch, part.stop - part.start
                tensors.append(
                    torch.frombuffer(self._buffers[side], dtype=dtype, count=count, offset=part.at)
                )
        return shown


class Meter:
    """Counts bytes from many threads for a ``progress`` that takes bytes done and total bytes."""

    def __init__(self, progress: Callable[[int, int], None] | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0
        self._lock = threading.Lock()

    def expect(self, nbytes: int) -> None:
        """Add to the total number of bytes."""
        self._total += nbytes

    def add(self, nbytes: int) -> None:
        """Add to the number of bytes done."""
        if self._progress is not None:
            with self._lock:
                self._done += nbytes
                self._progress(self._done, self._total)


def first_difference(
    gatherer: Gatherer, a: Tensor, b: Tensor, windows: Iterable[tuple[int, int]] | None = None
) -> int | None:
    """Index of the first flat element that differs in a bit, or None.

    Args:
        gatherer: reads both.
        a: a tensor.
        b: another, of the same dtype and number of elements.
        windows: which elements to compare, as starts and stops; all by default.
    """
    if a.dtype != b.dtype or a.numel != b.numel:
        raise ValueError("only tensors of one dtype and size can be compared")
    for start, stop in (
        (window[1:] for window in windows_of([(a,)])) if windows is None else windows
    ):
        left, right = (gatherer.window(tensor, start, stop) for tensor in (a, b))
        if not same_bits(left, right):
            return start + int(unequal_elements(left, right).nonzero()[0])
    return None


def sample_windows(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """A few windows, as starts and stops, at the ends of the tensor and of the runs that it is read from."""
    count = min(max(tensor.pieces, 2), _SAMPLES_PER_TENSOR)
    starts = {0, max(tensor.numel - _SAMPLE, 0)}
    starts |= {tensor.numel * i // count for i in range(count)}
    for start in sorted(starts):
        if start < tensor.numel:
            yield start, min(start + _SAMPLE, tensor.numel)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two flat tensors of as many bytes hold the same bytes."""
    import torch

    left, right = a.view(torch.uint8), b.view(torch.uint8)
    whole = len(left) // 8 * 8
    # Eight bytes at a time: a comparison of single bytes takes seven times as long.
    return torch.equal(
        left[:whole].view(torch.int64), right[:whole].view(torch.int64)
    ) and torch.equal(left[whole:], right[whole:])


def unequal_elements(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A mask of the elements that differ in a bit, of two flat tensors of one dtype and size."""
    import torch

    unequal = a.view(torch.uint8) != b.view(torch.uint8)
    return unequal.view(-1, a.element_size()).any(dim=1)
