"""Compares two lazy tensors bit for bit, in windows, in flat memory.

Knows tensors and nothing else: what a difference means is for the caller to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ckpt_tools.tensors.catalogue import Tensor
from ckpt_tools.tensors.gather import Gatherer, Slice

_WINDOW_BYTES = 4 << 20
_SAMPLE = 256
_SAMPLES_PER_TENSOR = 64


def first_difference(
    gatherer: Gatherer, a: Tensor, b: Tensor, windows: Iterable[tuple[int, int]] | None = None
) -> int | None:
    """Index of the first flat element that differs in a bit, or None.

    Args:
        gatherer: reads both.
        a: a tensor.
        b: another, of the same dtype and number of elements.
        windows: which elements to look at; all by default.
    """
    if a.dtype != b.dtype or a.numel != b.numel:
        raise ValueError("only tensors of one dtype and size can be compared")
    itemsize = a.dtype.itemsize
    for start, stop in every_window(a) if windows is None else windows:
        nbytes = (stop - start) * itemsize
        left, right = bytearray(nbytes), bytearray(nbytes)
        gatherer.fill(left, [Slice(a, start, stop, 0)])
        gatherer.fill(right, [Slice(b, start, stop, 0)])
        if left != right:
            byte = next(i for i in range(nbytes) if left[i] != right[i])
            return start + byte // itemsize
    return None


def every_window(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Windows that cover the tensor."""
    step = max(_WINDOW_BYTES // tensor.dtype.itemsize, 1)
    for start in range(0, tensor.numel, step):
        yield start, min(start + step, tensor.numel)


def sample_windows(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """A few windows that together touch the ends of the tensor and of the runs that it is read from."""
    count = min(max(tensor.pieces, 2), _SAMPLES_PER_TENSOR)
    starts = {0, max(tensor.numel - _SAMPLE, 0)}
    starts |= {tensor.numel * i // count for i in range(count)}
    for start in sorted(starts):
        if start < tensor.numel:
            yield start, min(start + _SAMPLE, tensor.numel)
