"""Owns the statistics of the values of tensors: extremes, norm, NaN, infinity and the share of zeros.

All values are converted to float64, which holds every float8, float16, bfloat16, float32 and 32-bit integer
exactly; 64-bit integers are rounded once. Sums are computed in float64. Windows are summed separately and
added in order, so the result does not depend on the number of threads. Memory is a few buffers a thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar

from ckpt_tools.tensors.catalogue import Tensor
from ckpt_tools.tensors.threads import default_workers
from ckpt_tools.tensors.windows import Meter, Window, visit_windows

if TYPE_CHECKING:
    import torch

K = TypeVar("K", bound=Hashable)

# Elements of a piece: its float64 copies stay in the processor's cache.
_PIECE = 1 << 15


@dataclass(frozen=True, slots=True)
class Statistics:
    """The statistics of the values of one tensor.

    Attributes:
        count: number of values.
        low: the smallest finite value; None if there is none. Of complex values, the smallest magnitude.
        high: the largest finite value; None if there is none. Of complex values, the largest magnitude.
        squares: sum of the squares of the finite values, in float64.
        nan: values that are NaN.
        inf: values that are infinite.
        zeros: values that are zero, of either sign.
    """

    count: int = 0
    low: float | None = None
    high: float | None = None
    squares: float = 0.0
    nan: int = 0
    inf: int = 0
    zeros: int = 0

    @property
    def norm(self) -> float:
        """The Euclidean norm of the finite values; infinite where float64 cannot hold the sum of squares."""
        return math.sqrt(self.squares)

    @property
    def root_mean_square(self) -> float | None:
        """The norm for each finite value, which does not grow with the size; None if no value is finite."""
        finite = self.count - self.nan - self.inf
        return math.sqrt(self.squares / finite) if finite else None

    @property
    def share_of_zeros(self) -> float | None:
        """The zeros among all values; None if there are no values."""
        return self.zeros / self.count if self.count else None

    def __add__(self, later: Statistics) -> Statistics:
        lows = [low for low in (self.low, later.low) if low is not None]
        highs = [high for high in (self.high, later.high) if high is not None]
        return Statistics(
            count=self.count + later.count,
            low=min(lows, default=None),
            high=max(highs, default=None),
            squares=self.squares + later.squares,
            nan=self.nan + later.nan,
            inf=self.inf + later.inf,
            zeros=self.zeros + later.zeros,
        )


def statistics_of(
    tensors: Mapping[K, Tensor],
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[K, Statistics]:
    """Read every value of the tensors.

    Args:
        tensors: the tensors, by name or by any other key.
        workers: number of threads; the result does not depend on it.
        progress: called with bytes done and bytes in all, from any thread.

    Raises:
        DamagedCheckpoint: a file is too short or cannot be read.
    """
    names, groups = list(tensors), [(tensor,) for tensor in tensors.values()]
    meter = Meter(progress, sum(tensor.nbytes for (tensor,) in groups))

    def visit(_: Window, elements: Sequence[torch.Tensor]) -> Statistics:
        return measured(elements[0])

    found = dict.fromkeys(names, Statistics())
    seen = visit_windows(groups, visit, workers=workers or default_workers(), progress=meter.add)
    for index, windows in groupby(seen, key=lambda pair: pair[0].group):
        total = Statistics()
        for _, part in windows:
            total += part
        found[names[index]] = total
    return found


def measured(values: torch.Tensor) -> Statistics:
    """The statistics of a flat tensor in memory."""
    total = Statistics()
    for start in range(0, len(values), _PIECE):
        total += _of_piece(values[start : start + _PIECE])
    return total


def _of_piece(values: torch.Tensor) -> Statistics:
    import torch

    if values.is_complex():
        values = values.to(torch.complex128).abs()
    numbers = values.to(torch.float64)
    squares = float((numbers * numbers).sum())
    nan = inf = 0
    finite = numbers
    if not math.isfinite(squares):
        nan, inf = int(numbers.isnan().sum()), int(numbers.isinf().sum())
        finite = numbers[numbers.isfinite()]
        squares = float((finite * finite).sum())
    return Statistics(
        count=len(numbers),
        low=float(finite.min()) if len(finite) else None,
        high=float(finite.max()) if len(finite) else None,
        squares=squares,
        nan=nan,
        inf=inf,
        zeros=int((numbers == 0).sum()),
    )
