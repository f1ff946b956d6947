"""Of a DTensor each rank tells the part that its placements give it, and no other.

Real DTensors are tested under FSDP2, tensor parallelism and both; here are the corners, on objects with the
attributes that a DTensor has.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ckpt_tools.errors import UnsupportedLayout
from ckpt_tools.tensors.catalogue import Box
from ckpt_tools.training.dtensors import held_of, is_dtensor


class Shard:
    def __init__(self, dim: int) -> None:
        self.dim = dim


class _StridedShard:
    def __init__(self, dim: int, split_factor: int) -> None:
        self.dim, self.split_factor = dim, split_factor


class Replicate: ...


class Partial: ...


class Mesh:
    def __init__(self, shape: tuple[int, ...], coordinate: tuple[int, ...] | None) -> None:
        self.shape, self._coordinate = shape, coordinate

    def get_coordinate(self) -> list[int] | None:
        return None if self._coordinate is None else list(self._coordinate)


class DTensor:
    def __init__(self, local: torch.Tensor, shape: Any, mesh: Mesh, *placements: Any) -> None:
        self._local_tensor, self.shape = local, torch.Size(shape)
        self.device_mesh, self.placements = mesh, placements


def held(*arguments: Any) -> Any:
    return held_of("w", "parameter", DTensor(*arguments))


def test_it_is_told_by_its_kind() -> None:
    assert is_dtensor(DTensor(torch.ones(1), (1,), Mesh((1,), (0,)), Replicate()))
    assert not is_dtensor(torch.ones(1))


def test_every_rank_has_room_for_the_largest_part() -> None:
    """So that equal slices lie at equal offsets, and are told by one number."""
    parts = [
        held(torch.ones(n, 4), (5, 4), Mesh((3,), (r,)), Shard(0)) for r, n in enumerate((2, 2, 1))
    ]

    assert [part.room for part in parts] == [8, 8, 8]
    assert [part.pieces[0].region for part in parts] == [
        Box((0, 0), (2, 4)),
        Box((2, 0), (2, 4)),
        Box((4, 0), (1, 4)),
    ]


def test_fsdp2_after_uneven_tensor_parallelism() -> None:
    """Of 67 rows on 3 x 2 ranks, the fifth rank holds 10: the end of the first 34."""
    mesh, placements = Mesh((3, 2), (2, 0)), (_StridedShard(0, 2), Shard(0))
    part = held(torch.ones(10, 4), (67, 4), mesh, *placements)

    assert part.pieces[0].region == Box((24, 0), (10, 4))
    assert part.room == 12 * 4


def test_a_rank_may_hold_nothing() -> None:
    empty = held(torch.ones(0, 4), (2, 4), Mesh((3,), (2,)), Shard(0))
    outside = held(torch.ones(2, 4), (2, 4), Mesh((3,), None), Shard(0))

    assert empty.pieces == outside.pieces == ()
    assert empty.shape == (2, 4)


def test_a_second_axis_is_cut_into_boxes() -> None:
    part = held(torch.ones(2, 2), (2, 4), Mesh((2, 2), (1, 1)), Replicate(), Shard(1))

    assert part.pieces[0].region == Box((0, 2), (2, 2))


@pytest.mark.parametrize(
    ("local", "placement", "fact"),
    [
        (torch.ones(2, 4), Partial(), "its placement Partial is not written"),
        (torch.ones(3, 4), Shard(0), "12 elements where its placements give 8"),
        (torch.nested.nested_tensor([torch.ones(1)], layout=torch.jagged), Shard(0), "not a plain"),
    ],
)
def test_what_is_not_as_its_placements_say_is_refused(
    local: torch.Tensor, placement: Any, fact: str
) -> None:
    with pytest.raises(UnsupportedLayout, match=fact):
        held(local, (4, 4), Mesh((2,), (0,)), placement)
