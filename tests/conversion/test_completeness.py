"""What is complete is skipped only where the same request has made it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from ckpt_tools import Report, consolidate, extract_lora, verify
from ckpt_tools.errors import OutputExists, UsageError
from tests.cli.test_consolidate import run
from tests.conftest import FIXTURES
from tests.support.outputs import contents

CASE = FIXTURES / "zero" / "zero3-bf16-qwen3-tied-2ranks"
LORA = FIXTURES / "peft" / "zero3-olmo2-lora"


def again(run: Path, out: Path, **options: object) -> Report:
    asked = {"weights_only": True, "skip_complete": True, **options}
    return consolidate(run, out, **asked)  # type: ignore[arg-type]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return shutil.copytree(CASE / "checkpoint", tmp_path / "run")


def test_the_same_request_does_nothing(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = again(checkpoint, out, marker="COMPLETED")
    before = contents(out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}

    # How it is carried out, and how the checkpoint is named, is not what is written.
    for options in ({}, {"workers": 3, "verify": True}, {"tag": "global_step2"}):
        second = again(checkpoint, out, marker="COMPLETED", **options)
        assert second.complete and not first.complete
        assert (second.bytes_read, second.bytes_written) == (0, 0)
        assert second.files == first.files

    assert before["COMPLETED"] == b"COMPLETED\n"
    assert contents(out) == before
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times
    assert not [p for p in verify(out, read_data=True).problems if p.kind.startswith("manifest")]


@pytest.mark.parametrize(
    "changed",
    [{"dtype": "fp32"}, {"max_shard_size": "50kB"}, {"marker": "DONE"}, {"sha256": True}],
    ids=str,
)
def test_another_request_is_refused(
    changed: dict[str, object], checkpoint: Path, tmp_path: Path
) -> None:
    again(checkpoint, tmp_path / "out")

    with pytest.raises(OutputExists):
        again(checkpoint, tmp_path / "out", **changed)


def test_a_checkpoint_that_was_saved_anew_is_not_complete(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    again(checkpoint, out)
    (shard, *_) = sorted(checkpoint.rglob("*_optim_states.pt"))
    os.utime(shard, ns=(1, 1))

    with pytest.raises(OutputExists):
        again(checkpoint, out)
    assert not again(checkpoint, out, overwrite=True).complete
    assert again(checkpoint, out, overwrite=True).complete


@pytest.mark.parametrize("damage", ["shorter", "gone", "manifest"])
def test_an_output_that_was_changed_is_not_complete(
    damage: str, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    again(checkpoint, out)
    weights, manifest = out / "model.safetensors", out / "ckpt_tools_manifest.json"
    if damage == "shorter":
        os.truncate(weights, weights.stat().st_size - 1)
    elif damage == "gone":
        weights.unlink()
    else:
        manifest.write_text(manifest.read_text().replace('"auto"', '"keep"'))

    with pytest.raises(OutputExists):
        again(checkpoint, out)


def test_a_config_that_was_edited_is_another_request(checkpoint: Path, tmp_path: Path) -> None:
    out, config = tmp_path / "out", tmp_path / "config.json"
    shutil.copyfile(CASE / "hf" / "config.json", config)
    again(checkpoint, out, weights_only=False, config=config)
    assert again(checkpoint, out, weights_only=False, config=config).complete

    data = json.loads(config.read_text())
    config.write_text(json.dumps(data, indent=1))
    with pytest.raises(OutputExists):
        again(checkpoint, out, weights_only=False, config=config)


@pytest.mark.slow
def test_adapters_in_folders_are_complete_together(tmp_path: Path) -> None:
    def extract() -> Report:
        return extract_lora(
            LORA / "checkpoint",
            tmp_path / "out",
            adapter="all",
            adapter_config=LORA / "hf",
            config=LORA / "hf",
            skip_complete=True,
        )

    assert [extract().complete, extract().complete] == [False, True]


@pytest.mark.parametrize("marker", ["", "..", "a/b", "model.safetensors", "SHA256SUMS"])
def test_a_marker_is_the_name_of_a_new_file(marker: str, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the marker"):
        again(checkpoint, tmp_path / "out", marker=marker)
    assert not (tmp_path / "out").exists()


def test_the_command_says_so_and_ends_well(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    typed = ("consolidate", checkpoint, out, "--weights-only", "--skip-complete")
    assert run(*typed).exit_code == 0

    done = run(*typed)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == f"{out} is complete, written by the same request. Nothing was done.\n"
    assert json.loads(run(*typed, "--json").stdout)["complete"] is True
    assert run(*typed[:-1]).exit_code == 2
