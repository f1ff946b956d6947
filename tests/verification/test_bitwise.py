"""A difference is found wherever it lies, and shown; what cannot be read hides no other."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ckpt_tools import open_checkpoint
from ckpt_tools.tensors import windows
from ckpt_tools.verification.against import check_against
from ckpt_tools.verification.problem import Findings, Problem
from tests.support.verification.beside import (
    PLAIN,
    SINGLE,
    UP,
    against,
    casts,
    read,
    record,
    told,
    written,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """What the live engine held in bf16, as a directory."""
    return written(tmp_path / "model", load_file(PLAIN / "truth" / SINGLE))


@pytest.mark.slow
@pytest.mark.parametrize("recorded", [False, True])
def test_a_bit_anywhere_is_found_with_its_place_and_both_values(
    recorded: bool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "WINDOW", 100)
    truth = load_file(PLAIN / "truth" / SINGLE)
    masters = load_file(PLAIN / "truth" / "masters.safetensors")
    if recorded:
        record(model, casts([*truth]), PLAIN / "checkpoint")
    chance = random.Random(recorded)
    for _ in range(40):
        name = chance.choice([*truth])
        at = tuple(chance.randrange(size) for size in truth[name].shape)
        state = {n: t.clone() for n, t in truth.items()}
        state[name][at].view(torch.int16).bitwise_xor_(1 << chance.randrange(15))
        written(model, state)

        (problem,) = against(model, PLAIN / "checkpoint", workers=2).problems

        here, there = (f"{float(each[name][at]):.9g}" for each in (state, truth))
        assert problem == Problem(
            "tensor-differs",
            f"1 of {truth[name].numel():,} elements differ; the first {[*at]} is {here}, "
            f"the checkpoint gives {there}" + (" (float32, rounded)" if not recorded else ""),
            SINGLE,
            name,
            "error",
            "Write the directory again from this checkpoint, or name the checkpoint that it was made from.",
        )
        assert there == f"{float(masters[name][at].bfloat16()):.9g}"


def test_elements_are_counted_over_all_windows(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "WINDOW", 50)
    state = load_file(model / SINGLE)
    state[UP].view(-1)[[7, 99, 100, 200]] += 1
    state["model.norm.weight"] = -state["model.norm.weight"]
    written(model, state)

    found = {p.tensor: p.detail for p in against(model, PLAIN / "checkpoint", workers=3).problems}

    assert found.keys() == {UP, "model.norm.weight"}
    assert found[UP].startswith("4 of 260 elements differ; the first [0, 7] is ")
    assert found["model.norm.weight"].startswith("10 of 10 elements differ; the first [0] is -")


def test_values_that_look_the_same_are_shown_as_bits(tmp_path: Path) -> None:
    a = written(tmp_path / "a", {"x": torch.tensor([[0.0, 1.0]]), "s": torch.tensor(1.0)})
    b = written(tmp_path / "b", {"x": torch.tensor([[-0.0, 1.0]]), "s": torch.tensor(2.0)})
    nan = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    c = written(tmp_path / "c", {"x": torch.stack([torch.cat([nan, nan])]), "s": torch.tensor(1.0)})
    d = written(tmp_path / "d", {"x": torch.full((1, 2), float("nan")), "s": torch.tensor(1.0)})

    details = {p.tensor: p.detail for p in against(a, b / SINGLE).problems}
    assert details == {
        "x": "1 of 2 elements differ; the first [0, 0] is 0, the checkpoint gives -0",
        "s": "1 of 1 elements differ; the first is 1, the checkpoint gives 2",
    }
    (problem,) = against(c, d / SINGLE).problems
    assert "is 0x7fc00001, the checkpoint gives 0x7fc00000" in problem.detail


def test_what_cannot_be_read_stops_nothing_else(model: Path, tmp_path: Path) -> None:
    found = read(model)
    state = load_file(model / SINGLE)
    end = sorted(found.tensors.values(), key=lambda entry: entry.start)[-1]
    with (model / SINGLE).open("r+b") as stream:
        stream.truncate(end.stop - 1)
    findings = Findings()
    check_against(found, PLAIN / "checkpoint", findings)

    assert told(findings) == {("against-unread", end.name)}
    assert findings.problems[0].file == SINGLE
    assert "the file ends at byte" in findings.problems[0].detail

    whole = written(tmp_path / "whole", state)
    run = open_checkpoint(written(tmp_path / "run", state))
    with (tmp_path / "run" / SINGLE).open("r+b") as stream:
        stream.truncate(end.stop - 1)
    findings = against(whole, run)
    assert told(findings) == {("against-unread", end.name)}
    assert findings.problems[0].file is None
    assert f"the checkpoint's {tmp_path / 'run' / SINGLE}" in findings.problems[0].detail


@pytest.mark.parametrize("workers", [1, 4])
def test_progress_ends_at_all_bytes(workers: int, model: Path) -> None:
    seen: list[tuple[int, int]] = []
    nbytes = sum(entry.nbytes for entry in read(model).tensors.values())

    against(model, PLAIN / "checkpoint", workers=workers, progress=lambda *t: seen.append(t))

    assert seen[-1] == (2 * nbytes, 2 * nbytes)
