"""Owns the merge of LoRA into its base: ``W' = W + s B A``, computed window by window during the write.

The values that the model trained with are merged, as PEFT's ``merge_and_unload`` merges an fp32 copy of the
model. PEFT computes in fp32, in the order that its BLAS chooses.

**The arithmetic.** ``A`` and ``B`` are taken in fp32. Everything else is fp64, one element at a time, in this
order:

    u = 0;  u = u + b_k a_k  for k = 0 ... r - 1;  v = s u + W;  then DoRA;  round to fp32

A 16-bit output is rounded once more. DoRA adds the squares of a row of ``v`` by halving it
(:func:`_row_sums`), those of a column from the first to the last, and multiplies ``v`` with
``m / sqrt(sum)``.

**What holds.** The output is the same, bit for bit, for any windows, tiles, threads and ranks, and on every
processor with IEEE 754 arithmetic (NaNs excepted: IEEE leaves their bits open).

- A product of two fp32 numbers has at most 48 bits, so it is exact in fp64. A fused multiply-add, which some
  processors use, gives the same sum as a product and an addition.
- Every other step is one addition, product, quotient, root or conversion, each rounded as IEEE says. No step
  depends on how many elements are computed at once. ``torch.sum``, ``torch.linalg.norm`` and matrix products
  do. ``torch.add(alpha=)`` may be fused. ``torch.sqrt`` of fp64 is MKL's on x86, and one bit off for one
  number in eighty.

**How exact it is.** ``v`` differs from the exact merge by at most
``(r + 1) 2**-53 (|W| + |s| sum |b_k a_k|)``, to first order. So the fp32 result is the exact merge correctly
rounded, except where that lies as close to the middle between two fp32 numbers: for at most one element in
``2**28 / (r + 1)`` where terms do not cancel.
PEFT's fp32 result may differ from it by ``2**-24 ((r + 2) |s| sum |b_k a_k| + 2 |W'|)``. Measured on random
matrices of 4096 x 4096 with r = 16 and r = 64: 9 % and 23 % of the fp32 elements differ, by up to
7e-8 of the largest; rounded to bf16, 78 and 275 of 16.8 million. On the adapters in ``fixtures/`` no bf16
element differs.

**What it costs.** Seconds of one core for 4096 x 4096 in bf16, reading included:

    an fp32 product, in tiles of one size      0.03 (r = 16)  0.05 (r = 64)
    an fp64 product, in tiles of one size      0.05           0.10
    the order above                            0.09           0.26

An fp32 product has other bits on another processor. So has an fp64 product that is rounded to fp32, for
about as few elements as are not correctly rounded: some dozens in a model of 7 B parameters, enough for
another digest. MKL's reproducible mode holds for the whole process, has to be set before torch is imported,
and exists on x86 only.

Sources: Hu et al. 2021, arXiv:2106.09685 (``s = alpha / r``); Kalajdzievski 2023, arXiv:2312.03732
(rsLoRA, ``s = alpha / sqrt(r)``); Liu et al. 2024, arXiv:2402.09353 (DoRA,
``W' = m (W + s B A) / ||W + s B A||``); ``peft/tuners/lora/layer.py``, ``variants.py``; Higham 2002,
"Accuracy and Stability of Numerical Algorithms", 3.1 (the error of a sum of products).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ckpt_tools.tensors.catalogue import Computed, Shape, Tensor, Values
from ckpt_tools.tensors.derived import Concat, cast, view
from ckpt_tools.tensors.dtypes import FLOAT32, FLOAT64, DType

if TYPE_CHECKING:
    import torch

# Elements of a tile: 512 KB of fp64, so that it stays in the processor's cache while r products are added.
_TILE = 1 << 16


@dataclass(frozen=True, repr=False, eq=False)
class Merged(Computed):
    """A matrix with its update added, in fp32.

    Attributes:
        base: ``W``, of shape (out, in), or (in, out) if ``transposed``.
        a: ``A``, (experts * r, in).
        b: ``B``, (out, experts * r).
        scale: ``s``.
        transposed: ``W`` is stored as (in, out): GPT-2's Conv1D, embeddings, some experts.
        magnitude: DoRA's ``m``, one a row of ``B``; None for plain LoRA.
        expert: which of ``experts`` this matrix is. Their rows of ``A`` lie one after the other; their
            columns of ``B`` alternate.
        experts: how many matrices ``a`` and ``b`` are for.
    """

    base: Tensor
    a: Tensor
    b: Tensor
    scale: float
    transposed: bool = False
    magnitude: Tensor | None = None
    expert: int = 0
    experts: int = 1
    dtype: DType = FLOAT32

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        """Sizes of the base."""
        return self.base.shape

    @property
    def pieces(self) -> int:
        """Number of runs of the base; the factors are read once."""
        return self.base.pieces

    def compute(self, start: int, stop: int, values: Values) -> torch.Tensor:
        """``W + s B A`` in the window; with DoRA each row or column scaled to its magnitude."""
        import torch

        merged = torch.empty(stop - start, dtype=torch.float32)
        # The norm of a row is that of all of it, whatever the window shows.
        by_row = self.magnitude is not None and not self.transposed
        base = None if by_row else values.window(self.base, start, stop)
        done = 0
        for top, bottom, low, high in self._tiles(start, stop):
            end = done + high - low
            if base is None:
                tile = self.tile(top, bottom, values)
                part = tile.mul_(self._row_factors(tile, top, values)).view(-1)[low:high]
            else:
                part = self._update(top, bottom, values).view(-1)[low:high].add_(base[done:end])
                if self.magnitude is not None:
                    factors = self._column_factors(values).expand(bottom - top, -1)
                    part *= factors.reshape(-1)[low:high]
            merged[done:end] = part
            done = end
        return merged

    def _tiles(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """The rows that a window touches, some at a time, and which of their elements are in it."""
        width = self.shape[1]
        last = (stop - 1) // width + 1
        for top, bottom in tiles(start // width, last, width):
            first = top * width
            yield top, bottom, max(start - first, 0), min(stop, bottom * width) - first

    def tile(self, top: int, bottom: int, values: Values) -> torch.Tensor:
        """Rows ``[top, bottom)`` of ``W + s B A`` in fp64, before DoRA's scaling."""
        width = self.shape[1]
        base = values.window(self.base, top * width, bottom * width)
        return self._update(top, bottom, values).add_(base.view(-1, width))

    def _update(self, top: int, bottom: int, values: Values) -> torch.Tensor:
        """Rows ``[top, bottom)`` of ``s B A`` in fp64, of its transpose where the base is stored so."""
        import torch

        columns, rows = self._vectors(top, bottom, values)
        update = torch.zeros(bottom - top, self.shape[1], dtype=torch.float64)
        for column, row in zip(columns, rows, strict=True):
            # The products are exact, so that it makes no difference whether this is a fused operation.
            update.addcmul_(column.double().unsqueeze(1), row.double())
        return update.mul_(self.scale)

    def _vectors(self, top: int, bottom: int, values: Values) -> tuple[torch.Tensor, torch.Tensor]:
        """In fp32 the r columns and r rows whose products add up to these rows of the update."""
        a = values.whole(self._factors[0])
        rank = a.shape[0] // self.experts
        a = a.view(self.experts, rank, -1)[self.expert]
        if not self.transposed and self.experts == 1:
            b = values.window(self.b, top * rank, bottom * rank).float().view(-1, rank)
            return b.T, a
        b = values.whole(self._factors[1]).view(-1, rank, self.experts)[:, :, self.expert]
        return (a[:, top:bottom], b.T) if self.transposed else (b[top:bottom].T, a)

    def _row_factors(self, tile: torch.Tensor, top: int, values: Values) -> torch.Tensor:
        """What DoRA multiplies each row of a tile with, given all of its rows."""
        assert self.magnitude is not None
        magnitude = values.window(self.magnitude, top, top + len(tile)).double()
        return (magnitude / roots(_row_sums(tile * tile))).unsqueeze(1)

    def _column_factors(self, values: Values) -> torch.Tensor:
        """What DoRA multiplies each column with."""
        assert self.magnitude is not None
        magnitude = values.whole(self.magnitude).double().view(-1)
        return magnitude / values.whole(self._column_norms)

    @cached_property
    def _column_norms(self) -> ColumnNorms:
        return ColumnNorms(self)

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        """``A`` and ``B`` in fp32, each one object, so that a worker keeps its values."""
        return cast(self.a, FLOAT32), cast(self.b, FLOAT32)


@dataclass(frozen=True, repr=False, eq=False)
class ColumnNorms(Computed):
    """The norm of each column of a merged matrix in fp64, before DoRA's scaling.

    Needs all of the matrix before the first element of it can be written: it is read twice by each worker,
    a tile at a time, and never held.
    """

    merged: Merged
    dtype: DType = FLOAT64

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        """One a column."""
        return (self.merged.shape[1],)

    @property
    def pieces(self) -> int:
        """Number of runs of the matrix."""
        return self.merged.pieces

    def compute(self, start: int, stop: int, values: Values) -> torch.Tensor:
        """The norms of the columns ``[start, stop)``: their squares added row by row."""
        import torch

        height, width = self.merged.shape
        total = torch.zeros(width, dtype=torch.float64)
        for top, bottom in tiles(0, height, width):
            tile = self.merged.tile(top, bottom, values)
            for squares in tile.mul_(tile):
                total += squares
        return roots(total[start:stop])


@dataclass(frozen=True, repr=False, eq=False)
class MergedBias(Computed):
    """A bias and its update, ``c + s b``, in fp32 (``lora_bias``)."""

    base: Tensor
    update: Tensor
    scale: float
    dtype: DType = FLOAT32

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        """Sizes of the base."""
        return self.base.shape

    @property
    def pieces(self) -> int:
        """Number of runs of both."""
        return self.base.pieces + self.update.pieces

    def compute(self, start: int, stop: int, values: Values) -> torch.Tensor:
        """The sum over the window, in fp64 and rounded once."""
        update = values.window(self.update, start, stop).double()
        return update.mul_(self.scale).add_(values.window(self.base, start, stop)).float()


def merged_experts(base: Tensor, a: Tensor, b: Tensor, scale: float, *, transposed: bool) -> Tensor:
    """A stack of matrices with their updates added: one :class:`Merged` an expert."""
    experts, height, width = base.shape
    parts: list[Tensor] = []
    for expert in range(experts):
        matrix = view(base, expert * height * width, (height, width), (width, 1))
        merged = Merged(matrix, a, b, scale, transposed, None, expert, experts)
        parts.append(view(merged, 0, (1, height, width), (height * width, width, 1)))
    return Concat(tuple(parts), 0)


def merged_kernel(
    base: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None
) -> Tensor:
    """The kernel of a convolution with its update added.

    A convolution with a kernel of 1 after another one multiplies the kernel of that as a matrix: of its
    outputs, and of all other axes.
    """
    matrix = Merged(
        _as_matrix(base),
        _as_matrix(a),
        _as_matrix(b),
        scale,
        magnitude=None if magnitude is None else _flat(magnitude),
    )
    return view(matrix, 0, base.shape, _row_major(base.shape))


def _as_matrix(tensor: Tensor) -> Tensor:
    rows, columns = tensor.shape[0], math.prod(tensor.shape[1:])
    return view(tensor, 0, (rows, columns), (columns, 1))


def _flat(tensor: Tensor) -> Tensor:
    return view(tensor, 0, (tensor.numel,), (1,))


def _row_major(shape: Shape) -> Shape:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def with_rows(base: Tensor, rows: Tensor, indices: Sequence[int]) -> Tensor:
    """``base`` with row ``indices[i]`` replaced by row ``i`` of ``rows`` (trainable tokens)."""
    width = base.shape[1]
    rows = cast(rows, base.dtype)
    parts: list[Tensor] = []

    def take(tensor: Tensor, first: int, count: int) -> None:
        if count:
            parts.append(view(tensor, first * width, (count, width), (width, 1)))

    done = 0
    for index, row in sorted((index, row) for row, index in enumerate(indices)):
        take(base, done, index - done)
        take(rows, row, 1)
        done = index + 1
    take(base, done, base.shape[0] - done)
    return Concat(tuple(parts), 0)


def tiles(top: int, bottom: int, width: int) -> Iterator[tuple[int, int]]:
    """Rows ``[top, bottom)`` of a matrix with rows of ``width`` elements, a tile at a time."""
    rows = max(_TILE // width, 1)
    for first in range(top, bottom, rows):
        yield first, min(first + rows, bottom)


def _row_sums(elements: torch.Tensor) -> torch.Tensor:
    """The sum of each row, in an order of its own: the second half is added to the first, and so on.

    ``elements`` is used up.
    """
    while (width := elements.shape[1]) > 1:
        half = (width + 1) // 2
        elements[:, : width - half] += elements[:, half:]
        elements = elements[:, :half]
    return elements[:, 0]


def roots(squares: torch.Tensor) -> torch.Tensor:
    """The square roots, correctly rounded; those of ``torch.sqrt`` are not."""
    import torch

    return torch.tensor([math.sqrt(square) for square in squares.tolist()], dtype=torch.float64)
