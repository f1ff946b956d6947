"""The pipeline: what stops it before anything is written, what it reports, and what it leaves alone."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tools import consolidate, open_checkpoint
from ckpt_tools.errors import (
    AmbiguousCheckpoint,
    CkptError,
    DamagedCheckpoint,
    MissingAsset,
    NotACheckpoint,
    OutputExists,
    OutputFailed,
    UsageError,
    VerificationFailed,
)
from ckpt_tools.tensors.checkpoint import Checkpoint
from ckpt_tools.writing.bytes import Outputs
from tests.writing.test_bytes import small_disk

__all__ = ["small_disk"]

NAME = "zero2-bf16-llama-3ranks"


@pytest.fixture
def case(fixtures: Path) -> Path:
    return fixtures / "zero" / NAME


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "out"
    assert list(tmp_path.glob("*.partial-*")) == []


def test_a_checkpoint_can_be_opened_first(case: Path, out: Path) -> None:
    checkpoint = open_checkpoint(case / "checkpoint")
    assert isinstance(checkpoint, Checkpoint)

    consolidate(checkpoint, out, weights_only=True)

    found = load_file(out / "model.safetensors")
    assert found.keys() == checkpoint.keys()
    for name, tensor in found.items():
        assert torch.equal(checkpoint[name].load().to(tensor.dtype), tensor)


@pytest.mark.parametrize("is_asked", [True, False])
def test_what_verify_finds_wrong_does_not_appear(
    case: Path, out: Path, monkeypatch: pytest.MonkeyPatch, is_asked: bool
) -> None:
    """A disk that writes another bit than it was given: without ``verify`` nobody reads it back."""
    write = Outputs.write

    def flip_a_bit(self: Outputs, file: int, data: memoryview, offset: int) -> None:
        other = bytearray(data)
        other[-1] ^= 1
        write(self, file, memoryview(other), offset)

    monkeypatch.setattr(Outputs, "write", flip_a_bit)
    if is_asked:
        with pytest.raises(VerificationFailed, match="digest-mismatch") as caught:
            consolidate(case / "checkpoint", out, weights_only=True, verify=True)
        assert caught.value.exit_code == 7
        assert caught.value.tensor == "model.norm.weight"
        assert not out.exists()
    else:
        consolidate(case / "checkpoint", out, weights_only=True)
        assert out.exists()


@pytest.mark.slow
def test_what_verify_finds_right_appears(case: Path, out: Path) -> None:
    consolidate(case / "checkpoint", out, config=case / "hf", verify=True)

    assert (out / "model.safetensors").exists()


@pytest.mark.parametrize("spelt", [str, Path])
def test_paths_may_be_text(case: Path, out: Path, spelt: Any) -> None:
    consolidate(spelt(case / "checkpoint"), spelt(out), config=spelt(case / "hf"))

    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "ckpt_tools_manifest.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_the_report_says_what_was_done(case: Path, out: Path) -> None:
    told: list[tuple[int, int]] = []

    report = consolidate(
        case / "checkpoint",
        out,
        config=case / "hf",
        progress=lambda done, total: told.append((done, total)),
    )

    facts = json.loads((case / "facts.json").read_text())
    truth = load_file(case / "truth" / "model.safetensors")
    numel = sum(tensor.numel() for tensor in truth.values())
    assert report.checkpoint == case / "checkpoint" / facts["tags"][-1]
    assert report.output == out
    assert report.source == "DeepSpeed ZeRO-2"
    assert report.step == facts["step"]
    assert report.world_size == facts["world_size"]
    assert report.framework == f"deepspeed {facts['deepspeed_version']}"
    assert report.weights == "master"
    assert report.dtypes == {"bfloat16": numel}
    assert (report.tensors, report.parameters) == (len(truth), numel)
    assert report.files == {path.name: path.stat().st_size for path in out.iterdir()}
    assert report.bytes_written == sum(report.files.values())
    assert report.bytes_read >= 4 * numel
    assert report.checked == len(truth)
    assert report.seconds["total"] >= report.seconds["move"] + report.seconds["sync"] > 0
    assert not report.dry_run
    assert told[-1] == (2 * numel, 2 * numel)
    assert json.loads(json.dumps(report.to_json()))["files"] == dict(report.files)


def test_a_dry_run_plans_everything_and_writes_nothing(case: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"config": case / "hf", "max_shard_size": 2_000}
    planned = consolidate(case / "checkpoint", tmp_path / "a" / "out", dry_run=True, **options)
    assert list(tmp_path.iterdir()) == []
    assert planned.dry_run
    assert (planned.bytes_read, planned.bytes_written) == (0, 0)

    done = consolidate(case / "checkpoint", tmp_path / "out", **options)

    written = dict(done.files)
    assert written.pop("ckpt_tools_manifest.json") > 0, "which nobody knows before it is written"
    assert planned.files == written
    listed = json.loads(json.dumps(planned.to_json()))["plan"]
    assert {f["file"]: f["bytes"] for f in listed} == {
        name: size for name, size in done.files.items() if name.endswith(".safetensors")
    }
    assert sum(len(file["tensors"]) for file in listed) == done.tensors
    assert "plan" not in done.to_json()


def test_a_dry_run_finds_damage_too(case: Path, tmp_path: Path) -> None:
    shards = damaged_copy(case, tmp_path)

    with pytest.raises(DamagedCheckpoint, match="is not its 16-bit weight"):
        consolidate(shards, tmp_path / "out", dry_run=True, weights_only=True)


def damaged_copy(case: Path, directory: Path) -> Path:
    """A checkpoint whose optimizer files were made by another run."""
    shutil.copytree(case / "checkpoint", directory / "run")
    (shards,) = (directory / "run").glob("global_step*")
    for file in shards.glob("*optim_states.pt"):
        content = torch.load(file, weights_only=False)
        for group in content["optimizer_state_dict"]["single_partition_of_fp32_groups"]:
            group.data.add_(1)
        torch.save(content, file)
    return shards


def refusals(case: Path, tmp_path: Path) -> dict[str, tuple[type[CkptError], str, dict[str, Any]]]:
    """What is wrong, the error, a word of its message, and the arguments."""
    ok: dict[str, Any] = {"checkpoint": case / "checkpoint", "config": case / "hf"}
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    (tmp_path / "file").write_text("")
    two = case.parent / "zero2-bf16-llama-two-saves-2ranks" / "checkpoint"
    shutil.copytree(two, tmp_path / "two", ignore=shutil.ignore_patterns("latest"))
    return {
        "no such path": (NotACheckpoint, "no such file", ok | {"checkpoint": tmp_path / "gone"}),
        "nothing there": (
            NotACheckpoint,
            "no checkpoint of a known format",
            ok | {"checkpoint": tmp_path / "empty"},
        ),
        "several": (AmbiguousCheckpoint, "global_step4", ok | {"checkpoint": tmp_path / "two"}),
        "no such tag": (UsageError, "global_step77", ok | {"tag": "global_step77"}),
        "no config": (MissingAsset, "config", {"checkpoint": case / "checkpoint"}),
        "no such config": (MissingAsset, "gone", ok | {"config": tmp_path / "gone"}),
        "unreadable config": (DamagedCheckpoint, "config.json", ok | {"config": tmp_path / "bad"}),
        "no such tokenizer": (MissingAsset, "gone", ok | {"tokenizer": tmp_path / "gone"}),
        "no OLMo tokens": (MissingAsset, "tokenizer", ok | {"generation_config": "olmo"}),
        "no such like": (NotACheckpoint, "gone", ok | {"like": tmp_path / "gone"}),
        "no dtype": (UsageError, "int4", ok | {"dtype": "int4"}),
        "no size": (UsageError, "5 apples", ok | {"max_shard_size": "5 apples"}),
        "output is a file": (OutputExists, "file", ok | {"output": tmp_path / "file"}),
        "output is the input": (
            UsageError,
            "delete the input",
            {
                "checkpoint": case / "checkpoint",
                "output": case,
                "overwrite": True,
                "weights_only": True,
            },
        ),
    }


def test_arguments_in_the_wrong_order_are_recognised(case: Path, tmp_path: Path) -> None:
    checkpoint, gone = case / "checkpoint", tmp_path / "gone"
    with pytest.raises(NotACheckpoint, match="no such file") as caught:
        consolidate(gone, checkpoint, weights_only=True)
    assert str(caught.value.hint).endswith(f"{checkpoint} holds a checkpoint: exchange the two.")

    consolidate(checkpoint, tmp_path / "out", weights_only=True)
    for output in (tmp_path / "out", tmp_path / "none"):
        with pytest.raises(NotACheckpoint, match="no such file") as caught:
            consolidate(gone, output, weights_only=True)
        assert f"{tmp_path} holds: " in str(caught.value.hint)
        assert "exchange" not in str(caught.value.hint)


def test_a_path_that_looks_like_an_address_is_recognised() -> None:
    """A Path of an address has lost a slash."""
    for path in (Path("s3://bucket/run"), "s3:/bucket/run"):
        with pytest.raises(NotACheckpoint, match="no such file") as caught:
            open_checkpoint(path)
        assert str(caught.value.hint).endswith("with two slashes: s3://bucket/run.")


REASONS = [
    "no such path",
    "nothing there",
    "several",
    "no such tag",
    "no config",
    "no such config",
    "unreadable config",
    "no such tokenizer",
    "no OLMo tokens",
    "no such like",
    "no dtype",
    "no size",
    "output is a file",
    "output is the input",
]


@pytest.mark.parametrize("reason", REASONS)
def test_a_request_that_cannot_be_carried_out_leaves_everything_as_it_was(
    case: Path, tmp_path: Path, reason: str
) -> None:
    error, word, arguments = refusals(case, tmp_path)[reason]
    before = sorted(path.name for path in tmp_path.iterdir())

    with pytest.raises(error) as caught:
        consolidate(**{"output": tmp_path / "made" / "out"} | arguments)

    assert word in str(caught.value)
    assert caught.value.exit_code in (2, 3, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (case / "checkpoint" / "latest").is_file()


def test_every_refusal_is_tried(case: Path, tmp_path: Path) -> None:
    assert list(refusals(case, tmp_path)) == REASONS


@pytest.mark.parametrize("role", ["checkpoint", "config", "tokenizer", "like"])
def test_an_input_is_never_replaced(fixtures: Path, tmp_path: Path, role: str) -> None:
    """Not even when it is asked to be overwritten, and not by way of a link."""
    case = fixtures / "zero" / "zero3-bf16-olmo2-chat-2ranks"
    shutil.copytree(case, tmp_path / "run")
    state = load_file(case / "truth" / "model.safetensors")
    save_file(state, tmp_path / "run" / "hf" / "model.safetensors", {"format": "pt"})
    inputs = {
        "checkpoint": tmp_path / "run" / "checkpoint",
        "config": case / "hf" / "config.json",
        "tokenizer": case / "hf",
    }
    inputs |= {} if role == "checkpoint" else {role: tmp_path / "run" / "hf"}
    inputs |= {"checkpoint": case / "checkpoint"} if role != "checkpoint" else {}
    (tmp_path / "link").symlink_to(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}

    for output in (tmp_path / "run", tmp_path / "link", inputs[role]):
        with pytest.raises(UsageError, match="delete the input"):
            consolidate(output=output, overwrite=True, **inputs)

    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_an_existing_output_is_refused_and_untouched(case: Path, out: Path) -> None:
    out.mkdir()
    (out / "model.safetensors").write_text("somebody's")

    with pytest.raises(OutputExists):
        consolidate(case / "checkpoint", out, config=case / "hf")

    assert [path.read_text() for path in out.iterdir()] == ["somebody's"]


def test_overwriting_leaves_nothing_of_the_old_output(case: Path, out: Path) -> None:
    consolidate(case / "checkpoint", out, config=case / "hf", max_shard_size=2_000)
    assert len(list(out.glob("*.safetensors"))) > 2

    consolidate(case / "checkpoint", out, config=case / "hf", overwrite=True)

    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "ckpt_tools_manifest.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_an_output_that_fails_half_way_leaves_the_old_one(case: Path, out: Path) -> None:
    consolidate(case / "checkpoint", out, weights_only=True)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(done: int, total: int) -> None:
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        consolidate(
            case / "checkpoint",
            out,
            weights_only=True,
            overwrite=True,
            dtype="fp32",
            progress=fail,
        )

    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_output_may_lie_in_the_directory_of_the_checkpoint(case: Path, tmp_path: Path) -> None:
    shutil.copytree(case / "checkpoint", tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    consolidate(tmp_path / "run", tmp_path / "run" / "model", weights_only=True)

    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert (
        before.items()
        <= {
            path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()
        }.items()
    )


def test_a_disk_that_is_too_small_is_seen_before_writing(case: Path, small_disk: Path) -> None:
    (small_disk / "somebody's").write_bytes(bytes(1_045_000))

    with pytest.raises(OutputFailed, match="the output needs") as caught:
        consolidate(case / "checkpoint", small_disk / "out", weights_only=True)

    assert caught.value.exit_code == 6
    assert [path.name for path in small_disk.iterdir()] == ["somebody's"]


def test_a_disk_that_fills_up_meanwhile_leaves_nothing_behind(
    tmp_path: Path, small_disk: Path
) -> None:
    """Somebody else takes the room while the tensors are written; the config is what fails."""
    source = tmp_path / "source"
    source.mkdir()
    save_file({"x": torch.ones(100_000)}, source / "model.safetensors", {"format": "pt"})
    case_config = {"model_type": "no-such-model", "architectures": ["NoSuchModel"]}
    (source / "config.json").write_text(json.dumps(case_config | {"padding": "x" * 50_000}))

    def fill(done: int, total: int) -> None:
        with (small_disk / "somebody's").open("wb", buffering=0) as stream:
            try:
                while True:
                    stream.write(bytes(4096))
            except OSError:
                return

    with pytest.raises(OutputFailed) as caught:
        consolidate(source, small_disk / "out", progress=fill)

    assert "space" in caught.value.fact
    assert [path.name for path in small_disk.iterdir()] == ["somebody's"]


def test_what_a_killed_run_left_is_mentioned_and_kept(case: Path, tmp_path: Path) -> None:
    left = tmp_path / "out.partial-0123abcd"
    left.mkdir()

    report = consolidate(case / "checkpoint", tmp_path / "out", weights_only=True)

    assert [warning for warning in report.warnings if str(left) in warning]
    assert left.is_dir()


def test_files_have_the_permissions_of_new_files(case: Path, tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    usual = stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    before = os.umask(0o077)
    try:
        consolidate(case / "checkpoint", tmp_path / "private", config=case / "hf")
    finally:
        os.umask(before)
    consolidate(case / "checkpoint", tmp_path / "out", config=case / "hf")

    def modes(directory: Path) -> set[int]:
        return {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}

    assert modes(tmp_path / "out") == {usual}
    assert modes(tmp_path / "private") == {0o600}


def test_weights_alone_need_no_transformers(case: Path, out: Path) -> None:
    """A config that is there is not asked for."""
    shutil.copytree(case / "checkpoint", out.parent / "run")
    (out.parent / "run" / "config.json").write_text("{ no config")

    consolidate(out.parent / "run", out, weights_only=True)

    assert {p.name for p in out.iterdir()} == {"ckpt_tools_manifest.json", "model.safetensors"}


def test_the_config_beside_the_checkpoint_is_found(case: Path, out: Path) -> None:
    shutil.copytree(case / "checkpoint", out.parent / "run")
    shutil.copy(case / "hf" / "config.json", out.parent / "run")

    consolidate(out.parent / "run", out)

    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
