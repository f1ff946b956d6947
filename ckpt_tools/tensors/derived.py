"""Owns derived tensors: casts, views and joins of tensors, without their data.

Each wraps tensors and rewrites their moves. A move is a contiguous run of a file that is scattered into a
window, and it stays one. To rewrite it is to compute the new places of the run's elements: arithmetic on
indices that are written in the digits of a shape. This module does no I/O and does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from ckpt_tools.tensors.catalogue import Move, Shape, Tensor, row_major_strides, window_slabs
from ckpt_tools.tensors.dtypes import DType


@dataclass(frozen=True)
class Cast(Tensor):
    """A tensor in another dtype, rounded to nearest even as torch rounds.

    Attributes:
        tensor: the tensor that is cast.
        dtype: element type of the result.
    """

    tensor: Tensor
    dtype: DType

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        """Sizes of the tensor that is cast."""
        return self.tensor.shape

    @property
    def pieces(self) -> int:
        """Number of runs of the tensor that is cast."""
        return self.tensor.pieces

    def moves(self, start: int, stop: int) -> Iterator[Move]:
        """The moves of the tensor that is cast, each with one more dtype."""
        for move in self.tensor.moves(start, stop):
            yield replace(move, dtypes=(*move.dtypes, self.dtype))


def cast(tensor: Tensor, dtype: DType) -> Tensor:
    """``tensor`` in ``dtype``; the tensor itself if it has that dtype or is not floating."""
    if tensor.dtype == dtype or not tensor.dtype.is_floating:
        return tensor
    return Cast(tensor, dtype)


@dataclass(frozen=True)
class View(Tensor):
    """The elements of another tensor in other places, as ``torch.as_strided`` picks them.

    Slices, chunks, transpositions, permutations and reshapes are views. If neighbours in the result are far
    apart in the source, runs of the source are scattered: a whole transposed matrix is one run.

    Attributes:
        tensor: the other tensor, seen as its row-major elements.
        offset: flat index in it of the first element.
        shape: sizes of the view.
        strides: distance in it between neighbours along each axis.

    Raises:
        ValueError: the view reaches outside the tensor.
    """

    tensor: Tensor
    offset: int
    shape: Shape
    strides: Shape

    def __post_init__(self) -> None:
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        lowest = min((self.offset, *self.shape, *self.strides))
        if lowest < 0 or (self.numel and self.offset + last >= self.tensor.numel):
            raise ValueError(f"a view {self.shape} outside its tensor {self.tensor.shape}")

    @property
    def dtype(self) -> DType:  # type: ignore[override]
        """Element type of the tensor that is viewed."""
        return self.tensor.dtype

    @property
    def pieces(self) -> int:
        """Number of runs from which a window is read, at most about the rows of a transposed matrix."""
        axes = [axis for axis, size in enumerate(self.shape) if size > 1]
        nearest = min(axes, key=lambda axis: self.strides[axis], default=len(self.shape))
        scattered = math.prod(self.shape[nearest + 1 :])
        share = -(-self.tensor.pieces * self.numel // max(self.tensor.numel, 1))
        return share + scattered - 1

    @property
    def is_one_run(self) -> bool:
        """Whether its elements are contiguous in the tensor that is viewed, in the same order."""
        return all(
            size == 1 or stride == whole
            for size, stride, whole in zip(
                self.shape, self.strides, row_major_strides(self.shape), strict=True
            )
        )

    def moves(self, start: int, stop: int) -> Iterator[Move]:
        """The moves of those runs of the other tensor that are in the window."""
        if self.is_one_run:
            yield from self.tensor.moves(self.offset + start, self.offset + stop)
            return
        for run in self._runs(start, stop):
            for move in self.tensor.moves(run.start, run.start + math.prod(run.sizes)):
                yield from _placed(move, run)

    def _runs(self, start: int, stop: int) -> list[_Run]:
        """The window as runs of the other tensor, each as long as possible."""
        places = row_major_strides(self.shape)
        runs = []
        for slab in window_slabs(self.shape, start, stop):
            source = self.offset + _dot(slab.offsets, self.strides)
            at = _dot(slab.offsets, places) - start
            axes = sorted(
                (stride, size, place)
                for size, stride, place in zip(slab.sizes, self.strides, places, strict=True)
                if size > 1
            )
            length = 1
            inner: list[tuple[int, int]] = []
            while axes and axes[0][0] == length:
                _, size, place = axes.pop(0)
                inner.insert(0, (size, place))
                length *= size
            sizes, strides = tuple(n for n, _ in inner), tuple(place for _, place in inner)
            for index in product(*(range(size) for _, size, _ in axes)):
                first = source + sum(
                    i * stride for i, (stride, _, _) in zip(index, axes, strict=True)
                )
                place = at + sum(i * place for i, (_, _, place) in zip(index, axes, strict=True))
                runs.append(_Run(first, sizes or (1,), strides or (1,), place))
        return _joined(runs)


@dataclass(frozen=True)
class Concat(Tensor):
    """Tensors joined along an axis, as ``torch.cat`` joins them.

    Attributes:
        parts: at least one tensor; all have one dtype, and one shape except along the axis.
        axis: the axis, counted from the first.

    Raises:
        ValueError: the parts do not fit each other.
    """

    parts: tuple[Tensor, ...]
    axis: int

    def __post_init__(self) -> None:
        rests = {
            (part.dtype, part.shape[: self.axis], part.shape[self.axis + 1 :])
            for part in self.parts
            if 0 <= self.axis < len(part.shape)
        }
        if len(rests) != 1 or any(self.axis >= len(part.shape) for part in self.parts):
            shapes = ", ".join(f"{part.dtype} {part.shape}" for part in self.parts)
            raise ValueError(f"cannot join along axis {self.axis}: {shapes}")

    @property
    def dtype(self) -> DType:  # type: ignore[override]
        """Element type of the parts."""
        return self.parts[0].dtype

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        """Sizes of the parts, added up along the axis."""
        shape = self.parts[0].shape
        total = sum(part.shape[self.axis] for part in self.parts)
        return (*shape[: self.axis], total, *shape[self.axis + 1 :])

    @property
    def pieces(self) -> int:
        """Number of runs of all parts."""
        return sum(part.pieces for part in self.parts)

    def moves(self, start: int, stop: int) -> Iterator[Move]:
        """The moves of each part's share of the window."""
        if start >= stop:
            return
        row = math.prod(self.shape[self.axis :])
        whole_from, whole_to = -(-start // row), stop // row
        if whole_from > whole_to:
            yield from self._row_moves(start // row, start, stop, row)
            return
        if start < whole_from * row:
            yield from self._row_moves(whole_from - 1, start, whole_from * row, row)
        if whole_from < whole_to:
            at = whole_from * row - start
            for part in self.parts:
                size = math.prod(part.shape[self.axis :])
                run = _Run(0, (whole_to - whole_from, size), (row, 1), at)
                for move in part.moves(whole_from * size, whole_to * size):
                    yield from _placed(move, run)
                at += size
        if whole_to * row < stop:
            yield from self._row_moves(
                whole_to, whole_to * row, stop, row, at=whole_to * row - start
            )

    def _row_moves(
        self, index: int, start: int, stop: int, row: int, at: int = 0
    ) -> Iterator[Move]:
        """The moves of a window in one row: the elements with the same indices in the axes before."""
        border = index * row
        for part in self.parts:
            size = math.prod(part.shape[self.axis :])
            low, high = max(start, border), min(stop, border + size)
            if low < high:
                first = index * size + low - border
                for move in part.moves(first, first + high - low):
                    yield replace(move, at=at + low - start + move.at)
            border += size


def view(tensor: Tensor, offset: int, shape: Shape, strides: Shape) -> Tensor:
    """A :class:`View`. A view of a view becomes one view of the inner tensor, if that is possible."""
    if isinstance(tensor, View):
        seen = strided(
            offset, tuple(zip(shape, strides, strict=True)), tensor.shape, tensor.strides
        )
        if seen is not None:
            return view(tensor.tensor, tensor.offset + seen[0], shape, seen[1])
    made = View(tensor, offset, shape, strides)
    return tensor if shape == tensor.shape and offset == 0 and made.is_one_run else made


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring elements of a tensor, and the place of each in a window.

    Attributes:
        start: flat index of the first element in the tensor.
        sizes: shape of the run, row-major; at least one axis.
        strides: distance in the window between neighbours along each axis.
        at: index of the first element in the window.
    """

    start: int
    sizes: Shape
    strides: Shape
    at: int


def _joined(runs: list[_Run]) -> list[_Run]:
    """The runs in the order of their starts; neighbours with the same stride are joined.

    A window of a transposed matrix begins and ends within a row. Without this, each element of these two rows
    would be a run of its own.
    """
    done: list[_Run] = []
    for run in sorted(runs, key=lambda run: run.start):
        last = done[-1] if done else None
        if last is not None and len(last.sizes) == len(run.sizes) == 1:
            stride = run.at - last.at if last.sizes == (1,) else last.strides[0]
            if (
                last.start + last.sizes[0] == run.start
                and last.at + last.sizes[0] * stride == run.at
                and (run.sizes == (1,) or run.strides[0] == stride)
                and stride > 0
            ):
                size = last.sizes[0] + run.sizes[0]
                done[-1] = _Run(last.start, (size,), (stride,), last.at)
                continue
        done.append(run)
    return done


def _placed(move: Move, run: _Run) -> Iterator[Move]:
    """A move into a run, as moves into the window of the run's elements."""
    axes = tuple(zip(move.sizes, move.strides, strict=True))
    for offset, sizes, strides, at in _parts(move.at, axes, run.sizes, run.strides):
        yield replace(
            move,
            offset=move.offset + offset * move.dtype.itemsize,
            sizes=sizes,
            strides=strides,
            at=run.at + at,
        )


_Axes = tuple[tuple[int, int], ...]


def _parts(
    start: int, axes: _Axes, shape: Shape, strides: Shape
) -> Iterator[tuple[int, Shape, Shape, int]]:
    """Cut a strided set of flat elements of ``shape`` so that each part is strided in ``strides`` too.

    Args:
        start: flat index of the first element.
        axes: size and stride of each axis of the set.
        shape: the shape whose row-major elements the indices count.
        strides: distance between neighbours along each axis of ``shape`` in the window.

    Yields:
        Each part: the position of its first element in the set, its sizes, its strides in the window
        and the place of its first element. A part is a run of the set.
    """
    axes = tuple(axis for axis in axes if axis[0] > 1) or ((1, 1),)
    seen = strided(start, axes, shape, strides)
    if seen is not None:
        at, steps = seen
        yield 0, tuple(size for size, _ in axes), steps, at
        return
    (count, step), rest = axes[0], axes[1:]
    if rest:
        length = math.prod(size for size, _ in rest)
        for index in range(count):
            for offset, *part in _parts(start + index * step, rest, shape, strides):
                yield (index * length + offset, *part)  # type: ignore[misc]
        return
    position = 0
    if step == 1:
        for slab in window_slabs(shape, start, start + count):
            kept = [(n, t) for n, t in zip(slab.sizes, strides, strict=True) if n > 1] or [(1, 1)]
            yield position, *map(tuple, zip(*kept, strict=True)), _dot(slab.offsets, strides)  # type: ignore[misc]
            position += slab.numel
        return
    while position < count:
        first = start + position * step
        length = min(_steps_without_carry(first, step, shape), count - position)
        seen = strided(first, ((length, step),), shape, strides)
        assert seen is not None
        yield position, (length,), seen[1], seen[0]
        position += length


def strided(start: int, axes: _Axes, shape: Shape, strides: Shape) -> tuple[int, Shape] | None:
    """The places of the elements of a strided set, if these are again a strided set.

    A step along an axis of the set adds its stride to the index. In the digits of ``shape``, this is one
    stride in the window as long as no digit carries.

    Returns:
        The place of the first element and the stride of each axis, or None if a digit carries.
    """
    digits = _digits(start, shape)
    tops = list(digits)
    steps = []
    for size, stride in axes:
        step = _digits(stride, shape) if size > 1 else (0,) * len(shape)
        for axis, digit in enumerate(step):
            tops[axis] += digit * (size - 1)
        steps.append(_dot(step, strides))
    if any(top >= max(size, 1) for top, size in zip(tops, shape, strict=True)):
        return None
    return _dot(digits, strides), tuple(steps)


def _steps_without_carry(start: int, step: int, shape: Shape) -> int:
    return min(
        (size - 1 - digit) // by + 1
        for size, digit, by in zip(shape, _digits(start, shape), _digits(step, shape), strict=True)
        if by
    )


def _digits(index: int, shape: Shape) -> Shape:
    """The index along each axis; the first axis takes what is too large for the shape."""
    digits = []
    for size in reversed(shape[1:]):
        index, digit = divmod(index, max(size, 1))
        digits.append(digit)
    if shape:
        digits.append(index)
    return tuple(reversed(digits))


def _dot(indices: Shape, strides: Shape) -> int:
    return sum(index * stride for index, stride in zip(indices, strides, strict=True))
