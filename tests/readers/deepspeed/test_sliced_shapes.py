"""Slices without a record: what the shapes of the model determine, and what they leave open."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt_tools.errors import UnsupportedLayout
from ckpt_tools.readers.deepspeed.sliced_shapes import ModelShapes
from ckpt_tools.tensors.regions import Shape

PREFIX = "model.layers.0."


def placed(name: str, full: Shape, slices: list[Shape]) -> list[tuple[int, Shape]]:
    rule = ModelShapes({name: full}, len(slices), Path("mp_rank_00_model_states.pt"))
    pieces, shape = rule.pieces(name, slices)
    assert shape == full
    assert all(piece.box.sizes == slices[piece.rank] for piece in pieces)
    return [(piece.rank, piece.offsets) for piece in pieces]


@pytest.mark.parametrize(
    ("name", "full", "slices", "offsets"),
    [
        ("self_attn.q_proj.weight", (6, 5), [(2, 5)] * 3, [(0, 0), (2, 0), (4, 0)]),
        ("self_attn.q_proj.bias", (7,), [(3,), (2,), (2,)], [(0,), (3,), (5,)]),
        ("mlp.down_proj.weight", (5, 7), [(5, 4), (5, 3)], [(0, 0), (0, 4)]),
        ("mlp.down_proj.bias", (5,), [(5,), (5,)], [(0,), (0,)]),
        ("embed_tokens.weight", (7, 6), [(7, 3), (7, 3)], [(0, 0), (0, 3)]),
        ("self_attn.k_proj.weight", (4, 4), [(2, 4), (2, 4)], [(0, 0), (2, 0)]),
        ("self_attn.o_proj.weight", (4, 4), [(4, 2), (4, 2)], [(0, 0), (0, 2)]),
    ],
)
def test_shapes_that_leave_one_reading(
    name: str, full: Shape, slices: list[Shape], offsets: list[Shape]
) -> None:
    assert placed(PREFIX + name, full, slices) == list(enumerate(offsets))


@pytest.mark.parametrize(
    ("name", "full", "slices", "why"),
    [
        ("self_attn.qkv_proj.weight", (12, 5), [(6, 5), (6, 5)], "may fuse several parameters"),
        ("mlp.gate_up_proj.weight", (8, 5), [(4, 5), (4, 5)], "may fuse several parameters"),
        ("attn.c_attn.weight", (5, 12), [(5, 6), (5, 6)], "may fuse several parameters"),
        ("mlp.experts.gate_up_proj", (3, 8, 5), [(3, 4, 5)] * 2, "may fuse several parameters"),
        ("mlp.experts.down_proj", (4, 5, 6), [(2, 5, 6)] * 2, "may fuse several parameters"),
        # Fewer key-value heads than ranks: each rank has a copy of one, and two ranks the same.
        ("self_attn.k_proj.weight", (4, 5), [(2, 5)] * 4, "do not make up"),
        ("mlp.up_proj.weight", (6, 4), [(3, 2), (3, 2)], "do not make up"),
        ("mlp.up_proj.weight", (6, 4), [(3,), (3,)], "do not make up"),
        ("mlp.up_proj.weight", (6, 4), [(6, 4), (3, 4)], "do not make up"),
    ],
)
def test_shapes_that_leave_several_readings_or_none_are_refused(
    name: str, full: Shape, slices: list[Shape], why: str
) -> None:
    with pytest.raises(UnsupportedLayout, match=why) as caught:
        placed(PREFIX + name, full, slices)
    assert caught.value.tensor == PREFIX + name
    assert "AutoTP of DeepSpeed 0.19" in str(caught.value)


def test_a_tensor_that_the_model_does_not_have_is_refused() -> None:
    rule = ModelShapes({}, 2, Path("mp_rank_00_model_states.pt"))
    with pytest.raises(UnsupportedLayout, match="no tensor of this name"):
        rule.pieces("w", [(2,), (2,)])
