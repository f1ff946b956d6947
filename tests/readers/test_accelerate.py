"""``save_state`` in every way that Accelerate and the Trainer know, against the live models."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tools import inspect, open_checkpoint, readers
from ckpt_tools.errors import (
    AmbiguousCheckpoint,
    CkptError,
    DamagedCheckpoint,
    NotACheckpoint,
    UsageError,
)
from ckpt_tools.readers import accelerate
from ckpt_tools.tensors.checkpoint import Checkpoint
from tests.support import damage
from tests.support.hostile import CALLS, splice
from tests.support.readers.contract import FIXTURES, Case, ReaderContract, Tensors, assert_same

SAVED = FIXTURES / "accelerate"
WHOLE = {
    "plain": "plain",
    "plain-bin-tied": "plain",
    "plain-compiled": "plain",
    "plain-lora": "plain",
    "ddp-tied-2ranks": "plain",
    "fsdp1-full-2ranks": "FSDP, full",
    "fsdp2-full-2ranks": "FSDP, full",
}


class WholeCase(Case):
    """A shipped checkpoint whose weights are in files of their own.

    Nothing tells a frozen parameter from a trained one. A safetensors file has no second names of tied
    tensors, and a compiled model's names have ``_orig_mod.``.
    """

    @cached_property
    def facts(self) -> dict[str, Any]:
        facts = super().facts
        kept = facts["tied"] if self.name == "plain-bin-tied" else {}
        return {**facts, "frozen": [], "tied": kept}

    @cached_property
    def left_out(self) -> set[str]:
        return set()

    @cached_property
    def model(self) -> Tensors:
        dropped = set(Case(self.directory).facts["tied"]) - set(self.facts["tied"])
        wrapper = "_orig_mod." if self.name == "plain-compiled" else ""
        tensors = load_file(self.directory / "truth" / "model.safetensors")
        return {wrapper + name: t for name, t in tensors.items() if name not in dropped}

    @cached_property
    def masters(self) -> Tensors:
        return {name: t for name, t in self.model.items() if name not in self.facts["tied"]}


class TestEverySaveOfWholeModels(ReaderContract):
    @pytest.fixture(params=WHOLE)
    def case(self, request: pytest.FixtureRequest) -> Case:
        return WholeCase(SAVED / request.param)

    def keeps_model_copy(self, case: Case) -> bool:
        return True

    def framework(self, case: Case) -> str:
        return "accelerate"

    def test_parameters_are_counted_once(self, checkpoint: Checkpoint, case: Case) -> None:
        counted = sum(math.prod(weight.shape) for weight in checkpoint.weights.values())
        assert counted == case.facts["parameter_count"]

    def test_step_ranks_and_framework_are_those_of_the_run(
        self, checkpoint: Checkpoint, case: Case
    ) -> None:
        # No file but the optimizer's says how many steps were taken, and a process alone is one.
        ranks = max(case.facts["world_size"], 1)
        assert (checkpoint.step, checkpoint.world_size) == (None, ranks)
        assert checkpoint.framework == "accelerate"

    def test_its_title(self, checkpoint: Checkpoint, case: Case) -> None:
        assert checkpoint.title == f"Accelerate save_state ({WHOLE[case.name]})"
        assert checkpoint.location.format == "accelerate"
        assert checkpoint.remarks == ()


def assert_is(checkpoint: Checkpoint, truth: Path, *, but: frozenset[str] = frozenset()) -> None:
    """Every tensor, cast to the dtype of the model, is the live one."""
    live = load_file(truth / "model.safetensors")
    assert set(checkpoint) == set(live) - but
    for name in checkpoint:
        dtype = checkpoint.weights[checkpoint.ties.get(name, name)].dtype
        assert_same(checkpoint[name].load().to(dtype.torch), live[name], name)


# States of another format inside.


@pytest.mark.parametrize(
    ("name", "form", "title", "inner"),
    [
        ("fsdp1-sharded-2ranks", "torch-dcp", "torch DCP", "pytorch_model_fsdp_0"),
        ("fsdp2-sharded-3ranks", "torch-dcp", "torch DCP", "pytorch_model_fsdp_0"),
        ("fsdp2-tied-2ranks", "torch-dcp", "torch DCP", "pytorch_model_fsdp_0"),
        ("fsdp2-lora-2ranks", "torch-dcp", "torch DCP", "pytorch_model_fsdp_0"),
        ("trainer-fsdp1-2ranks", "torch-dcp", "torch DCP", "pytorch_model_fsdp_0"),
        ("trainer-fsdp2-2ranks", "torch-dcp", "torch DCP", "pytorch_model_fsdp_0"),
        ("deepspeed-zero2-2ranks", "deepspeed", "DeepSpeed ZeRO-2", "pytorch_model"),
        ("deepspeed-zero3-3ranks", "deepspeed", "DeepSpeed ZeRO-3", "pytorch_model"),
        ("deepspeed-lora-zero3-2ranks", "deepspeed", "DeepSpeed ZeRO-3", "pytorch_model"),
    ],
)
def test_a_state_of_another_format_is_that_formats(
    name: str, form: str, title: str, inner: str
) -> None:
    checkpoint = open_checkpoint(SAVED / name / "checkpoint")
    location = checkpoint.location
    assert (location.format, checkpoint.title, location.name) == (form, title, inner)
    assert location.directory.name == inner
    assert location.directory.parent in location.near
    assert_is(checkpoint, SAVED / name / "truth")


@pytest.mark.parametrize("name", ["fsdp1-rank-files-2ranks", "fsdp2-rank-files-3ranks"])
def test_one_file_a_rank_is_left_to_its_reader(name: str) -> None:
    checkpoint = open_checkpoint(SAVED / name / "checkpoint")
    assert checkpoint.location.format == "rank-files"
    assert_is(checkpoint, SAVED / name / "truth")


def test_a_plain_directory_of_the_trainer_is_a_hugging_face_one_with_a_step() -> None:
    checkpoint = open_checkpoint(SAVED / "trainer-plain" / "checkpoint")
    assert (checkpoint.location.format, checkpoint.step) == ("huggingface", 2)
    assert_is(checkpoint, SAVED / "trainer-plain" / "truth", but=frozenset({"lm_head.weight"}))


def test_save_model_writes_a_hugging_face_directory() -> None:
    checkpoint = open_checkpoint(SAVED / "save-model-sharded" / "checkpoint")
    assert (checkpoint.location.format, checkpoint.step) == ("huggingface", None)
    assert_is(checkpoint, SAVED / "save-model-sharded" / "truth")


# Several models, several saves.


def test_several_models_are_a_choice() -> None:
    directory = SAVED / "plain-two-models"
    with pytest.raises(AmbiguousCheckpoint) as caught:
        open_checkpoint(directory / "checkpoint")
    assert caught.value.choices == ("model", "model_1")
    first = open_checkpoint(directory / "checkpoint", tag="model")
    assert_is(first, directory / "truth")
    second = open_checkpoint(directory / "checkpoint", tag="model_1")
    assert second.details["model"] == "model_1"
    assert_is(second, directory / "truth-model_1")
    assert_is(
        open_checkpoint(directory / "checkpoint" / "model_1.safetensors"),
        directory / "truth-model_1",
    )
    with pytest.raises(UsageError, match="Pass --tag with one of: model, model_1"):
        open_checkpoint(directory / "checkpoint", tag="model_2")


def test_several_deepspeed_models_are_a_choice_though_latest_names_the_last() -> None:
    directory = SAVED / "deepspeed-two-models-2ranks"
    with pytest.raises(AmbiguousCheckpoint) as caught:
        open_checkpoint(directory / "checkpoint")
    assert caught.value.choices == ("pytorch_model", "pytorch_model_1")
    for tag, truth in (("pytorch_model", "truth"), ("pytorch_model_1", "truth-pytorch_model_1")):
        assert_is(open_checkpoint(directory / "checkpoint", tag=tag), directory / truth)


AUTOMATIC = SAVED / "automatic-naming"


@pytest.mark.parametrize("path", [AUTOMATIC / "checkpoint", AUTOMATIC / "checkpoint/checkpoints"])
def test_the_newest_of_several_saves_is_not_silently_taken(path: Path) -> None:
    with pytest.raises(AmbiguousCheckpoint) as caught:
        open_checkpoint(path)
    assert caught.value.choices == ("checkpoint_0", "checkpoint_1")
    older = open_checkpoint(path, tag="checkpoint_0")
    # The number counts saves.
    assert older.step is None
    assert_is(older, AUTOMATIC / "truth-checkpoint_0")
    assert_is(open_checkpoint(path, tag="checkpoint_1"), AUTOMATIC / "truth")
    assert_is(
        open_checkpoint(AUTOMATIC / "checkpoint/checkpoints/checkpoint_1"), AUTOMATIC / "truth"
    )


def test_one_save_with_an_automatic_name_needs_no_choice(tmp_path: Path) -> None:
    directory = copy_of("automatic-naming", tmp_path)
    shutil.rmtree(directory / "checkpoints" / "checkpoint_0")
    assert readers.locate(directory).name == "checkpoint_1"


def test_several_models_in_several_saves_have_names_of_two_parts(tmp_path: Path) -> None:
    for number in range(2):
        save = tmp_path / "checkpoints" / f"checkpoint_{number}"
        shutil.copytree(SAVED / "plain-two-models" / "checkpoint", save)
    with pytest.raises(AmbiguousCheckpoint) as caught:
        open_checkpoint(tmp_path, tag="checkpoint_1")
    assert caught.value.choices == ("checkpoint_1/model", "checkpoint_1/model_1")
    checkpoint = open_checkpoint(tmp_path, tag="checkpoint_1/model_1")
    assert_is(checkpoint, SAVED / "plain-two-models" / "truth-model_1")


# What else lies there.


def copy_of(name: str, tmp_path: Path) -> Path:
    """A copy of a shipped checkpoint to damage."""
    return Path(shutil.copytree(SAVED / name / "checkpoint", tmp_path / name))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return copy_of("plain", tmp_path)


def test_the_rest_is_recognised_and_never_opened(plain: Path) -> None:
    for name in ("sampler.bin", "sampler_1.bin", "dl_state_dict.bin", "scaler.pt"):
        (plain / name).touch()
    for path in plain.iterdir():
        if path.name != "model.safetensors":
            path.write_bytes(b"garbage")
    checkpoint = open_checkpoint(plain)
    assert checkpoint.details["left_alone"] == {
        "custom_checkpoint": 1,
        "dl_state_dict": 1,
        "optimizer": 1,
        "random_states": 1,
        "sampler": 2,
        "scaler": 1,
        "scheduler": 1,
    }
    assert_is(checkpoint, SAVED / "plain" / "truth")


def test_random_states_alone_tell_a_saved_state(plain: Path) -> None:
    for name in ("optimizer.bin", "scheduler.bin", "custom_checkpoint_0.pkl"):
        (plain / name).unlink()
    assert readers.locate(plain).format == "accelerate"
    (plain / "random_states_0.pkl").unlink()
    assert readers.locate(plain).format == "huggingface"


def test_an_export_beside_a_distributed_state_is_not_taken_for_it(tmp_path: Path) -> None:
    directory = copy_of("fsdp2-full-2ranks", tmp_path)
    save_file({"w": torch.ones(2)}, directory / "model.safetensors")
    (directory / "trainer_state.json").write_text('{"global_step": 30}')
    checkpoint = open_checkpoint(directory)
    assert checkpoint.title == "Transformers Trainer (FSDP, full)"
    assert checkpoint.step == 30
    assert_is(checkpoint, SAVED / "fsdp2-full-2ranks" / "truth")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"global_step": "2"}', '{"global_step": true}', "{}"]
)
def test_a_trainer_state_that_cannot_be_read_is_no_failure(plain: Path, text: str) -> None:
    (plain / "trainer_state.json").write_text(text)
    assert open_checkpoint(plain).step is None


def test_weights_of_two_kinds_are_a_choice(plain: Path) -> None:
    torch.save({"w": torch.ones(2)}, plain / "pytorch_model.bin")
    with pytest.raises(AmbiguousCheckpoint) as caught:
        open_checkpoint(plain)
    assert caught.value.choices == ("model", "pytorch_model")
    assert_is(open_checkpoint(plain, tag="model"), SAVED / "plain" / "truth")


def test_shards_with_an_index_are_one_model(plain: Path) -> None:
    (plain / "model.safetensors").unlink()
    for path in (SAVED / "save-model-sharded" / "checkpoint").iterdir():
        shutil.copy(path, plain)
    assert_is(open_checkpoint(plain), SAVED / "save-model-sharded" / "truth")
    lost = plain / "model-00002-of-00002.safetensors"
    lost.unlink()
    assert damaged(plain).missing == (lost.name,)


def test_a_directory_without_weights_is_none(plain: Path) -> None:
    (plain / "model.safetensors").unlink()
    with pytest.raises(NotACheckpoint):
        open_checkpoint(plain)


# Damage.


def refusal(path: Path) -> CkptError:
    with pytest.raises(CkptError) as caught:
        open_checkpoint(path)
    return caught.value


def damaged(path: Path) -> DamagedCheckpoint:
    error = refusal(path)
    assert isinstance(error, DamagedCheckpoint)
    return error


@pytest.mark.parametrize("name", ["plain", "plain-bin-tied", "fsdp1-full-2ranks"])
@pytest.mark.parametrize("size", [0, 64, 9000])
def test_a_truncated_file(name: str, size: int, tmp_path: Path) -> None:
    directory = copy_of(name, tmp_path)
    (weights,) = [p for p in directory.iterdir() if "model" in p.name]
    damage.truncate(weights, size)
    assert damaged(directory).path == weights
    assert str(weights) in inspect(directory).problems[0]


def test_latest_that_leads_nowhere(tmp_path: Path) -> None:
    directory = copy_of("deepspeed-zero2-2ranks", tmp_path)
    shutil.rmtree(directory / "pytorch_model")
    assert damaged(directory).path == directory / "latest"


def test_weights_that_went_away_meanwhile(plain: Path) -> None:
    location = readers.locate(plain)
    (plain / "model.safetensors").unlink()
    with pytest.raises(DamagedCheckpoint, match="the files of its weights no longer exist"):
        readers.read(location)


@pytest.mark.parametrize("attack", CALLS)
def test_no_code_runs(attack: str, tmp_path: Path) -> None:
    directory, canary = copy_of("fsdp2-full-2ranks", tmp_path), tmp_path / "canary"
    splice(directory / "pytorch_model_fsdp.bin", "evil", CALLS[attack](canary))
    refusal(directory)
    assert not canary.exists()


def test_finding_needs_no_permission_to_read_and_no_directory(tmp_path: Path) -> None:
    assert accelerate.find(tmp_path / "nowhere") == []
    assert accelerate.find(tmp_path) == []


def test_metadata_alone_needs_no_torch() -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from ckpt_tools import readers\n"
        "for path in sys.argv[1:]:\n"
        "    readers.read(readers.locate(Path(path)))\n"
        "assert not {'torch', 'accelerate'} & sys.modules.keys()\n"
    )
    names = ("plain", "fsdp2-full-2ranks", "fsdp2-sharded-3ranks", "deepspeed-zero3-3ranks")
    paths = [str(SAVED / name / "checkpoint") for name in names]
    subprocess.run([sys.executable, "-c", program, *paths], check=True)
