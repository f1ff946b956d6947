"""extract-lora and merge-lora on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ckpt_tools.cli import main
from tests.support.adapted import adapter_config, files, lora_state, write_checkpoint


def _run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "run", lora_state(), adapter_config())


def test_extract_lora_says_what_it_read(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("extract-lora", run, tmp_path / "out", "--json") == 0

    report = json.loads(capsys.readouterr().out)
    assert report["tensors"] == 2
    assert report["files"] == {n: len(b) for n, b in files(tmp_path / "out").items()}
    assert set(report["files"]) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "ckpt_tools_manifest.json",
    }


def test_extract_lora_names_the_option_that_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = write_checkpoint(tmp_path / "bare", lora_state())

    assert _run("extract-lora", bare, tmp_path / "out") == 2
    assert "--lora-alpha X" in capsys.readouterr().err
    assert _run("extract-lora", bare, tmp_path / "out", "--lora-alpha", 4) == 2
    assert "--base-model NAME" in capsys.readouterr().err
    options = ("--lora-alpha", 4, "--base-model", "owner/base", "--quiet")
    assert _run("extract-lora", bare, tmp_path / "out", *options) == 0
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["lora_alpha"] == 4


@pytest.mark.parametrize("option", ["--like", "--max-shard-size", "--generation-config"])
def test_extract_lora_has_no_options_of_models(option: str, run: Path, tmp_path: Path) -> None:
    assert _run("extract-lora", run, tmp_path / "out", option, "x") == 2


def test_merge_lora_writes_a_model(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("merge-lora", run, tmp_path / "out", "--weights-only") == 0

    assert "merged adapter 'default': 1 of 1 LoRA pairs" in capsys.readouterr().out
    assert set(files(tmp_path / "out")) == {"ckpt_tools_manifest.json", "model.safetensors"}


def test_merge_lora_of_no_adapter_ends_with_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {n: t for n, t in lora_state().items() if "lora_" not in n}
    plain = write_checkpoint(tmp_path / "plain", state)

    assert _run("merge-lora", plain, tmp_path / "out", "--weights-only") == 2
    assert "holds no adapter" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["extract-lora", "merge-lora"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(command, "--help") == 0
    assert f"\n    ckpt-tools {command} run" in capsys.readouterr().out
