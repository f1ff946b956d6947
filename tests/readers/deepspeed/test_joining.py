"""Slices cut from a known tensor, put together again: the tensor itself is the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.readers.deepspeed.joining import Piece, joined, whole
from ckpt_tools.readers.deepspeed.tensor_parallel import SliceRecord
from ckpt_tools.readers.deepspeed.tensor_ranks import TensorRanks
from ckpt_tools.tensors.catalogue import Box, FlatRange, Fragment, Stored, Strided
from ckpt_tools.tensors.dtypes import FLOAT32
from tests.support.readers.contract import bits, in_pieces


def stored(tensor: torch.Tensor, parts: int, directory: Path, name: str) -> Stored:
    """A slice that lies in ``parts`` files, as data-parallel ranks cut it, after other bytes."""
    fragments, start = [], 0
    for index, part in enumerate(tensor.contiguous().reshape(-1).tensor_split(parts)):
        path = directory / f"{name}-{index}"
        path.write_bytes(b"\xff" * 12 + bits(part))
        if part.numel():
            fragments.append(Fragment(path, 12, FlatRange(start, start + part.numel())))
        start += part.numel()
    return Stored(FLOAT32, tuple(tensor.shape), fragments)


def turned(tensor: torch.Tensor, directory: Path, name: str) -> Stored:
    """A slice that lies in one file with its axes in the reverse order."""
    lying = tensor.permute(*reversed(range(tensor.dim()))).contiguous()
    path = directory / f"{name}-turned"
    path.write_bytes(b"\xff" * 12 + bits(lying))
    shape = tuple(tensor.shape)
    layout = Strided(shape, tuple(reversed(lying.stride())))
    region = Box((0,) * len(shape), shape)
    return Stored(FLOAT32, shape, [Fragment(path, 12, region, layout)] if tensor.numel() else [])


def cut(full: torch.Tensor, axis: int, widths: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Each rank's slice: its part of each sub-parameter, one after the other along the axis."""
    subs = full.split([sum(row) for row in widths], dim=axis)
    ranks = range(len(widths[0]))
    parts = [sub.split(list(row), dim=axis) for sub, row in zip(subs, widths, strict=True)]
    return [torch.cat([part[rank] for part in parts], dim=axis) for rank in ranks]


def record(info: Mapping[str, Any], ranks: int, directory: Path) -> TensorRanks:
    return TensorRanks(SliceRecord(info, directory / "model").pieces, ranks, directory)


def assert_joined(
    info: Mapping[str, Any], full: torch.Tensor, slices: Sequence[torch.Tensor], directory: Path
) -> None:
    dense = [stored(s, 3, directory, f"rank{rank}") for rank, s in enumerate(slices)]
    strided = [turned(s, directory, f"rank{rank}") for rank, s in enumerate(slices)]
    for held in (dense, strided):
        tensor = record(info, len(slices), directory).tensor("w", "master", held)
        assert tensor is not None
        assert tensor.shape == tuple(full.shape)
        assert bits(tensor.load()) == bits(full)
        for step in (1, 7, 64):
            assert in_pieces(tensor, step) == bits(full)


FULL = torch.arange(12 * 10, dtype=torch.float32).reshape(12, 10)
CUBE = torch.arange(6 * 4 * 10, dtype=torch.float32).reshape(6, 4, 10)


@pytest.mark.parametrize("widths", [[6, 6], [5, 4, 3], [12, 0], [1, 0, 11]])
def test_rows(widths: list[int], tmp_path: Path) -> None:
    assert_joined({"universal_checkpoint_version": 0.2}, FULL, cut(FULL, 0, [widths]), tmp_path)


@pytest.mark.parametrize("widths", [[5, 5], [3, 3, 4], [10, 0]])
def test_columns(widths: list[int], tmp_path: Path) -> None:
    info = {"parameter_with_row_parallelism_patterns": ["w"]}
    assert_joined(info, FULL, cut(FULL, 1, [widths]), tmp_path)


@pytest.mark.parametrize(
    ("full", "axis", "widths"),
    [
        (FULL, 0, [[3, 1], [2, 2], [1, 3]]),
        (FULL, 1, [[3, 1], [2, 2], [1, 1]]),
        (CUBE, 2, [[3, 1], [2, 4]]),
        (CUBE, 1, [[1, 0, 1], [0, 2, 0]]),
    ],
)
def test_sub_parameters_along_any_axis(
    full: torch.Tensor, axis: int, widths: list[list[int]], tmp_path: Path
) -> None:
    sub = {"patterns": ["w"], "shape": list(full.shape), "partition_dim": axis}
    info = {"parameter_with_sub_params": [sub], "sub_param_shard_widths": {"w": widths}}
    assert_joined(info, full, cut(full, axis, widths), tmp_path)


def test_two_halves_of_a_padded_vocabulary_and_a_replicated_one(tmp_path: Path) -> None:
    halves = {"parameter_with_2_sub_params_cat_dim_0": ["w"]}
    assert_joined(halves, FULL, cut(FULL, 0, [[3, 3], [3, 3]]), tmp_path)
    assert_joined({"tp_replicated_parameter_patterns": ["w"]}, FULL, [FULL, FULL], tmp_path)
    padded = torch.cat([FULL, torch.full((4, 10), torch.nan)])
    vocabulary = {"vocabulary_parameter_patterns": ["w"], "original_vocab_size": 12}
    assert_joined(vocabulary, FULL, cut(padded, 0, [[8, 8]]), tmp_path)
    assert_joined(vocabulary, FULL, cut(padded, 0, [[13, 3]]), tmp_path)


def test_an_affine_map_of_replicated_and_private_blocks(tmp_path: Path) -> None:
    """Queries divided, keys and values on every rank: the first rank's are taken."""
    slices = [torch.cat([FULL[4 * r : 4 * r + 4], FULL[8:]]) for r in (0, 1)]
    ranks = {
        rank: {
            "shard_shape": [8, 10],
            "pieces": [
                {"shape": [4, 10], "source": [40 * rank, [10, 1]], "dest": [0, [10, 1]]},
                {"shape": [4, 10], "source": [80, [10, 1]], "dest": [40, [10, 1]]},
            ],
        }
        for rank in (0, 1)
    }
    params = {"w": {"logical_shape": [12, 10], "ranks": ranks}}
    assert_joined({"affine_map": {"version": 1, "params": params}}, FULL, slices, tmp_path)


@pytest.mark.parametrize(
    "info",
    [
        {"tp_replicated_parameter_patterns": ["w"]},
        {"parameter_with_row_parallelism_patterns": ["w"]},
        {"parameter_with_2_sub_params_cat_dim_0": ["w"]},
        {"vocabulary_parameter_patterns": ["w"], "original_vocab_size": 13},
        {"vocabulary_parameter_patterns": ["w"]},
        {
            "parameter_with_sub_params": [
                {"patterns": ["w"], "shape": [(3, 9), 10], "partition_dim": 0}
            ]
        },
    ],
)
def test_a_record_that_does_not_fit_its_slices_is_refused(
    info: dict[str, Any], tmp_path: Path
) -> None:
    held = [stored(part, 1, tmp_path, str(at)) for at, part in enumerate(cut(FULL, 0, [[5, 7]]))]
    with pytest.raises(DamagedCheckpoint, match="its slices are not cut as"):
        record(info, 2, tmp_path).tensor("w", "master", held)


@pytest.mark.parametrize(
    "info",
    [
        {"affine_map": {"params": ["w"]}},
        {"parameter_with_sub_params": [{"shape": [12, 10]}]},
        {"parameter_with_sub_params": 5},
        {"tp_replicated_parameter_patterns": [{}]},
    ],
)
def test_a_record_of_another_form_is_refused(info: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DamagedCheckpoint, match="does not have the form that DeepSpeed writes"):
        record(info, 2, tmp_path)


def test_the_first_record_of_sub_parameters_that_names_a_tensor_is_taken(tmp_path: Path) -> None:
    subs = [
        {"patterns": ["x", "w.*"], "shape": [(4, 8), 10], "partition_dim": 0},
        {"patterns": ["w", "x"], "shape": [(6, 6), 10], "partition_dim": 0},
    ]
    widths = [[2, 2], [4, 4]]
    assert_joined({"parameter_with_sub_params": subs}, FULL, cut(FULL, 0, widths), tmp_path)


def test_pieces_that_leave_a_hole_are_no_tensor(tmp_path: Path) -> None:
    held = [stored(FULL, 2, tmp_path, "a")]
    with pytest.raises(DamagedCheckpoint):
        joined(held, [Piece(0, whole((12, 10)), (0, 0))], (13, 10))
    with pytest.raises(DamagedCheckpoint):
        joined(held, [Piece(0, whole((12, 10)), (0, 0))] * 2, (12, 10))
