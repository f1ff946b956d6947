"""The size of one save is that of all its files, in any format."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from ckpt_tools import open_checkpoint
from ckpt_tools.analysis.interval import saved_size
from ckpt_tools.errors import AmbiguousCheckpoint, DamagedCheckpoint, NotACheckpoint
from tests.conftest import FIXTURES
from tests.support.sampled import sampled

ZERO = sorted((FIXTURES / "zero").iterdir())


def below(directory: Path) -> tuple[int, int]:
    """Number and bytes of the files there, by another walk."""
    files = [os.path.join(where, name) for where, _, names in os.walk(directory) for name in names]
    return len(files), sum(os.path.getsize(file) for file in files)


@pytest.mark.parametrize("case", sampled(ZERO), ids=lambda case: case.name)
def test_of_deepspeed(case: Path) -> None:
    tag = json.loads((case / "facts.json").read_text())["tags"][-1]

    found = saved_size(case / "checkpoint")

    assert found.path == case / "checkpoint" / tag
    assert (found.files, found.nbytes) == below(found.path)
    assert found.nbytes == open_checkpoint(case / "checkpoint").bytes_on_disk
    assert saved_size(found.path) == found


@pytest.mark.parametrize(
    ("case", "typed", "whole"),
    [
        ("accelerate/plain", ".", "."),
        ("accelerate/plain-two-models", ".", "."),
        ("accelerate/deepspeed-two-models-2ranks", ".", "."),
        ("accelerate/deepspeed-zero3-3ranks", ".", "."),
        ("accelerate/fsdp2-sharded-3ranks", ".", "."),
        ("accelerate/fsdp2-sharded-3ranks", "pytorch_model_fsdp_0", "."),
        ("accelerate/fsdp2-full-2ranks", ".", "."),
        ("accelerate/trainer-plain", ".", "checkpoint-2"),
        ("accelerate/trainer-fsdp2-2ranks", ".", "checkpoint-2"),
        ("accelerate/automatic-naming", "checkpoints/checkpoint_1", "checkpoints/checkpoint_1"),
        ("dcp/fsdp2-model-3ranks", ".", "."),
        ("dcp/olmo-core-olmo3-4ranks", ".", "step2"),
        ("rank_files/verl-fsdp1-3ranks", ".", "."),
    ],
)
def test_optimizer_and_random_states_beside_the_weights_count(
    fixtures: Path, case: str, typed: str, whole: str
) -> None:
    checkpoint = fixtures / case / "checkpoint"

    found = saved_size(checkpoint / typed)

    assert found.path == checkpoint / whole
    assert (found.files, found.nbytes) == below(checkpoint / whole)


@pytest.mark.parametrize("case", ["trainer-zero2-llama", "trainer-zero3-olmo2"])
def test_of_the_trainer_with_deepspeed(fixtures: Path, case: str) -> None:
    checkpoint = fixtures / "trainer" / case / "checkpoint-2"

    for typed in (checkpoint, checkpoint / "global_step2"):
        found = saved_size(typed)
        assert (found.path, found.files, found.nbytes) == (checkpoint, *below(checkpoint))


def test_the_directory_of_a_run_is_no_save(fixtures: Path, tmp_path: Path) -> None:
    """At its end the Trainer writes its state beside the checkpoints, too."""
    shutil.copytree(fixtures / "accelerate" / "trainer-plain" / "checkpoint", tmp_path / "run")
    shutil.copy(tmp_path / "run" / "checkpoint-2" / "trainer_state.json", tmp_path / "run")
    (tmp_path / "run" / "model.log").write_bytes(bytes(1000))

    assert saved_size(tmp_path / "run" / "checkpoint-2").path == tmp_path / "run" / "checkpoint-2"


def test_a_path_is_taken_from_where_it_is_typed(
    fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fixtures / "accelerate" / "fsdp2-sharded-3ranks" / "checkpoint"
    shutil.copytree(source, tmp_path / "save")
    monkeypatch.chdir(tmp_path / "save" / "pytorch_model_fsdp_0")

    assert saved_size(".").nbytes == below(tmp_path / "save")[1]


def test_of_several_saves_one_must_be_named(fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "zero" / "zero2-bf16-llama-two-saves-2ranks" / "checkpoint"
    shutil.copytree(source, tmp_path / "run")
    (tmp_path / "run" / "latest").unlink()

    with pytest.raises(AmbiguousCheckpoint, match="global_step2, global_step4"):
        saved_size(tmp_path / "run")

    found = saved_size(tmp_path / "run", tag="global_step2")
    assert found.path == tmp_path / "run" / "global_step2"


def test_what_is_incomplete_has_no_size(fixtures: Path, tmp_path: Path) -> None:
    shutil.copytree(fixtures / "zero" / "zero2-bf16-llama-3ranks" / "checkpoint", tmp_path / "run")
    (lost,) = (tmp_path / "run").glob("*/*rank_1_mp_rank_00_optim_states.pt")
    lost.unlink()

    with pytest.raises(DamagedCheckpoint, match="rank"):
        saved_size(tmp_path / "run")


def test_what_is_no_checkpoint_has_no_size(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint):
        saved_size(tmp_path)
