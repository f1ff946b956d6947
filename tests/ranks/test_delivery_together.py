"""Ranks in threads of one process deliver one output, or leave nothing that another is still writing into."""

from __future__ import annotations

import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._C._distributed_c10d import HashStore

import ckpt_tools
import ckpt_tools.verification.data
from ckpt_tools.errors import OutputFailed, RankFailed
from ckpt_tools.ranks import Ranks, session
from ckpt_tools.ranks.clock import Clock
from ckpt_tools.writing import bytes as write
from tests.conftest import FIXTURES
from tests.support.ranks.in_threads import clock, each, hurried, made
from tests.support.ranks.simulated import SimulatedClock
from tests.support.waiting import LONGEST_SECONDS

__all__ = ["clock", "hurried"]
pytestmark = pytest.mark.usefixtures("hurried")


def consolidated(
    source: Path, out: Path, size: int, ranks: list[Ranks] | None = None, **options: Any
) -> list[Any]:
    """What the call returns or raises on each rank."""
    settled = {"weights_only": True, "workers": 1, **options}
    return each(
        ranks or made(Clock(), size, timeout=LONGEST_SECONDS, store=HashStore()),
        lambda own: ckpt_tools.consolidate(source, out, ranks=own, **settled),
    )


def source_of(directory: Path, *shapes: tuple[int, ...]) -> Path:
    directory.mkdir()
    tensors = {f"t{i}": torch.full(shape, i + 1.0) for i, shape in enumerate(shapes)}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize("shapes", [[(1,)], [(0, 3)], [(0,), (2,), ()], [(5,), (300, 7)]])
def test_ranks_may_have_nothing_to_write(tmp_path: Path, shapes: list[tuple[int, ...]]) -> None:
    source, out = source_of(tmp_path / "source", *shapes), tmp_path / "out"

    reports = consolidated(source, out, 5)

    assert [report.output for report in reports] == [out] * 5
    found = load_file(out / "model.safetensors")
    for name, tensor in load_file(source / "model.safetensors").items():
        assert torch.equal(found[name], tensor)


def test_nothing_is_removed_while_another_rank_writes_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader's disk is full while a follower is in the middle of a block."""
    monkeypatch.setattr(session, "_STOP_SECONDS", LONGEST_SECONDS)
    ranks = made(Clock(), 2, timeout=LONGEST_SECONDS, store=HashStore())
    source = source_of(tmp_path / "source", (4_000_000,))
    writing, events = threading.Event(), []
    original, remove = write.Outputs.write, shutil.rmtree

    def block(outputs: Any, file: int, data: memoryview, offset: int) -> None:
        if offset < 1_000_000:
            assert writing.wait(LONGEST_SECONDS)
            raise OutputFailed("no space left on the output's disk")
        writing.set()
        assert ranks[1].failed.wait(LONGEST_SECONDS)
        original(outputs, file, data, offset)
        events.append("written")

    def removed(path: Path, **options: Any) -> None:
        events.append("removed")
        remove(path, **options)

    monkeypatch.setattr(write.Outputs, "write", block)
    monkeypatch.setattr(shutil, "rmtree", removed)

    leader, follower = consolidated(source, tmp_path / "out", 2, ranks)

    assert isinstance(leader, OutputFailed)
    assert isinstance(follower, RankFailed)
    assert events[:2] == ["written", "removed"], events
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


ZERO = FIXTURES / "zero" / "zero2-bf16-llama-3ranks" / "checkpoint"
LONG_STEPS = {
    "ckpt_tools.conversion.masters.first_difference": {},
    "ckpt_tools.writing.manifest._digest": {"sha256": True},
    "ckpt_tools.verification.data.scan": {"verify": True},
}


@pytest.mark.parametrize(("step", "options"), LONG_STEPS.items())
def test_a_leader_that_is_long_at_work_alone_is_waited_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    clock: SimulatedClock,
    step: str,
    options: dict[str, bool],
) -> None:
    """Each of these steps reads all there is, which may take longer than a rank may do nothing."""
    module, _, name = step.rpartition(".")
    original = getattr(sys.modules[module], name)
    leader: list[threading.Thread] = []
    take_part = clock.take_part

    def first_is_the_leader(thread: threading.Thread) -> None:
        leader.append(thread)
        take_part(thread)

    def slow(*arguments: Any, **more: Any) -> Any:
        clock.sleep_for(leader[0], 3)
        return original(*arguments, **more)

    monkeypatch.setattr(clock, "take_part", first_is_the_leader)
    monkeypatch.setattr(step, slow)
    out = tmp_path / "out"
    ranks = made(clock, 2, store=HashStore(), timeout=10)
    reports = consolidated(ZERO, out, 2, ranks, max_shard_size="1KB", **options)

    assert [report.output for report in reports] == [out] * 2
    assert clock.now() > 20, "longer than a rank may do nothing"
