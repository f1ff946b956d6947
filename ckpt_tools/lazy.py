"""Derived tensors: what a transform makes of stored ones without touching their data.

Each wraps tensors and answers :meth:`~ckpt_tools.catalogue.Tensor.moves` by rewriting theirs. No I/O, no
torch, no knowledge of formats or of why a tensor is derived.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ckpt_tools.catalogue import Move, Shape, Tensor
from ckpt_tools.dtypes import DType


@dataclass(frozen=True)
class Cast(Tensor):
    """A tensor in another dtype, rounded to nearest even as torch rounds.

    Attributes:
        tensor: what is cast.
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
        """The moves of the tensor that is cast, each one step longer."""
        for move in self.tensor.moves(start, stop):
            yield replace(move, dtypes=(*move.dtypes, self.dtype))


def cast(tensor: Tensor, dtype: DType) -> Tensor:
    """``tensor`` in ``dtype``; the tensor itself where nothing changes or where it is not floating."""
    if tensor.dtype == dtype or not tensor.dtype.is_floating:
        return tensor
    return Cast(tensor, dtype)
