"""The statistics of tensors, against sums in exact fractions and numpy in float64."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ckpt_tools.analysis.statistics import Statistics, measured, statistics_of
from ckpt_tools.readers.opening import open_weights
from ckpt_tools.tensors.windows import WINDOW

FLOATS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_float_is_measured_in_float64(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -0.0, 1.5, -3.25, 0.0625]).to(dtype)
    exact = [Fraction(float(value)) for value in values.double()]

    found = measured(values)

    assert (found.low, found.high) == (float(min(exact)), float(max(exact)))
    assert found.squares == float(sum(value * value for value in exact))
    assert (found.count, found.zeros, found.nan, found.inf) == (5, 2, 0, 0)
    assert found.share_of_zeros == 0.4
    assert found.root_mean_square == math.sqrt(found.squares / 5)


def test_a_value_beyond_float32_counts() -> None:
    found = measured(torch.tensor([1e200, -3e100], dtype=torch.float64))

    assert (found.low, found.high) == (-3e100, 1e200)
    assert math.isinf(found.norm)
    assert found.inf == 0


def test_nan_and_infinity_are_counted_and_left_out() -> None:
    values = torch.tensor([math.nan, math.inf, -math.inf, 3.0, -4.0, 0.0])

    found = measured(values)

    assert found == Statistics(count=6, low=-4.0, high=3.0, squares=25.0, nan=1, inf=2, zeros=1)
    assert found.norm == 5.0
    assert found.root_mean_square == math.sqrt(25 / 3)
    nothing = measured(torch.full((3,), math.nan))
    assert (nothing.low, nothing.high, nothing.norm, nothing.root_mean_square) == (
        None,
        None,
        0.0,
        None,
    )
    assert measured(torch.empty(0)).share_of_zeros is None


@pytest.mark.parametrize(
    ("values", "low", "high", "squares"),
    [
        (torch.tensor([-5, 7, 0], dtype=torch.int8), -5, 7, 74),
        (torch.tensor([2**31 - 1], dtype=torch.int32), 2**31 - 1, 2**31 - 1, (2**31 - 1.0) ** 2),
        (torch.tensor([True, False, True]), 0, 1, 2),
        (torch.tensor([3 + 4j, 0j]), 0, 5, 25),
    ],
    ids=["int8", "int32", "bool", "complex"],
)
def test_other_dtypes_are_measured_too(
    values: torch.Tensor, low: float, high: float, squares: float
) -> None:
    found = measured(values)

    assert (found.low, found.high, found.squares) == (low, high, squares)


def test_a_directory_is_streamed_and_threads_change_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    big = torch.randn(3, WINDOW // 2 + 7)
    big[1, 5] = math.nan
    state = {"big": big, "small": torch.zeros(4, dtype=torch.bfloat16), "none": torch.empty(0, 3)}
    save_file(state, tmp_path / "model.safetensors")
    tensors = dict(open_weights(tmp_path / "model.safetensors"))
    seen: list[tuple[int, int]] = []

    one = statistics_of(tensors, workers=1)
    several = statistics_of(tensors, workers=3, progress=lambda *done: seen.append(done))

    assert one == several
    held = big.numpy().astype(np.float64).ravel()
    assert one["big"].nan == 1
    assert one["big"].count == held.size
    assert one["big"].low == np.nanmin(held)
    assert one["big"].high == np.nanmax(held)
    assert one["big"].norm == pytest.approx(np.sqrt(np.nansum(held**2)), rel=1e-12)
    assert one["small"].zeros == 4
    assert one["none"] == Statistics()
    assert max(seen) == (sum(t.nbytes for t in tensors.values()),) * 2
