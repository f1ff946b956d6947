"""Two tensors are compared bit for bit, and the first difference is found, wherever it lies."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tools.tensors.catalogue import FlatRange, Fragment, Stored
from ckpt_tools.tensors.derived import cast
from ckpt_tools.tensors.dtypes import FLOAT32
from ckpt_tools.tensors.gather import Gatherer
from ckpt_tools.tensors.windows import first_difference, sample_windows
from tests.writing.test_bytes import on_disk, one_run


def difference(directory: Path, a: torch.Tensor, b: torch.Tensor) -> int | None:
    left, right = one_run(directory / "a", a), one_run(directory / "b", b)
    with Gatherer() as gatherer:
        return first_difference(gatherer, left, right)


@pytest.mark.parametrize("at", [0, 1, 1_048_575, 1_048_576, 2_500_000, 2_999_999])
def test_the_first_of_two_differences_is_found_in_any_window(tmp_path: Path, at: int) -> None:
    a = torch.arange(3_000_000, dtype=torch.int32)
    b = a.clone()
    b[at] ^= 1 << 31
    b[-1] = 7

    assert difference(tmp_path, a, b) == at


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int8, torch.bool], ids=str)
def test_the_index_counts_elements_not_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    a = torch.zeros(5, 7, dtype=dtype)
    b = a.clone()
    b[3, 4] = 1

    assert difference(tmp_path, a, b) == 3 * 7 + 4
    assert difference(tmp_path, a, a.clone()) is None


def test_bits_are_compared_not_values(tmp_path: Path) -> None:
    zeros = torch.tensor([0.0, -0.0, 0.0])
    nan = torch.tensor([1.0, float("nan")])

    assert difference(tmp_path, torch.zeros(3), zeros) == 1
    assert difference(tmp_path, nan, nan.clone()) is None


def test_how_a_tensor_is_cut_does_not_matter(tmp_path: Path) -> None:
    values = torch.randn(1000, 33, generator=torch.Generator().manual_seed(0))
    cut = on_disk(tmp_path / "cut", {"x": values}, pieces=13)["x"]
    whole = one_run(tmp_path / "whole", values.bfloat16())

    with Gatherer() as gatherer:
        assert first_difference(gatherer, cast(cut, whole.dtype), whole) is None


def test_only_the_windows_that_are_asked_for_are_looked_at(tmp_path: Path) -> None:
    a, b = torch.zeros(100), torch.zeros(100)
    b[50] = 1
    left, right = one_run(tmp_path / "a", a), one_run(tmp_path / "b", b)

    with Gatherer() as gatherer:
        assert first_difference(gatherer, left, right, [(0, 50), (51, 100)]) is None
        assert first_difference(gatherer, left, right, [(49, 51)]) == 50


def test_tensors_of_another_dtype_or_size_cannot_be_compared(tmp_path: Path) -> None:
    for other in (torch.zeros(4), torch.zeros(3, dtype=torch.int32)):
        with pytest.raises(ValueError, match="one dtype and size"):
            difference(tmp_path, torch.zeros(3), other)


def described(numel: int, pieces: int) -> Stored:
    cuts = [numel * i // pieces for i in range(pieces + 1)]
    fragments = [
        Fragment(Path("/nowhere"), 0, FlatRange(low, high))
        for low, high in itertools.pairwise(cuts)
    ]
    return Stored(FLOAT32, (numel,), fragments)


@given(st.integers(1, 10**8), st.integers(1, 2000))
def test_a_sample_is_small_and_touches_the_ends_and_what_lies_between(
    numel: int, pieces: int
) -> None:
    windows = list(sample_windows(described(numel, pieces)))

    assert windows[0][0] == 0
    assert windows[-1][1] == numel
    assert all(0 <= start < stop <= numel for start, stop in windows)
    assert sum(stop - start for start, stop in windows) <= 100_000
    gaps = [after[0] - before[1] for before, after in itertools.pairwise(windows)]
    assert max(gaps, default=0) <= numel / min(pieces, 60) + 1


def test_a_sample_of_nothing_is_nothing() -> None:
    assert list(sample_windows(described(0, 1))) == []
