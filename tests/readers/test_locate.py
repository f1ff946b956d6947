"""Which checkpoint a path means: every way people spell it, and what they are told when it means none."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from ckpt_tools import inspect, merge_lora, open_checkpoint, readers
from ckpt_tools.errors import (
    AmbiguousCheckpoint,
    CkptError,
    DamagedCheckpoint,
    NotACheckpoint,
    UsageError,
)
from ckpt_tools.readers import tree
from ckpt_tools.tensors.checkpoint import Location
from tests.conftest import FIXTURES
from tests.support import damage

TWO_SAVES = "zero2-bf16-llama-two-saves-2ranks"
PLAIN = "zero2-bf16-llama-3ranks"
STAGE_3 = "zero3-bf16-llama-7ranks"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A directory with ``latest`` and two tags, of which it names the second."""
    return damage.copy_of(TWO_SAVES, tmp_path).parent


def refusal(path: Path, tag: str | None = None) -> CkptError:
    with pytest.raises(CkptError) as caught:
        readers.locate(path, tag)
    return caught.value


# Spellings.


def test_a_directory_with_latest_means_what_latest_names(run: Path) -> None:
    location = readers.locate(run)
    assert (location.directory, location.name) == (run / "global_step4", "global_step4")
    assert location.remarks == ()


def test_a_tags_directory_means_itself(run: Path) -> None:
    assert readers.locate(run / "global_step2").directory == run / "global_step2"


@pytest.mark.parametrize(
    "name", ["mp_rank_00_model_states.pt", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"]
)
def test_one_of_its_files_means_the_whole_checkpoint(run: Path, name: str) -> None:
    assert readers.locate(run / "global_step2" / name).directory == run / "global_step2"


def test_the_pointer_itself_may_be_named(run: Path) -> None:
    assert readers.locate(run / "latest").directory == run / "global_step4"


def test_a_tag_is_taken_over_latest(run: Path) -> None:
    assert readers.locate(run, "global_step2").directory == run / "global_step2"


def test_a_tag_that_is_the_directory_itself_is_no_contradiction(run: Path) -> None:
    assert readers.locate(run / "global_step2", "global_step2").name == "global_step2"


def test_a_transformers_checkpoint_directory_means_the_shards_in_it(
    run: Path, tmp_path: Path
) -> None:
    trainer = tmp_path / "outputs" / "checkpoint-4"
    shutil.copytree(run, trainer)
    (trainer / "trainer_state.json").write_text("{}")
    assert readers.locate(trainer).directory == trainer / "global_step4"
    # One level above is as good while there is only one.
    assert readers.locate(trainer.parent).directory == trainer / "global_step4"


def test_a_directory_with_one_tag_and_no_pointer_means_that_tag(tmp_path: Path) -> None:
    shards = damage.copy_of(PLAIN, tmp_path)
    (shards.parent / "latest").unlink()
    assert readers.locate(shards.parent).directory == shards


def test_a_relative_path_with_dots_is_followed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run / "global_step2")
    assert readers.locate(Path("..")).name == "global_step4"
    assert open_checkpoint("..").step == 4
    assert open_checkpoint(".").step == 2


def test_a_tag_behind_a_symbolic_link_is_followed(run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "disk2"
    shutil.move(run / "global_step4", elsewhere)
    (run / "global_step4").symlink_to(elsewhere)
    assert open_checkpoint(run).step == 4


def test_white_space_around_the_tag_in_latest_is_ignored(run: Path) -> None:
    (run / "latest").write_text("global_step2\r\n")
    assert readers.locate(run).name == "global_step2"


def test_tokenizer_and_config_are_looked_for_from_the_nearest_outwards(run: Path) -> None:
    assert readers.locate(run).near == (run / "global_step4", run, run.parent)


def test_training_state_comes_before_finished_weights_beside_it(run: Path) -> None:
    (run / "model.safetensors").write_bytes(b"")
    assert readers.locate(run).directory == run / "global_step4"
    assert readers.locate(run / "model.safetensors").format == "huggingface"


# The pointer.


@pytest.mark.parametrize("tag", ["../elsewhere", "/etc", "a/../../b", "", " \n"])
def test_a_pointer_that_leads_outside_is_refused(run: Path, tag: str) -> None:
    (run / "latest").write_text(tag)
    error = refusal(run)
    assert isinstance(error, DamagedCheckpoint)
    assert error.exit_code == 4
    assert error.path == run / "latest"
    assert error.fact == f"its content is {tag.strip()!r}, which is not a directory beside it"
    assert error.hint == "Pass --tag with one of: global_step2, global_step4."


def test_a_pointer_that_leads_outside_is_not_followed_where_a_checkpoint_lies(
    run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "other")
    (run / "latest").write_text("../other/global_step2")
    assert refusal(run).path == run / "latest"
    (run / "latest").write_text(str(tmp_path / "other" / "global_step2"))
    assert refusal(run).path == run / "latest"


@pytest.mark.parametrize("tag", ["global_step9", "x" * 5000, "<html>\n" * 40, "nul\0nul"])
def test_a_pointer_to_what_is_not_there_is_refused(run: Path, tag: str) -> None:
    (run / "latest").write_text(tag)
    error = refusal(run)
    assert isinstance(error, DamagedCheckpoint)
    assert error.fact == f"its content is {tag.strip()!r}, but this directory does not exist"
    assert error.hint == "Pass --tag with one of: global_step2, global_step4."


def test_a_pointer_that_is_no_text_is_refused(run: Path) -> None:
    (run / "latest").write_bytes(b"\xff\xfe\x00\x80")
    assert isinstance(refusal(run), DamagedCheckpoint)


def test_a_pointer_to_a_directory_without_shards_is_refused(run: Path) -> None:
    (run / "logs").mkdir()
    (run / "latest").write_text("logs")
    assert (
        refusal(run).fact == "its content is 'logs', but this directory holds no DeepSpeed shards"
    )


def test_a_lone_pointer_says_that_everything_else_is_gone(run: Path) -> None:
    shutil.rmtree(run / "global_step2")
    shutil.rmtree(run / "global_step4")
    hint = "There is no checkpoint beside it. The directory may have been moved or deleted."
    assert refusal(run).hint == hint


def test_a_stale_pointer_is_followed_and_remarked(run: Path) -> None:
    (run / "latest").write_text("global_step2")
    location = readers.locate(run)
    assert location.name == "global_step2"
    remark = "newer than the checkpoint in `latest`: global_step4"
    assert location.remarks == (remark,)
    assert readers.read(location).remarks == (remark,)


def test_steps_are_compared_as_numbers(run: Path) -> None:
    (run / "global_step4").rename(run / "global_step10")
    (run / "latest").write_text("global_step10")
    assert readers.locate(run).remarks == ()
    (run / "latest").write_text("global_step2")
    assert "global_step10" in readers.locate(run).remarks[0]


def test_tags_of_other_engines_in_the_folder_are_named(run: Path) -> None:
    """Policy and critic saved into one folder: `latest` names the last save, whichever engine's it is."""
    (run / "global_step2").rename(run / "policy")
    (run / "global_step4").rename(run / "critic")
    (run / "latest").write_text("critic")
    assert readers.locate(run).remarks == ("`latest` names critic; --tag chooses others: policy",)
    assert readers.locate(run, "policy").remarks == ()


# Ambiguity.


def test_several_tags_without_a_pointer_are_listed(run: Path) -> None:
    (run / "latest").unlink()
    error = refusal(run)
    assert isinstance(error, AmbiguousCheckpoint)
    assert error.exit_code == 2
    assert error.choices == ("global_step2", "global_step4")
    assert str(error) == (
        f"{run}: there are 2 checkpoints here\nPass --tag with one of them: global_step2, global_step4."
    )


def test_several_runs_in_one_directory_are_listed_by_path(tmp_path: Path) -> None:
    shards = [damage.copy_of(name, tmp_path) for name in (PLAIN, STAGE_3)]
    error = refusal(tmp_path)
    assert isinstance(error, AmbiguousCheckpoint)
    assert error.choices == tuple(str(path) for path in shards)
    assert f"{shards[0]} (DeepSpeed ZeRO-2, step 2), {shards[1]} (DeepSpeed ZeRO-3" in str(error)
    assert f"Pass the path of one of them, for example: ckpt-tools inspect {shards[1]}" in str(
        error
    )
    assert error.exit_code == 2
    assert inspect(shards[1]).title == "DeepSpeed ZeRO-3"


def test_the_tree_of_a_run_is_looked_through(tmp_path: Path) -> None:
    """A few levels deep, without links, hidden directories, optimizers, and parts of a checkpoint."""
    save = tmp_path / "run" / "saves" / "2026" / "step-7"
    shutil.copytree(FIXTURES / "dcp" / "no-dist" / "checkpoint", save)
    optimizer = {"optim": {"state": {"w": torch.ones(3, 3)}, "param_groups": {"lr": 0.1}}}
    for name in ("optimizer_0", "adam"):
        dcp.save(optimizer, checkpoint_id=tmp_path / "run" / "states" / name)
    (tmp_path / "elsewhere").symlink_to(tmp_path / "run")
    shutil.copytree(save, tmp_path / ".cache" / "step-7")
    assert readers.locate(tmp_path).directory == save

    other = tmp_path / "run" / "saves" / "2025" / "step-9"
    shutil.copytree(save, other)
    error = refusal(tmp_path)
    assert isinstance(error, AmbiguousCheckpoint)
    assert error.choices == (str(other), str(save))
    assert f"Found: {other} (torch DCP, step 9), {save} (torch DCP, step 7)" in str(error)
    assert readers.locate(tmp_path / "run" / "saves" / "2026").directory == save

    shutil.move(other, tmp_path / "a" / "b" / "c" / "d" / "e" / "step-9")
    assert readers.locate(tmp_path).directory == save, "six levels are too deep"


def test_what_cannot_be_read_beside_the_only_checkpoint_is_a_remark(
    tmp_path: Path, run: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "latest").write_text("global_step9")
    (remark,) = readers.locate(tmp_path).remarks
    assert "beside it, and not read" in remark
    assert "global_step9" in remark
    shutil.rmtree(run)
    assert isinstance(refusal(tmp_path), DamagedCheckpoint)


def test_the_look_through_a_tree_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "MOST_ENTRIES", 50)
    for number in range(30):
        (tmp_path / f"a{number}" / "b").mkdir(parents=True)
    asked: list[Path] = []

    def find(directory: Path) -> list[Location]:
        asked.append(directory)
        return []

    found = tree.look_below(tmp_path, find)
    assert not found.is_whole
    assert len(asked) <= 50


def test_each_choice_can_be_named(run: Path) -> None:
    (run / "latest").unlink()
    error = refusal(run)
    assert isinstance(error, AmbiguousCheckpoint)
    for choice, step in zip(error.choices, (2, 4), strict=True):
        assert open_checkpoint(run, tag=choice).step == step


def test_a_tag_that_is_not_there_lists_those_that_are(run: Path) -> None:
    error = refusal(run, "global_step3")
    assert isinstance(error, UsageError)
    assert (error.exit_code, error.fact) == (
        2,
        "there is no checkpoint with the tag 'global_step3'",
    )
    assert error.hint == "Pass --tag with one of: global_step2, global_step4."


def test_a_tag_of_another_directory_is_refused(run: Path) -> None:
    error = refusal(run / "global_step2", "global_step4")
    assert isinstance(error, UsageError)
    assert "holds the shards of 'global_step2', not of 'global_step4'" in error.fact
    assert error.hint == "Omit --tag, or pass the directory above."


# No checkpoint at all.

NOTHING: dict[str, Callable[[Path], Path]] = {
    "an empty directory": lambda p: p,
    "a directory of other things": lambda p: [(p / n).write_text("x") for n in "abcdefghijk"] and p,
    "a text file": lambda p: (p / "notes.txt").write_text("x") and p / "notes.txt",
    "a file named like a tag": lambda p: (
        (p / "global_step5").write_text("x") and p / "global_step5"
    ),
    "directories two levels down": lambda p: (p / "a" / "b").mkdir(parents=True) or p,
}


@pytest.mark.parametrize("kind", NOTHING)
def test_what_is_no_checkpoint_is_said_to_be_none(kind: str, tmp_path: Path) -> None:
    path = NOTHING[kind](tmp_path)
    error = refusal(path)
    assert isinstance(error, NotACheckpoint)
    assert error.exit_code == 3
    assert error.path == path
    assert error.fact == "no checkpoint of a known format was found"
    assert error.hint is not None
    if path.is_dir():
        assert error.hint.startswith("The path holds: ")
        assert "checkpoint-N directory" in error.hint
    else:
        assert error.hint == "Pass a file that holds weights, or the directory of a checkpoint."


ADAPTER = FIXTURES / "accelerate" / "trainer-lora" / "checkpoint" / "checkpoint-2"


@pytest.mark.parametrize(
    "path",
    [ADAPTER, ADAPTER.parent, ADAPTER / "adapter_model.safetensors", ADAPTER / "optimizer.pt"],
)
def test_an_adapter_alone_is_said_to_be_one_and_what_to_do_with_it(path: Path) -> None:
    """As the Trainer saves it of a LoRA model."""
    error = refusal(path)
    assert isinstance(error, NotACheckpoint)
    assert (error.path, error.fact) == (
        ADAPTER,
        "an adapter that PEFT saved, not a checkpoint of a model",
    )
    assert error.hint is not None
    assert f"ckpt-tools merge-lora BASE OUT --adapter-dir {ADAPTER}. " in error.hint


def test_the_newest_of_several_adapters_is_named(tmp_path: Path) -> None:
    for number in (2, 10, 9):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "adapter_model.bin").touch()
    (tmp_path / "notes.txt").touch()
    error = refusal(tmp_path)
    assert error.path == tmp_path
    assert f"--adapter-dir {tmp_path / 'checkpoint-10'}. " in str(error.hint)
    assert refusal(tmp_path / "notes.txt").fact == "no checkpoint of a known format was found"


def test_what_is_said_of_an_adapter_alone_works(tmp_path: Path) -> None:
    """BASE being the model that it was trained on, the two become what PEFT computes with."""
    live = load_file(ADAPTER.parents[1] / "truth" / "model.safetensors")
    plain = {name.removeprefix("base_model.model."): tensor for name, tensor in live.items()}
    base = {name.replace(".base_layer", ""): t for name, t in plain.items() if "lora_" not in name}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    named = re.search(r"--adapter-dir (.*?)\. To change", str(refusal(ADAPTER).hint))
    assert named is not None

    merge_lora(tmp_path / "base", tmp_path / "out", adapter_dir=named[1], weights_only=True)

    config = json.loads((ADAPTER / "adapter_config.json").read_text())
    merged, changed = load_file(tmp_path / "out" / "model.safetensors"), 0
    assert merged.keys() == base.keys()
    for name, tensor in base.items():
        a, b = (plain.get(name.replace("weight", f"lora_{x}.default.weight")) for x in "AB")
        if a is not None and b is not None:
            update = config["lora_alpha"] / config["r"] * (b.float() @ a.float())
            tensor, changed = (tensor.float() + update).bfloat16(), changed + 1
        assert torch.equal(merged[name], tensor), name
    assert changed


def test_a_long_listing_is_cut_short(tmp_path: Path) -> None:
    for letter in "abcdefghijk":
        (tmp_path / letter).touch()
    hint = refusal(tmp_path).hint
    assert hint is not None
    assert "The path holds: a, b, c, d, e, f, g, h and 3 more." in hint


def test_a_path_that_is_not_there_is_said_not_to_be(tmp_path: Path) -> None:
    error = refusal(tmp_path / "runn")
    assert isinstance(error, NotACheckpoint)
    assert (
        str(error)
        == f"{tmp_path / 'runn'}: no such file or directory\n{tmp_path} is empty. Check the path."
    )


def test_optimizer_files_without_a_model_file_are_a_damaged_checkpoint(tmp_path: Path) -> None:
    directory = damage.copy_of(PLAIN, tmp_path)
    (directory / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"no \*_model_states.pt file"):
        open_checkpoint(directory)
