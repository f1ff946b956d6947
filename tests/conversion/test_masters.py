"""A master that does not fit its 16-bit weight is found and named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from ckpt_tools import consolidate, open_checkpoint
from ckpt_tools.cli import cli
from ckpt_tools.conversion import api
from ckpt_tools.conversion.masters import check_masters
from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.tensors.checkpoint import Checkpoint, Location, Weight
from ckpt_tools.tensors.dtypes import BFLOAT16
from tests.writing.test_bytes import one_run

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def copy(tmp_path: Path, fixtures: Path) -> Callable[[str], Path]:
    """A checkpoint that may be damaged; gives the directory of its shards."""

    def make(name: str) -> Path:
        source = fixtures / "zero" / name / "checkpoint"
        shutil.copytree(source, tmp_path / "run")
        return tmp_path / "run" / (source / "latest").read_text()

    return make


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Load a shard as its framework does, change it, and save it again."""
    content = torch.load(file, weights_only=False)
    change(content)
    torch.save(content, file)


def optimizer_file(shards: Path, rank: int) -> Path:
    (file,) = shards.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return file


def masters_of(content: dict[str, Any]) -> torch.Tensor:
    state = content["optimizer_state_dict"]
    groups = state["single_partition_of_fp32_groups"]
    assert isinstance(groups[0], torch.Tensor)
    return groups[0].detach()


def damage(shards: Path) -> DamagedCheckpoint:
    """Convert without --check-masters, and expect the damage to be found."""
    out = shards.parent.parent / "out"
    with pytest.raises(DamagedCheckpoint) as caught:
        consolidate(shards, out, weights_only=True)
    assert not out.exists()
    assert "is not its 16-bit weight" in caught.value.fact
    assert "--weights model" in str(caught.value.hint)
    return caught.value


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("at", [0, 100, -200])
def test_a_flipped_bit_in_a_master_is_found(
    copy: Callable[[str], Path], rank: int, at: int
) -> None:
    shards = copy("zero2-bf16-llama-3ranks")

    def flip(content: dict[str, Any]) -> None:
        masters_of(content).view(torch.int32)[at] ^= 1 << 30

    edit(optimizer_file(shards, rank), flip)

    error = damage(shards)

    assert error.path == optimizer_file(shards, rank)
    assert error.tensor in open_checkpoint(shards)


@pytest.mark.parametrize("case", ["zero1-bf16-llama-2ranks", "zero2-fp16-llama-2ranks"])
@pytest.mark.parametrize("element", [0, -1])
def test_a_flipped_bit_in_the_16_bit_weights_is_found(
    copy: Callable[[str], Path], case: str, element: int
) -> None:
    shards = copy(case)
    (file,) = shards.glob("mp_rank_00_model_states.pt")

    def flip(content: dict[str, Any]) -> None:
        content["module"][NAME].view(torch.int16).view(-1)[element] ^= 1

    edit(file, flip)

    error = damage(shards)

    assert error.tensor == NAME
    numel = open_checkpoint(shards)[NAME].numel
    assert f"element {element % numel:,}" in error.fact


def test_ranks_in_each_others_place_are_found(copy: Callable[[str], Path]) -> None:
    shards = copy("zero2-bf16-llama-cpu-offload-2ranks")
    one, other = (optimizer_file(shards, rank) for rank in (0, 1))
    values = [masters_of(torch.load(file, weights_only=False)).clone() for file in (other, one)]
    numel = min(value.numel() for value in values)  # less its padding the last may be shorter
    for file, value in zip((one, other), values, strict=True):

        def swap(content: dict[str, Any], value: torch.Tensor = value) -> None:
            masters_of(content)[:numel] = value[:numel]

        edit(file, swap)

    assert damage(shards).path in (one, other)


def test_a_rank_of_another_run_at_the_same_step_is_found(copy: Callable[[str], Path]) -> None:
    """Nothing but its values tells such a file from the right one."""
    shards = copy("zero1-bf16-llama-2ranks")

    def train_otherwise(content: dict[str, Any]) -> None:
        masters = masters_of(content)
        masters.add_(torch.full_like(masters, 0.01))

    edit(optimizer_file(shards, 1), train_otherwise)

    assert damage(shards).path == optimizer_file(shards, 1)


def test_the_16_bit_weights_are_what_a_damaged_master_leaves(
    copy: Callable[[str], Path], tmp_path: Path
) -> None:
    """As the hint says."""
    from safetensors.torch import load_file

    shards = copy("zero1-bf16-llama-2ranks")
    edit(optimizer_file(shards, 0), lambda content: masters_of(content).zero_())
    damage(shards)

    consolidate(shards, tmp_path / "out", weights="model", weights_only=True)

    module = torch.load(shards / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == module.keys()
    assert all(torch.equal(found[name], module[name]) for name in module)


@pytest.mark.parametrize(
    "name", ["zero2-bf16-llama-round-robin-3ranks", "zero1-bf16-llama-round-robin-groups-3ranks"]
)
@pytest.mark.parametrize("every_element", [False, True])
def test_round_robin_gradients_pass(fixtures: Path, name: str, every_element: bool) -> None:
    checkpoint = open_checkpoint(fixtures / "zero" / name / "checkpoint")

    checked = check_masters(checkpoint, check_all_masters=every_element, workers=2)

    assert checked == len(checkpoint.weights) > 20


def test_zero_3_has_nothing_to_compare(fixtures: Path) -> None:
    checkpoint = open_checkpoint(fixtures / "zero" / "zero3-bf16-llama-7ranks" / "checkpoint")

    assert check_masters(checkpoint, check_all_masters=True, workers=2) == 0


def large(directory: Path, *, wrong: int | None = None) -> Checkpoint:
    """A checkpoint with a parameter of a million elements, of which one may be wrong."""
    master = torch.arange(1, 1_000_001, dtype=torch.float32)
    model = master.bfloat16()
    if wrong is not None:
        model[wrong] += 10_000
    weight = Weight(
        "parameter",
        (1000, 1000),
        BFLOAT16,
        one_run(directory / "master", master.view(1000, 1000)),
        one_run(directory / "model", model.view(1000, 1000)),
    )
    location = Location("deepspeed", directory, "global_step1", (directory,))
    return Checkpoint(location, "a checkpoint", {"right": weight, "x": weight}, {}, {})


UNSAMPLED = 654_321


def test_a_sample_touches_both_ends_and_the_middle(tmp_path: Path) -> None:
    for wrong in (0, 500_000, 999_999):
        with pytest.raises(DamagedCheckpoint, match=f"element {wrong:,}"):
            check_masters(large(tmp_path, wrong=wrong), check_all_masters=False, workers=1)


def test_a_sample_reads_little(tmp_path: Path) -> None:
    checkpoint = large(tmp_path, wrong=UNSAMPLED)

    assert check_masters(checkpoint, check_all_masters=False, workers=2) == 2


def test_every_element_is_compared_when_asked(tmp_path: Path) -> None:
    checkpoint = large(tmp_path, wrong=UNSAMPLED)

    with pytest.raises(DamagedCheckpoint, match=r"element 654,321\)\n") as caught:
        check_masters(checkpoint, check_all_masters=True, workers=2)

    assert caught.value.path == tmp_path / "master"


@pytest.mark.parametrize("option", [None, "--check-masters"])
def test_the_command_line_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str | None
) -> None:
    checkpoint = large(tmp_path, wrong=UNSAMPLED)
    monkeypatch.setattr(api, "_opened", lambda *_: checkpoint)
    words = ["consolidate", str(tmp_path), str(tmp_path / "out"), "--weights-only"]

    done = CliRunner().invoke(cli, [*words, *([option] if option else [])])

    assert done.exit_code == (4 if option else 0), done.output
    assert ("element 654,321" in done.output) is bool(option)
    assert (tmp_path / "out").exists() is not bool(option)


def test_a_reading_in_doubt_is_compared_in_full_and_the_doubt_is_told(tmp_path: Path) -> None:
    checkpoint = replace(large(tmp_path, wrong=UNSAMPLED), doubts=("the mappings disagree",))

    with pytest.raises(DamagedCheckpoint, match=r"element 654,321\) \(the mappings disagree\)"):
        check_masters(checkpoint, check_all_masters=False, workers=1)
