"""Merges LoRA into its base: ``W' = W + s B A`` computed as it is written, window by window.

The sum is done in fp32 on the values that the model trained with, and rounded once, to the dtype of the
output. PEFT's ``merge_and_unload`` does the same in the dtypes of the live model: for a bf16 model it
rounds ``s B A`` to bf16 and then the sum to bf16 again, so up to a tenth of its elements lie one bf16
step beside the exact merge. On an fp32 copy of the model it gives the elements of this module.

The output may not depend on how it is cut into windows, and a matrix product may round otherwise in
another shape. So it is computed in tiles whose borders depend on the weight alone.

Sources: Hu et al. 2021, arXiv:2106.09685 (``s = alpha / r``); Kalajdzievski 2023, arXiv:2312.03732
(rsLoRA, ``s = alpha / sqrt(r)``); Liu et al. 2024, arXiv:2402.09353 (DoRA,
``W' = m (W + s B A) / ||W + s B A||``); ``peft/tuners/lora/layer.py``, ``variants.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ckpt_tools.tensors.catalogue import Computed, Shape, Tensor, Values
from ckpt_tools.tensors.derived import Concat, cast, view
from ckpt_tools.tensors.dtypes import FLOAT32, DType

if TYPE_CHECKING:
    import torch

# Elements of a tile: 1 MB of fp32, so that a tile and its product stay in the processor's cache.
_TILE = 1 << 18
# Products with fewer rows take other paths through a BLAS, with other sums.
_MIN_ROWS = 8


@dataclass(frozen=True, eq=False)
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

        if self.magnitude is not None and not self.transposed:
            # The norm of a row is that of all of it.
            parts = [
                self._scaled_rows(top, bottom, values).reshape(-1)[low:high]
                for top, bottom, low, high in self._tiles(start, stop)
            ]
            return torch.cat(parts)
        window = values.window(self.base, start, stop).float()
        factor = None
        if self.magnitude is not None:
            magnitude = values.whole(self.magnitude).float().view(-1)
            factor = magnitude / values.whole(self._column_norms)
        done = 0
        for top, bottom, low, high in self._tiles(start, stop):
            part = window[done : done + high - low]
            part += self._update(top, bottom, values).reshape(-1)[low:high]
            if factor is not None:
                part *= factor.expand(bottom - top, -1).reshape(-1)[low:high]
            done += high - low
        return window

    def _tiles(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """The tiles that a window touches: their rows, and which of their elements are in it."""
        height, width = self.shape
        rows = tile_rows(width)
        for top in range(start // width // rows * rows, (stop - 1) // width + 1, rows):
            bottom = min(top + rows, height)
            first = top * width
            yield top, bottom, max(start - first, 0), min(stop, bottom * width) - first

    def tile(self, top: int, bottom: int, values: Values) -> torch.Tensor:
        """Rows ``[top, bottom)`` of ``W + s B A``, before DoRA's scaling."""
        width = self.shape[1]
        base = values.window(self.base, top * width, bottom * width).float()
        return base.view(-1, width) + self._update(top, bottom, values)

    def _update(self, top: int, bottom: int, values: Values) -> torch.Tensor:
        """Rows ``[top, bottom)`` of ``s B A``, of its transpose where the base is stored so."""
        a = values.whole(self._factors[0])
        rank = a.shape[0] // self.experts
        a = a.view(self.experts, rank, -1)[self.expert]
        if self.transposed or self.experts > 1:
            b = values.whole(self._factors[1])
            b = b.view(-1, rank, self.experts)[:, :, self.expert]
        else:
            b = values.window(self.b, top * rank, bottom * rank).float().view(-1, rank)
        if self.transposed:
            product = (b @ a[:, top:bottom]).T
        else:
            product = (b[top:bottom] if self.experts > 1 else b) @ a
        update: torch.Tensor = product * self.scale
        return update

    def _scaled_rows(self, top: int, bottom: int, values: Values) -> torch.Tensor:
        import torch

        assert self.magnitude is not None
        tile = self.tile(top, bottom, values)
        magnitude = values.window(self.magnitude, top, bottom).float()
        scaled: torch.Tensor = (magnitude / torch.linalg.norm(tile, dim=1)).view(-1, 1) * tile
        return scaled

    @cached_property
    def _column_norms(self) -> ColumnNorms:
        return ColumnNorms(self)

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        """``A`` and ``B`` in fp32, each one object, so that a worker keeps its values."""
        return cast(self.a, FLOAT32), cast(self.b, FLOAT32)


@dataclass(frozen=True, eq=False)
class ColumnNorms(Computed):
    """The norm of each column of a merged matrix, before DoRA's scaling.

    Needs all of the matrix before the first element of it can be written: it is read twice by each worker,
    a tile at a time, and never held.
    """

    merged: Merged
    dtype: DType = FLOAT32

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        """One a column."""
        return (self.merged.shape[1],)

    @property
    def pieces(self) -> int:
        """Number of runs of the matrix."""
        return self.merged.pieces

    def compute(self, start: int, stop: int, values: Values) -> torch.Tensor:
        """The norms of the columns ``[start, stop)``, from those within each tile."""
        import torch

        height, width = self.merged.shape
        rows = tile_rows(width)
        norms = [
            torch.linalg.norm(self.merged.tile(top, min(top + rows, height), values).T, dim=1)
            for top in range(0, height, rows)
        ]
        whole: torch.Tensor = torch.linalg.norm(torch.stack(norms), dim=0)
        return whole[start:stop]


@dataclass(frozen=True, eq=False)
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
        """The sum over the window."""
        base = values.window(self.base, start, stop).float()
        return base + values.window(self.update, start, stop).float() * self.scale


def merged_experts(base: Tensor, a: Tensor, b: Tensor, scale: float, *, transposed: bool) -> Tensor:
    """A stack of matrices with their updates added: one :class:`Merged` an expert."""
    experts, height, width = base.shape
    parts: list[Tensor] = []
    for expert in range(experts):
        matrix = view(base, expert * height * width, (height, width), (width, 1))
        merged = Merged(matrix, a, b, scale, transposed, None, expert, experts)
        parts.append(view(merged, 0, (1, height, width), (height * width, width, 1)))
    return Concat(tuple(parts), 0)


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


def tile_rows(width: int) -> int:
    """Rows of a tile of a matrix with rows of ``width`` elements."""
    return max(_TILE // width, _MIN_ROWS)
