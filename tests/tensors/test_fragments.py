"""Slices of equal length tile a tensor of any size on any number of ranks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ckpt_tools.tensors.catalogue import FlatRange, Stored
from ckpt_tools.tensors.dtypes import FLOAT32
from ckpt_tools.tensors.fragments import EvenSlices

FILES = [Path(f"rank{rank}.pt") for rank in range(4)]


def regions(fragments: EvenSlices) -> list[tuple[str, int, int, int]]:
    """File, byte, first and last element of every slice."""
    found = []
    for fragment in fragments:
        assert isinstance(fragment.region, FlatRange)
        region = fragment.region
        found.append((fragment.file.name, fragment.offset, region.start, region.stop))
    return found


def test_ten_elements_on_four_ranks_are_three_three_three_and_one() -> None:
    assert regions(EvenSlices(FILES, 20, 3, 10, [1000, 2000, 3000, 4000])) == [
        ("rank0.pt", 1020, 0, 3),
        ("rank1.pt", 2020, 3, 6),
        ("rank2.pt", 3020, 6, 9),
        ("rank3.pt", 4020, 9, 10),
    ]


def test_two_elements_on_four_ranks_leave_two_ranks_out() -> None:
    slices = EvenSlices(FILES, 64, 1, 2)
    assert regions(slices) == [("rank0.pt", 64, 0, 1), ("rank1.pt", 64, 1, 2)]


def test_five_elements_on_four_ranks_leave_the_last_rank_out() -> None:
    assert [stop for *_, stop in regions(EvenSlices(FILES, 0, 2, 5))] == [2, 4, 5]


def test_no_elements_are_no_slices() -> None:
    assert len(EvenSlices(FILES, 0, 0, 0)) == 0


@pytest.mark.parametrize("numel", range(40))
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_slices_tile_a_parameter_of_any_size(numel: int, ranks: int) -> None:
    files = [Path(str(rank)) for rank in range(ranks)]
    slices = EvenSlices(files, 0, math.ceil(numel / ranks), numel)
    Stored(FLOAT32, (numel,), slices)  # proves it
    assert [f.file.name for f in slices] == [str(rank) for rank in range(len(slices))]
    assert list(slices[1:]) == list(slices)[1:]
    if numel:
        assert slices[-1] == list(slices)[-1]
