"""A path that is typed wrong is answered with the path that was meant, or with what is there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.test_consolidate import CHAT, run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with a run, its config, a text file, and an empty folder."""
    shutil.copytree(CHAT / "checkpoint", tmp_path / "run")
    shutil.copytree(CHAT / "hf", tmp_path / "base")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "status", "fact", "hint"),
    [
        ("ruN out", 3, "no such file", "Did you mean run?"),
        ("run/global_step12 out", 3, "no such file", "Did you mean run/global_step120?"),
        ("rum/global_step120 out", 3, "no such file", "Did you mean run/global_step120?"),
        ("run/step9 out", 3, "no such file", "run holds: latest, global_step120."),
        (
            "weights out",
            3,
            "no such file",
            "The current directory holds: base, empty, notes.txt, run.",
        ),
        ("empty/x out", 3, "no such file", "empty is empty."),
        ("notes.txt/x out", 3, "no such file", "notes.txt is a file."),
        ("run notes.txt --weights-only", 2, "not a directory", "Name another output."),
        ("run notes.txt/out --weights-only", 6, "is a file", "Name another output."),
        ("'' out --weights-only", 2, "CKPT is empty", "variable of the shell"),
        ("run '' --weights-only --overwrite", 2, "OUT is empty", "variable of the shell"),
        ("run out --config ''", 2, "--config is empty", "variable of the shell"),
        ("run out --source-format torch-dcp", 2, "'torch-dcp'", "or pass it with deepspeed."),
        ("run out --config base --like notes.txt", 2, "--like is not a directory", "Pass --like"),
    ],
)
def test_the_next_step(here: Path, typed: str, status: int, fact: str, hint: str) -> None:
    words = [word.strip("'") for word in typed.split()]

    done = run("consolidate", *words)

    assert done.exit_code == status, done.output
    first, _, rest = done.stderr.partition("\n")
    assert fact in first
    assert hint in rest.partition("  next: ")[2]
    assert not (here / "out").exists()


def test_what_was_meant_is_read(here: Path) -> None:
    hint = run("inspect", "rum/global_step120").stderr.partition("Did you mean ")[2]

    assert run("inspect", hint.partition("?")[0]).exit_code == 0


def test_node_local_without_torchrun_says_that_nothing_is_pooled(here: Path) -> None:
    done = run("consolidate", here / "run", here / "out", "--weights-only", "--node-local")

    assert done.exit_code == 0
    assert "warning: --node-local had no effect" in done.stderr


@pytest.mark.parametrize("more", [(), ("--load",)])
def test_a_base_that_is_not_there_is_no_verdict(here: Path, more: tuple[str, ...]) -> None:
    """Else a pipeline with a misspelt --base would load nothing and end with status 0."""
    done = run("verify", here / "base", "--base", "bsae", *more)

    assert done.exit_code == 2
    assert "the directory of --base has no config.json" in done.output


def test_an_adapter_directory_that_is_not_there(here: Path) -> None:
    done = run("merge-lora", "run", "out", "--adapter-dir", "rum", "--weights-only")

    assert done.exit_code == 2, done.output
    assert "error: no such directory\n  in: rum" in done.stderr
    assert "Did you mean run?" in done.stderr
