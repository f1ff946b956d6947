"""The numbers of a change are those of NumPy in float64, of Python's integers where float64 is too short."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from ckpt_tools.analysis.change import Sums, Tolerance, measure

EXACT = Tolerance()
NAN, INF = math.nan, math.inf
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHORT = [torch.float8_e4m3fn, torch.float8_e5m2]


def randn(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def as_numpy(values: torch.Tensor) -> Any:
    return values.double().numpy()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [*FLOATS, *SHORT], ids=str)
@pytest.mark.parametrize("count", [1, 1000, (1 << 15) + 1, 200_001])
def test_statistics_are_those_of_numpy(dtype: torch.dtype, count: int) -> None:
    a = randn(count, 0).to(dtype)
    b = (a.float() + 0.1 * randn(count, 1)).to(dtype)

    found = measure(a, b, EXACT)

    x, y = as_numpy(a), as_numpy(b)
    distance = np.abs(x - y)
    assert found.changed == int(((x != y) | (np.signbit(x) != np.signbit(y))).sum())
    assert found.finite == count
    assert found.largest == distance.max()
    assert found.mean == pytest.approx(distance.mean(), rel=1e-12)
    assert found.relative == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-12)
    cosine = np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y)
    assert found.cosine == pytest.approx(cosine, rel=1e-12)
    assert (found.nan_a, found.nan_b, found.inf_a, found.inf_b) == (0, 0, 0, 0)


def test_the_pieces_are_summed_in_a_fixed_order() -> None:
    """What is measured in parts and added is what is measured at once, to the last bit."""
    a, b = randn(3 << 15, 0), randn(3 << 15, 1)

    parts = [measure(a[i << 15 :][: 1 << 15], b[i << 15 :][: 1 << 15], EXACT) for i in range(3)]

    assert parts[0] + parts[1] + parts[2] == measure(a, b, EXACT)
    assert Sums() + parts[0] == parts[0]


@pytest.mark.parametrize(
    ("dtype", "a", "b"),
    [
        (torch.int64, [2**63 - 1, 0, 2**53 + 1], [-(2**63), 0, 2**53]),
        (torch.uint64, [2**64 - 1, 5, 2**63 + 1], [0, 7, 2**63]),
        (torch.int32, [2**31 - 1, 3, -4], [-(2**31), 3, 4]),
        (torch.uint32, [2**32 - 1, 3, 0], [0, 4, 9]),
        (torch.int16, [2**15 - 1, 3], [-(2**15), 3]),
        (torch.uint16, [2**16 - 1, 3], [0, 4]),
        (torch.int8, [127, 3], [-128, 4]),
        (torch.uint8, [255, 3], [0, 3]),
        (torch.bool, [True, False, True], [False, False, True]),
    ],
    ids=lambda value: str(value) if isinstance(value, torch.dtype) else "",
)
def test_integers_are_compared_exactly(dtype: torch.dtype, a: list[int], b: list[int]) -> None:
    found = measure(torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype), EXACT)

    distance = [abs(int(x) - int(y)) for x, y in zip(a, b, strict=True)]
    assert found.changed == sum(d > 0 for d in distance)
    assert found.largest == float(max(distance))
    assert found.mean == pytest.approx(sum(distance) / len(a), rel=1e-15)
    norm = math.sqrt(sum(int(x) ** 2 for x in a))
    assert found.relative == pytest.approx(
        math.sqrt(sum(d * d for d in distance)) / norm, rel=1e-12
    )


def test_integers_of_other_sizes_are_compared_by_value() -> None:
    a, b = torch.tensor([2**63 - 1, -1, 7]), torch.tensor([2**63 - 1, 5, 7], dtype=torch.uint64)
    found = measure(a, b, EXACT)

    assert (found.changed, found.largest) == (1, 6.0)
    assert measure(torch.tensor([1, 0]), torch.tensor([True, False]), EXACT).changed == 0


def test_a_complex_number_is_one_element() -> None:
    a, b = torch.tensor([1 + 1j, 2 + 0j, 0j]), torch.tensor([1 + 1j, 2 - 3j, 4j])
    found = measure(a, b, EXACT)

    assert (found.changed, found.largest, found.mean) == (2, 4.0, 7 / 3)
    assert found.relative == pytest.approx(5 / math.sqrt(6))
    assert found.cosine == pytest.approx(6 / math.sqrt(6) / math.sqrt(2 + 13 + 16))


# -- what counts as changed ------------------------------------------------------------------------


def test_without_a_tolerance_every_bit_counts() -> None:
    other_nan = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    a = torch.cat([torch.tensor([0.0, NAN, 1.0]), other_nan])
    b = torch.cat([torch.tensor([-0.0, NAN, 1.0]), torch.tensor([NAN])])
    found = measure(a, b, EXACT)

    assert found.changed == 2
    assert found.largest == 0.0
    assert (found.nan_a, found.nan_b) == (2, 2)


def test_tensors_of_two_dtypes_are_compared_by_value() -> None:
    a = torch.tensor([0.0, NAN, 1.0, INF, 0.1])
    b = torch.tensor([-0.0, NAN, 1.0, INF, 0.1]).bfloat16()
    found = measure(a, b, EXACT)

    assert found.changed == 1
    assert found.largest == abs(float(a[4]) - float(b[4]))


@pytest.mark.parametrize(
    ("rtol", "atol", "changed"),
    [
        (0.0, 0.5, [False, False, True, True, False]),
        (0.1, 0.0, [True, False, True, False, False]),
        (0.1, 0.1, [False, False, True, False, False]),
        (0.0, 10.0, [False] * 5),
    ],
)
def test_the_tolerance_is_that_of_numpy(rtol: float, atol: float, changed: list[bool]) -> None:
    a = torch.tensor([0.1, 1.0, 3.0, 99.0, -5.0], dtype=torch.float64)
    b = torch.tensor([0.0, 1.1, 1.5, 100.0, -5.0], dtype=torch.float64)

    assert (~np.isclose(a.numpy(), b.numpy(), rtol=rtol, atol=atol)).tolist() == changed
    assert measure(a, b, Tolerance(rtol, atol)).changed == sum(changed)


@pytest.mark.parametrize(
    ("a", "b", "changed"),
    [
        (NAN, NAN, False),
        (NAN, 1.0, True),
        (1.0, NAN, True),
        (INF, INF, False),
        (-INF, INF, True),
        (INF, 1.0, True),
        (1.0, INF, True),
        (NAN, INF, True),
        (0.0, -0.0, False),
    ],
)
def test_what_is_not_finite_differs_from_all_but_itself(a: float, b: float, changed: bool) -> None:
    """By value, with any tolerance: that of an infinite b would be infinite."""
    left, right = torch.tensor([a, 1.0]), torch.tensor([b, 1.0])
    for tolerance in (Tolerance(0.0, 1e-9), Tolerance(0.5, 0.5)):
        assert measure(left, right, tolerance).changed == changed
    assert measure(left, right.double(), EXACT).changed == changed


def test_statistics_are_of_what_is_finite_on_both_sides() -> None:
    a = torch.tensor([NAN, INF, 1.0, 2.0, 5.0, -INF])
    b = torch.tensor([1.0, 2.0, 1.0, 4.0, NAN, -INF])
    found = measure(a, b, EXACT)

    assert (found.changed, found.finite) == (4, 2)
    assert (found.largest, found.mean) == (2.0, 1.0)
    assert found.relative == pytest.approx(2 / math.sqrt(5))
    assert found.cosine == pytest.approx(9 / math.sqrt(5) / math.sqrt(17))
    assert (found.nan_a, found.nan_b, found.inf_a, found.inf_b) == (1, 1, 2, 1)


def test_where_nothing_is_finite_there_are_no_statistics() -> None:
    found = measure(torch.full((3,), NAN), torch.full((3,), INF), EXACT)

    assert (found.changed, found.finite, found.largest, found.mean) == (3, 0, 0.0, 0.0)
    assert found.relative is None
    assert found.cosine is None


def test_a_change_from_zero_has_no_relative_size() -> None:
    found = measure(torch.zeros(3), torch.ones(3), EXACT)

    assert found.relative is None
    assert found.cosine is None
    assert measure(torch.ones(3), torch.zeros(3), EXACT).relative == 1.0


def test_a_cosine_is_never_beyond_one() -> None:
    a = randn(5000, 3)

    assert measure(a, a * 2, EXACT).cosine == pytest.approx(1.0)
    assert (measure(a, a * 2, EXACT).cosine or 2) <= 1.0
    assert (measure(a, -a * 3, EXACT).cosine or -2) >= -1.0


def test_numbers_too_large_for_a_square_say_so() -> None:
    a = torch.tensor([1e200, 1.0], dtype=torch.float64)
    found = measure(a, a * 2, EXACT)

    assert (found.changed, found.largest) == (2, 1e200)
    assert found.relative is None


def test_nothing_is_like_nothing() -> None:
    assert measure(torch.empty(0), torch.empty(0), EXACT) == Sums()
    assert Sums().mean == 0.0
