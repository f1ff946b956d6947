"""Owns the arithmetic of a difference between two tensors: counts, extremes and sums.

All sums are computed in float64. Pieces of a fixed size are summed separately and added in order, so the
result does not depend on the number of threads. Differences of integers are exact and are rounded once, to
float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Elements of a piece: its float64 copies stay in the processor's cache.
_PIECE = 1 << 15


@dataclass(frozen=True, slots=True)
class Tolerance:
    """An element of A counts as changed where ``|a - b| > atol + rtol * |b|``.

    Attributes:
        rtol: relative to the element of B.
        atol: absolute.
    """

    rtol: float = 0.0
    atol: float = 0.0

    @property
    def is_exact(self) -> bool:
        """Whether every difference counts, down to the sign of a zero and the bits of a NaN."""
        return not self.rtol and not self.atol


@dataclass(frozen=True, slots=True)
class Sums:
    """The statistics of some elements of two tensors.

    Attributes:
        changed: elements that differ.
        finite: elements that are finite in both. The other statistics cover these elements.
        largest: largest ``|a - b|``.
        total: sum of ``|a - b|``.
        squares: sum of ``|a - b|**2``.
        a_squares, b_squares: sums of ``|a|**2`` and ``|b|**2``.
        products: sum of ``a * b``, the real part.
        nan_a, nan_b: elements that are NaN.
        inf_a, inf_b: elements that are infinite.
    """

    changed: int = 0
    finite: int = 0
    largest: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    a_squares: float = 0.0
    b_squares: float = 0.0
    products: float = 0.0
    nan_a: int = 0
    nan_b: int = 0
    inf_a: int = 0
    inf_b: int = 0

    def __add__(self, other: Sums) -> Sums:
        added = {
            field.name: getattr(self, field.name) + getattr(other, field.name)
            for field in fields(self)
        }
        return Sums(**added | {"largest": max(self.largest, other.largest)})

    @property
    def mean(self) -> float:
        """Mean ``|a - b|``; 0 if no element is finite."""
        return self.total / self.finite if self.finite else 0.0

    @property
    def relative(self) -> float | None:
        """``||a - b|| / ||a||``; None if A is zero or too large for float64."""
        return _quotient(math.sqrt(self.squares), math.sqrt(self.a_squares))

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between A and B; None if one of them is zero."""
        norms = math.sqrt(self.a_squares) * math.sqrt(self.b_squares)
        cosine = _quotient(self.products, norms)
        return None if cosine is None else min(max(cosine, -1.0), 1.0)


def measure(a: torch.Tensor, b: torch.Tensor, tolerance: Tolerance) -> Sums:
    """Compare two flat tensors of the same size, element by element.

    With an exact tolerance, elements of one dtype are compared bit for bit. Otherwise values are compared,
    and a NaN equals a NaN.
    """
    sums = Sums()
    for start in range(0, len(a), _PIECE):
        sums += _measured(a[start : start + _PIECE], b[start : start + _PIECE], tolerance)
    return sums


def _measured(a: torch.Tensor, b: torch.Tensor, tolerance: Tolerance) -> Sums:
    import torch

    x, y, delta = _values(a, b)
    bits = tolerance.is_exact and a.dtype == b.dtype
    if bits:
        changed = a.view(_bits(a)) != b.view(_bits(b))
    else:
        changed = delta > tolerance.atol + tolerance.rtol * y.abs()
    total = float(delta.sum())
    nan_a = nan_b = inf_a = inf_b = 0
    if not math.isfinite(total):
        same = (x == y) | (x.isnan() & y.isnan())
        finite = x.isfinite() & y.isfinite()
        if not bits:
            changed = torch.where(finite, changed, ~same)
        nan_a, nan_b = int(x.isnan().sum()), int(y.isnan().sum())
        inf_a, inf_b = int(x.isinf().sum()), int(y.isinf().sum())
        x, y, delta = x[finite], y[finite], delta[finite]
        total = float(delta.sum())
    return Sums(
        changed=int(changed.sum()),
        finite=len(delta),
        largest=float(delta.max()) if len(delta) else 0.0,
        total=total,
        squares=float((delta * delta).sum()),
        a_squares=_square(x),
        b_squares=_square(y),
        products=float((x * y.conj()).real.sum() if x.is_complex() else (x * y).sum()),
        nan_a=nan_a,
        nan_b=nan_b,
        inf_a=inf_a,
        inf_b=inf_b,
    )


def _values(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both in float64 (complex128), and the distance of each pair."""
    import torch

    whole = [not (t.dtype.is_floating_point or t.dtype.is_complex) for t in (a, b)]
    if all(whole):
        (high_a, low_a), (high_b, low_b) = _halves(a), _halves(b)
        x, y = (high.double() * 2.0**32 + low.double() for high, low in (_halves(a), _halves(b)))
        delta = (high_a - high_b).double() * 2.0**32 + (low_a - low_b).double()
        return x, y, delta.abs_()
    dtype = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    x, y = a.to(dtype), b.to(dtype)
    return x, y, (x - y).abs_() if dtype == torch.float64 else (x - y).abs()


def _halves(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The upper and lower 32 bits of integers, as int64. Their differences cannot overflow."""
    import torch

    if values.dtype == torch.uint64:
        values = values.view(torch.int64)
        return (values >> 32) & 0xFFFFFFFF, values & 0xFFFFFFFF
    values = values.to(torch.int64)
    return values >> 32, values & 0xFFFFFFFF


def _bits(values: torch.Tensor) -> torch.dtype:
    """An integer dtype of the same size."""
    import torch

    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]


def _square(values: torch.Tensor) -> float:
    if values.is_complex():
        values = values.abs()
    return float((values * values).sum())


def _quotient(part: float, whole: float) -> float | None:
    quotient = part / whole if whole else math.nan
    return quotient if math.isfinite(quotient) else None
