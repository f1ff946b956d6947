"""State dicts that people save themselves: found by file name, listed where there are several."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tools import open_checkpoint
from ckpt_tools.errors import (
    AmbiguousCheckpoint,
    DamagedCheckpoint,
    NotACheckpoint,
    UnsupportedLayout,
    UsageError,
)
from tests.support.readers.contract import assert_same


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return OrderedDict(
        (name, torch.randn(shape, generator=generator).bfloat16())
        for name, shape in (("embed.weight", (7, 3)), ("head.weight", (5, 3)), ("scale", ()))
    )


OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
LIGHTNING = {"epoch": 1, "global_step": 7, "pytorch-lightning_version": "2.5.1", "loops": {}}


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("weights.pt", state(), ""),
        ("weights.pth", {"model": state(), "optimizer": OPTIMIZER, "step": 3}, "model"),
        ("last.ckpt", {"state_dict": state(), "optimizer_states": [OPTIMIZER], **LIGHTNING}, "state_dict"),
        ("best.tar", {"model_state_dict": state(), "optimizer_state_dict": OPTIMIZER}, "model_state_dict"),
        ("ema.bin", {"ema": {"model": state(), "decay": 0.99}}, "ema.model"),
        ("fsdp.pt", {"model": state(), "optim": {"state": {"momentum": torch.ones(2)}}}, "model"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("named", [True, False], ids=["by name", "only file of a folder"])
@pytest.mark.parametrize("legacy", [False, True])
def test_the_one_state_dict_of_a_file_is_read(
    name: str, content: dict[str, Any], part: str, named: bool, legacy: bool, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    (tmp_path / "notes.txt").write_text("")
    checkpoint = open_checkpoint(tmp_path / name if named else tmp_path)
    assert (checkpoint.location.part, list(checkpoint)) == (part, list(state()))
    assert dict(checkpoint.files) == {tmp_path / name: (tmp_path / name).stat().st_size}
    for tensor, truth in state().items():
        assert_same(checkpoint[tensor].load(), truth, tensor)


def test_what_lightning_records_is_told(tmp_path: Path) -> None:
    torch.save({"state_dict": state(), **LIGHTNING}, tmp_path / "last.ckpt")
    checkpoint = open_checkpoint(tmp_path / "last.ckpt")
    assert (checkpoint.step, checkpoint.framework) == (7, "lightning 2.5.1")
    assert checkpoint.title == "torch file, state_dict"


def test_several_state_dicts_are_listed_and_chosen_by_name(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    torch.save({"model": state(1), "ema": {"shadow": state(2)}, "optimizer": OPTIMIZER}, path)
    with pytest.raises(AmbiguousCheckpoint) as caught:
        open_checkpoint(path)
    assert caught.value.choices == ("model", "ema.shadow")
    assert caught.value.hint == "Pass --model with one of them: model, ema.shadow."
    for seed, name in ((1, "model"), (2, "ema.shadow")):
        chosen = open_checkpoint(path, model=name)
        for tensor, truth in state(seed).items():
            assert_same(chosen[tensor].load(), truth, tensor)
    with pytest.raises(UsageError, match="there is no model generator") as missing:
        open_checkpoint(path, model="generator")
    assert missing.value.hint == "Pass --model with one of: model, ema.shadow."


def test_tied_tensors_are_one(tmp_path: Path) -> None:
    shared = torch.ones(4, 3)
    torch.save({"a.weight": shared, "b.weight": shared}, tmp_path / "w.pt")
    assert dict(open_checkpoint(tmp_path / "w.pt").ties) == {"b.weight": "a.weight"}


def test_a_whole_pickled_model_is_refused_by_its_class(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(
        UnsupportedLayout, match=r"a pickled torch\.nn\.modules\.linear\.Linear"
    ) as caught:
        open_checkpoint(tmp_path / "model.pt")
    assert "model.state_dict()" in str(caught.value)


def test_a_truncated_file_is_told_when_it_is_named(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "w.pt")
    data = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(DamagedCheckpoint, match="not a complete torch file"):
        open_checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize("content", [{"step": 3}, {"optimizer": OPTIMIZER}, {"rng": {"torch": 1}}])
def test_a_file_without_a_state_dict_is_no_checkpoint(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    for path in (tmp_path, tmp_path / "w.pt"):
        with pytest.raises(NotACheckpoint, match="no checkpoint of a known format"):
            open_checkpoint(path)


def test_two_files_of_a_folder_are_not_guessed_between(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        torch.save(state(), tmp_path / name)
    with pytest.raises(NotACheckpoint, match=r"a\.pt, b\.pt"):
        open_checkpoint(tmp_path)


def test_a_checkpoint_below_comes_before_a_file_beside_it(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "ema.pt")
    below = tmp_path / "step_3"
    below.mkdir()
    torch.save(state(), below / "pytorch_model.bin")
    assert open_checkpoint(tmp_path).location.directory == below
