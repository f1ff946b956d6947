"""What ranks hold becomes one checkpoint: each tensor from whoever holds it, and nothing from guesswork."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ckpt_tools.errors import (
    AttributeNotFound,
    CkptError,
    DamagedCheckpoint,
    RankFailed,
    UnsupportedLayout,
)
from ckpt_tools.ranks import Ranks
from ckpt_tools.ranks.clock import Clock
from ckpt_tools.tensors.catalogue import Box, FlatRange, Stored
from ckpt_tools.tensors.checkpoint import Checkpoint, Kind
from ckpt_tools.tensors.fragments import EvenSlices
from ckpt_tools.training.facts import Facts
from ckpt_tools.training.holding import Held, Holding, Piece, dtype_of, whole
from ckpt_tools.training.live import offered, part_of
from tests.support.ranks.in_threads import hurried, made, together
from tests.support.waiting import LONGEST_SECONDS

__all__ = ["hurried"]
pytestmark = pytest.mark.usefixtures("hurried")
FACTS = Facts(1, 3, "torch")
WORLD = 3

Look = Callable[[Checkpoint], Any]


def piece(
    name: str, region: FlatRange | Box, values: Tensor, shape: tuple[int, ...], room: int = 0
) -> Held:
    return Held(
        name,
        "model",
        "parameter",
        dtype_of(values, name),
        shape,
        (Piece(region, values),),
        room=room,
    )


def held(name: str, values: Tensor, kind: Kind = "parameter") -> Held:
    return whole(name, "model", kind, values)


def look(
    of: Callable[[int], list[Held]], ask: Look, shared: set[str] | None = None, world: int = WORLD
) -> list[Any]:
    """What ``ask`` gives of the checkpoint on the leader, and what each other rank ends with."""

    def body(ranks: Ranks) -> Any:
        with offered(ranks, Holding(tuple(of(ranks.rank)), {}), FACTS, shared) as checkpoint:
            answer = None if checkpoint is None else ask(checkpoint)
            ranks.all_gather("looked", None)
            return answer

    return together(made(Clock(), world, timeout=LONGEST_SECONDS), body)


def loaded(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: tensor.load() for name, tensor in checkpoint.items()}


def files(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Names of the files that each tensor lies in."""
    return {
        name: [fragment.file.name for fragment in tensor.fragments]
        for name, tensor in checkpoint.items()
        if isinstance(tensor, Stored)
    }


def test_even_slices_are_joined_and_told_by_one_number() -> None:
    """At equal offsets, although the last rank has less of the first tensor."""
    wide = torch.arange(12.0)

    def of(rank: int) -> list[Held]:
        part = wide[rank * 5 : rank * 5 + 5]
        region = FlatRange(rank * 5, rank * 5 + len(part))
        small = piece("b", FlatRange(rank, rank + 1), part[:1], (3,), 1)
        return [piece("a", region, part, (3, 4), 5), small]

    def ask(checkpoint: Checkpoint) -> Any:
        kinds = {type(t.fragments) for t in checkpoint.values() if isinstance(t, Stored)}
        return loaded(checkpoint), kinds, files(checkpoint)

    (values, kinds, names), *others = look(of, ask)

    assert torch.equal(values["a"], wide.view(3, 4))
    assert torch.equal(values["b"], torch.tensor([0.0, 5.0, 10.0]))
    assert kinds == {EvenSlices}
    assert names["a"] == ["rank00000", "rank00001", "rank00002"]
    assert others == [None, None]


def test_a_plan_of_a_thousand_ranks_is_small() -> None:
    paths = tuple(Path(f"rank{rank:05d}") for rank in range(1000))
    stored = [
        Stored(dtype_of(torch.ones(1), ""), (999_999,), EvenSlices(paths, 64, 1000, 999_999))
        for _ in range(100)
    ]

    assert len(pickle.dumps(stored)) < 100_000
    assert stored[0].pieces == 1000
    assert stored[0].fragments[-1].region == FlatRange(999_000, 999_999)


def test_boxes_and_uneven_pieces_are_joined_as_well() -> None:
    whole_one = torch.arange(12.0).view(3, 4)

    def of(rank: int) -> list[Held]:
        column = whole_one[:, rank : rank + 2 if rank == 2 else rank + 1].contiguous()
        box = Box((0, rank), tuple(column.shape))
        row = (FlatRange(0, 7), FlatRange(7, 8), FlatRange(8, 12))[rank]
        return [
            piece("boxes", box, column, (3, 4)),
            piece("uneven", row, whole_one.view(-1)[row.start : row.stop], (12,)),
        ]

    (values, *_) = look(of, loaded)

    assert torch.equal(values["boxes"], whole_one)
    assert torch.equal(values["uneven"], whole_one.view(-1))


def test_of_replicas_of_a_piece_the_first_is_read() -> None:
    def of(rank: int) -> list[Held]:
        region = FlatRange(0, 2) if rank < 2 else FlatRange(2, 4)
        return [piece("a", region, torch.full((2,), float(rank)), (4,))]

    (values, *_) = look(of, loaded)

    assert values["a"].tolist() == [0.0, 0.0, 2.0, 2.0]


def test_each_rank_reads_what_all_hold_alike_from_its_own_memory() -> None:
    def of(rank: int) -> list[Held]:
        return [
            held("alike", torch.ones(5)),
            held("statistic", torch.full((2,), float(rank)), "buffer"),
            held("drifted", torch.full((2,), float(rank))),
            held("unasked", torch.ones(3)),
        ]

    def ask(checkpoint: Checkpoint) -> Any:
        return files(checkpoint), loaded(checkpoint), checkpoint.remarks

    (names, values, remarks), *_ = look(of, ask, {"alike", "statistic", "drifted"})

    assert names["alike"] == ["everybody"]
    assert names["statistic"] == names["drifted"] == names["unasked"] == ["leader"]
    assert values["statistic"].tolist() == values["drifted"].tolist() == [0.0, 0.0]
    assert remarks == ("differ from rank to rank, rank 0's are taken: drifted",)


def test_every_rank_reads_the_same_values_under_the_same_names() -> None:
    """What the leader plans is read by the others, wherever it lies."""

    def body(ranks: Ranks) -> Any:
        part = torch.full((4,), float(ranks.rank))
        region = FlatRange(ranks.rank * 4, ranks.rank * 4 + 4)
        own = Holding((piece("a", region, part, (12,), 4), held("b", torch.ones(2))), {})
        with offered(ranks, own, FACTS, None) as checkpoint:
            if checkpoint is not None:
                ranks.put("plan", dict(checkpoint.items()))
            tensors = ranks.get("plan")
            read = {name: tensor.load().tolist() for name, tensor in tensors.items()}
            ranks.all_gather("read", None)
            return read

    read = together(made(Clock(), WORLD, timeout=LONGEST_SECONDS), body)

    assert read == [{"a": [0.0] * 4 + [1.0] * 4 + [2.0] * 4, "b": [1.0, 1.0]}] * WORLD


def test_a_hole_is_an_error() -> None:
    def of(rank: int) -> list[Held]:
        region = FlatRange(rank * 2, rank * 2 + (1 if rank == 1 else 2))
        return [piece("a", region, torch.ones(region.numel), (6,))]

    leader, *others = look(of, loaded)

    assert isinstance(leader, DamagedCheckpoint)
    assert "leave a hole or overlap at element 3" in str(leader)
    assert all(isinstance(error, RankFailed) and "a hole" in str(error) for error in others)


@pytest.mark.parametrize(
    "odd",
    [
        lambda: held("other", torch.ones(2)),
        lambda: held("a", torch.ones(3)),
        lambda: held("a", torch.ones(2).half()),
        lambda: held("a", torch.ones(2), "buffer"),
        lambda: piece("a", FlatRange(0, 2), torch.ones(2), (2,)),
    ],
)
def test_ranks_with_other_tensors_are_refused(odd: Callable[[], Held]) -> None:
    leader, *others = look(lambda rank: [odd() if rank == 2 else held("a", torch.ones(2))], loaded)

    assert isinstance(leader, UnsupportedLayout)
    assert "the tensors of rank 2 are not those of rank 0" in str(leader)
    assert all(isinstance(error, CkptError) for error in others)


def test_masters_are_a_copy_of_their_own() -> None:
    def of(rank: int) -> list[Held]:
        if rank == 2:  # of a master that others have all of, not even the dtype is known
            master = Held("a", "master", "parameter", dtype_of(torch.ones(1).half(), ""), (4,), ())
        else:
            part = Piece(FlatRange(rank * 2, rank * 2 + 2), torch.full((2,), rank + 0.25))
            master = Held("a", "master", "parameter", dtype_of(torch.ones(1), ""), (4,), (part,))
        return [held("a", torch.zeros(4).bfloat16()), master]

    def ask(checkpoint: Checkpoint) -> Any:
        weight = checkpoint.weights["a"]
        assert weight.master is not None
        return weight.dtype, weight.master.load().tolist(), checkpoint.catalogue("model")["a"].dtype

    (dtype, values, model), *_ = look(of, ask)

    assert (dtype, model) == (torch.bfloat16, torch.bfloat16)
    assert values == [0.25, 0.25, 1.25, 1.25]


def test_a_process_alone_has_everything() -> None:
    holding = Holding(
        (held("a", torch.arange(3)), held("b", torch.tensor(2.0), "buffer")), {"c": "a"}
    )

    with offered(None, holding, FACTS, None) as checkpoint:
        assert checkpoint is not None
        assert checkpoint["c"].load().tolist() == [0, 1, 2]
        assert checkpoint.weights["b"].kind == "buffer"
        assert checkpoint.location.format == "live"

    with pytest.raises(DamagedCheckpoint, match="cannot be opened"):
        checkpoint["a"].load()


def test_a_part_is_as_if_it_had_been_trained_by_itself() -> None:
    tensors = [held(f"module.{name}", torch.ones(1)) for name in ("policy.a", "value.b", "value.c")]
    ties = {"module.policy.b": "module.value.b", "module.policy.d": "module.policy.a"}

    with offered(None, Holding(tuple(tensors), ties), FACTS, None) as checkpoint:
        assert checkpoint is not None
        part = part_of(checkpoint, "policy")
        assert {*part.weights} == {"a", "b"}
        assert part.ties == {"d": "a"}
        with pytest.raises(AttributeNotFound, match=r"It has: policy \(3 tensors\), value \(2"):
            part_of(checkpoint, "polic")
