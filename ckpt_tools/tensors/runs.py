"""Owns runs: a strided set of elements, in the order in which its bytes lie in their source.

A tensor may lie in its storage with any strides: transposed, channels last, expanded (a stride of 0), or as a
view into a larger storage. A part of it is cut into runs. A run is read at once, with its gaps, and its
elements are put in place by two sets of strides: those in the source, and those in the window.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

from ckpt_tools.tensors.regions import Box, Shape, dot, row_major_strides

# A run may be this many times as long as its elements, or as long as this many elements.
_MOST_GAPS = 8
_SHORT = 1024


@dataclass(frozen=True, slots=True)
class Strided:
    """A layout of elements that is not row-major.

    Attributes:
        sizes: the shape whose row-major order counts the elements.
        strides: distance in the source between neighbours along each axis.
    """

    sizes: Shape
    strides: Shape


@dataclass(frozen=True, slots=True)
class Run:
    """Elements of a source, and the place of each in a window.

    Attributes:
        start: index of the first element in the source.
        sizes: shape of the run; at least one axis.
        strides: distance in the window between neighbours along each axis.
        at: index of the first element in the window.
        steps: distance in the source between neighbours along each axis; empty for a row-major
            run without gaps.
    """

    start: int
    sizes: Shape
    strides: Shape
    at: int
    steps: Shape = ()


def span_of(sizes: Shape, steps: Shape) -> int:
    """Number of neighbouring source elements in which a run lies, gaps included."""
    return 1 + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))


def cut(
    slabs: Iterable[Box],
    places: Shape,
    source: Shape,
    *,
    start: int = 0,
    at: int = 0,
    gaps: bool = False,
) -> list[Run]:
    """Parts of a strided tensor as runs, each as long as possible.

    Args:
        slabs: the parts.
        places: strides of the tensor in the window.
        source: its strides in the source.
        start: index of its first element in the source.
        at: index of its first element in the window.
        gaps: allow runs with gaps, and runs whose elements repeat.
    """
    runs = [
        run
        for slab in slabs
        for run in _runs(
            slab.sizes,
            source,
            places,
            start + dot(slab.offsets, source),
            at + dot(slab.offsets, places),
            gaps,
        )
    ]
    return _joined(runs)


def _runs(
    sizes: Shape, source: Shape, places: Shape, start: int, at: int, gaps: bool
) -> Iterator[Run]:
    axes = sorted(axis for axis in zip(source, sizes, places, strict=True) if axis[1] > 1)
    inner: list[tuple[int, int, int]] = []
    span = count = 1
    while axes:
        step, size, _ = axes[0]
        length = span + (size - 1) * step
        if step != span and not (gaps and length <= max(_MOST_GAPS * count * size, _SHORT)):
            break
        inner.insert(0, axes.pop(0))
        span, count = length, min(length, count * size)
    steps, lengths, strides = tuple(zip(*inner, strict=True)) or ((1,), (1,), (1,))
    if steps == row_major_strides(lengths):
        steps = ()
    for index in product(*(range(size) for _, size, _ in axes)):
        first = start + sum(i * step for i, (step, _, _) in zip(index, axes, strict=True))
        place = at + sum(i * place for i, (_, _, place) in zip(index, axes, strict=True))
        yield Run(first, lengths, strides, place, steps)


def _joined(runs: list[Run]) -> list[Run]:
    """The runs in the order of their starts; neighbours with the same stride are joined.

    A window of a transposed matrix begins and ends within a row. Without this, each element of these two rows
    would be a run of its own.
    """
    done: list[Run] = []
    for run in sorted(runs, key=lambda run: run.start):
        last = done[-1] if done else None
        if (
            last is not None
            and len(last.sizes) == len(run.sizes) == 1
            and not last.steps
            and not run.steps
        ):
            stride = run.at - last.at if last.sizes == (1,) else last.strides[0]
            if (
                last.start + last.sizes[0] == run.start
                and last.at + last.sizes[0] * stride == run.at
                and (run.sizes == (1,) or run.strides[0] == stride)
                and stride > 0
            ):
                size = last.sizes[0] + run.sizes[0]
                done[-1] = Run(last.start, (size,), (stride,), last.at)
                continue
        done.append(run)
    return done
