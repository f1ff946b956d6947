"""Owns the catalogue: a map from tensor name to dtype, shape and the bytes that hold the tensor.

A :class:`Stored` tensor lies in files, as fragments that tile it: every element is in exactly one fragment.
This is proven when the value is built, so no other module checks it again. :meth:`Tensor.moves` says which
runs of file bytes fill a row-major window. Transforms wrap tensors and rewrite the moves; the writer carries
them out. This module does no I/O and does not import torch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.tensors.dtypes import DType
from ckpt_tools.tensors.regions import Box as Box
from ckpt_tools.tensors.regions import FlatRange as FlatRange
from ckpt_tools.tensors.regions import Shape as Shape
from ckpt_tools.tensors.regions import collapsed, dot, intersection, is_possible
from ckpt_tools.tensors.regions import row_major_strides as row_major_strides
from ckpt_tools.tensors.regions import window_slabs as window_slabs
from ckpt_tools.tensors.runs import Strided as Strided
from ckpt_tools.tensors.runs import cut, span_of
from ckpt_tools.tensors.tiling import Consecutive, prove_boxes_tile, prove_ranges_tile
from ckpt_tools.tensors.tiling import Fragment as Fragment

if TYPE_CHECKING:
    import torch

    from ckpt_tools.tensors.rows import Rows


@dataclass(frozen=True, slots=True)
class Move:
    """One run of source elements and its place in a window.

    Attributes:
        source: the file that holds the run, or the computed tensor that it is part of.
        offset: first byte of the run in the file, or in the row-major computed tensor.
        dtype: element type in the source.
        sizes: shape of the run; its product is the number of elements.
        at: index of the run's first element in the window.
        strides: distance in the window, in elements, between neighbours along each of ``sizes``.
        dtypes: the dtypes of the casts, in order; the last is that of the window. A cast to bf16 and back to
            fp32 is two casts, and both are made.
        steps: distance in the source, in elements, between neighbours along each of ``sizes``; empty for a
            contiguous run. A run with steps is read with its gaps.
    """

    source: Path | Computed
    offset: int
    dtype: DType
    sizes: Shape
    at: int
    strides: Shape
    dtypes: tuple[DType, ...] = ()
    steps: Shape = ()

    @property
    def span(self) -> int:
        """Source elements of the run, gaps included."""
        return span_of(self.sizes, self.steps) if self.steps else math.prod(self.sizes)

    @property
    def nbytes(self) -> int:
        """Source bytes of the run, gaps included."""
        return self.span * self.dtype.itemsize

    @property
    def file(self) -> Path:
        """The file of a run that lies in a file."""
        assert isinstance(self.source, Path)
        return self.source

    @property
    def is_plain(self) -> bool:
        """Whether it copies bytes: nothing is cast, and the run is contiguous in the window."""
        return (
            isinstance(self.source, Path)
            and self.strides == (1,)
            and not self.steps
            and all(dtype == self.dtype for dtype in self.dtypes)
        )


class Tensor(ABC):
    """The description of a tensor, without its elements.

    Attributes:
        dtype: element type.
        shape: sizes.
    """

    # A model may have a hundred thousand tensors, each in several wrappers.
    __slots__ = ()
    dtype: DType
    shape: Shape

    @abstractmethod
    def moves(self, start: int, stop: int) -> Iterable[Move]:
        """The moves that fill the window of elements ``[start, stop)``, row-major."""

    @property
    @abstractmethod
    def pieces(self) -> int:
        """Number of runs from which it is read."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.numel * self.dtype.itemsize

    def load(self) -> torch.Tensor:
        """Read the whole tensor into memory.

        The CRC-32 of torch's record is not checked: a record may hold many tensors, and only whole records
        have a checksum. Conversions check it.

        Returns:
            A new contiguous CPU tensor of this dtype and shape.

        Raises:
            DamagedCheckpoint: a file is too short.
        """
        from ckpt_tools.tensors.gather import load

        return load(self)

    def __getitem__(self, index: Rows | tuple[object, ...]) -> torch.Tensor:
        """Read some rows alone: ``tensor[10:20]``; see :func:`ckpt_tools.tensors.rows.read_rows`."""
        from ckpt_tools.tensors.rows import read_rows

        return read_rows(self, index)

    def __repr__(self) -> str:
        return f"<{self.dtype.name} tensor of shape {list(self.shape)}, {self.nbytes:,} bytes>"


@dataclass(frozen=True, repr=False, slots=True)
class Stored(Tensor):
    """A tensor that lies in files.

    Attributes:
        dtype: element type in the files.
        shape: sizes.
        fragments: the runs that hold it, proven to tile it exactly; flat ranges in rising order. The
            sequence may make its fragments on demand.

    Raises:
        DamagedCheckpoint: no tensor can have the shape, or an element is in no fragment, or in several.
    """

    dtype: DType
    shape: Shape
    fragments: Sequence[Fragment]

    def __post_init__(self) -> None:
        if not is_possible(self.shape):
            raise DamagedCheckpoint(f"no tensor can have the shape {list(self.shape)}")
        if self._is_flat:
            prove_ranges_tile(self.fragments, self.numel)
        else:
            prove_boxes_tile(self.fragments, self.shape)

    @property
    def _is_flat(self) -> bool:
        fragments = self.fragments
        if isinstance(fragments, Consecutive) or not fragments:
            return True
        return isinstance(fragments[0].region, FlatRange)

    @property
    def pieces(self) -> int:
        """Number of fragments, or of the runs of a window of a fragment that is not row-major."""
        if len(self.fragments) == 1 and (layout := self.fragments[0].layout) is not None:
            axes = [axis for axis, size in enumerate(layout.sizes) if size > 1]
            nearest = min(axes, key=lambda axis: layout.strides[axis], default=len(layout.sizes))
            return math.prod(layout.sizes[nearest + 1 :])
        return len(self.fragments)

    def moves(self, start: int, stop: int) -> Iterator[Move]:
        """The parts of the fragments that lie in the window."""
        if self._is_flat:
            return self._flat_moves(start, stop)
        return self._box_moves(start, stop)

    def _flat_moves(self, start: int, stop: int) -> Iterator[Move]:
        itemsize = self.dtype.itemsize
        first = bisect_right(self.fragments, start, key=_range_start) - 1
        for index in range(max(first, 0), len(self.fragments)):
            fragment = self.fragments[index]
            region = fragment.region
            assert isinstance(region, FlatRange)
            if region.start >= stop:
                return
            low, high = max(start, region.start), min(stop, region.stop)
            if low < high and fragment.layout is not None:
                sizes = fragment.layout.sizes
                slabs = window_slabs(sizes, low - region.start, high - region.start)
                yield from self._strided_moves(fragment, slabs, region.start - start)
            elif low < high:
                yield Move(
                    fragment.file,
                    fragment.offset + (low - region.start) * itemsize,
                    self.dtype,
                    (high - low,),
                    low - start,
                    (1,),
                )

    def _box_moves(self, start: int, stop: int) -> Iterator[Move]:
        itemsize = self.dtype.itemsize
        strides = row_major_strides(self.shape)
        slabs = list(window_slabs(self.shape, start, stop))
        for fragment in self.fragments:
            box = fragment.region
            assert isinstance(box, Box)
            local_strides = row_major_strides(box.sizes)
            parts = [part for slab in slabs if (part := intersection(slab, box)) is not None]
            if parts and fragment.layout is not None:
                local = [Box(_minus(part.offsets, box.offsets), part.sizes) for part in parts]
                at = dot(box.offsets, strides) - start
                yield from self._strided_moves(fragment, local, at, strides)
                continue
            for part in parts:
                first = dot(_minus(part.offsets, box.offsets), local_strides)
                place = dot(part.offsets, strides)
                sizes, steps = collapsed(part.sizes, strides)
                yield Move(
                    fragment.file,
                    fragment.offset + first * itemsize,
                    self.dtype,
                    sizes,
                    place - start,
                    steps,
                )

    def _strided_moves(
        self, fragment: Fragment, slabs: Iterable[Box], at: int, places: Shape | None = None
    ) -> Iterator[Move]:
        """The moves of parts of a fragment that is not row-major.

        Args:
            fragment: the fragment.
            slabs: parts of its layout.
            at: place in the window of its first element.
            places: strides in the window; by default those of the layout's own sizes.
        """
        layout = fragment.layout
        assert layout is not None
        for run in cut(
            slabs, places or row_major_strides(layout.sizes), layout.strides, at=at, gaps=True
        ):
            yield Move(
                fragment.file,
                fragment.offset + run.start * self.dtype.itemsize,
                self.dtype,
                run.sizes,
                run.at,
                run.strides,
                steps=run.steps,
            )


class Values(Protocol):
    """Reads the elements of the tensors from which a tensor is computed."""

    def window(self, tensor: Tensor, start: int, stop: int) -> torch.Tensor:
        """Flat elements ``[start, stop)`` of ``tensor``, shape ``(stop - start,)``."""

    def whole(self, tensor: Tensor) -> torch.Tensor:
        """All of a small tensor, in its shape; kept for the next window that needs it."""


class Computed(Tensor):
    """A tensor whose elements are computed from those of other tensors, window by window."""

    @abstractmethod
    def compute(self, start: int, stop: int, values: Values) -> torch.Tensor:
        """Flat elements ``[start, stop)``: shape ``(stop - start,)``, of this tensor's dtype."""

    def moves(self, start: int, stop: int) -> Iterator[Move]:
        """The window itself, as one run of this tensor."""
        offset = start * self.dtype.itemsize
        yield Move(self, offset, self.dtype, (stop - start,), 0, (1,))


class Catalogue(Mapping[str, Tensor]):
    """An immutable, ordered map from tensor name to tensor.

    Args:
        tensors: the tensors, in the order in which the model names them.
        ties: for each name that is another name of one of ``tensors``, that tensor's name.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], ties: Mapping[str, str] | None = None
    ) -> None:
        self._tensors = dict(tensors)
        self.ties = MappingProxyType(dict(ties or {}))
        for alias, kept in self.ties.items():
            if kept not in self._tensors or alias in self._tensors:
                raise ValueError(f"tie {alias!r} -> {kept!r} does not fit the tensors")

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self.ties.get(name, name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, tied ones once."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    @property
    def numel(self) -> int:
        """Elements of all tensors, tied ones once."""
        return sum(tensor.numel for tensor in self._tensors.values())


def _minus(indices: Shape, origin: Shape) -> Shape:
    return tuple(index - low for index, low in zip(indices, origin, strict=True))


def _range_start(fragment: Fragment) -> int:
    assert isinstance(fragment.region, FlatRange)
    return fragment.region.start
