"""A failure ends a command with one message, the next step and a documented exit status."""

from __future__ import annotations

import json
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.test_consolidate import run, run_program
from tests.support import damage
from tests.writing.test_bytes import small_disk

__all__ = ["small_disk"]


@dataclass(frozen=True)
class Failure:
    """What is done to a good request, and what is said of it."""

    kind: str
    status: int
    fact: str
    hint: str
    arguments: Callable[[Path, Path], list[object]]


ZERO2, TWO, LORA = (
    "zero2-bf16-llama-3ranks",
    "zero2-bf16-llama-two-saves-2ranks",
    "zero2-bf16-olmo2-lora-2ranks",
)


def copied(fixtures: Path, work: Path, name: str = ZERO2) -> Path:
    shutil.copytree(fixtures / "zero" / name / "checkpoint", work / "run")
    return work / "run"


def no_checkpoint(fixtures: Path, work: Path) -> list[object]:
    (work / "run").mkdir()
    (work / "run" / "notes.txt").write_text("")
    return [work / "run", "--weights-only"]


def several(fixtures: Path, work: Path) -> list[object]:
    (copied(fixtures, work, TWO) / "latest").unlink()
    return [work / "run", "--weights-only"]


def wrong_tag(fixtures: Path, work: Path) -> list[object]:
    return [copied(fixtures, work), "--weights-only", "--tag", "global_step9"]


def latest_leads_nowhere(fixtures: Path, work: Path) -> list[object]:
    (copied(fixtures, work) / "latest").write_text("global_step9")
    return [work / "run", "--weights-only"]


def no_config(fixtures: Path, work: Path) -> list[object]:
    return [copied(fixtures, work)]


def missing_rank(fixtures: Path, work: Path) -> list[object]:
    (file,) = copied(fixtures, work).glob("*/*rank_1_mp_rank_00_optim_states.pt")
    file.unlink()
    return [work / "run", "--weights-only"]


def truncated(fixtures: Path, work: Path) -> list[object]:
    (file,) = copied(fixtures, work).glob("*/*rank_1_mp_rank_00_optim_states.pt")
    file.write_bytes(file.read_bytes()[:-1000])
    return [work / "run", "--weights-only"]


def tensor_parallel(fixtures: Path, work: Path) -> list[object]:
    """A run of two tensor-parallel ranks of a release that did not record how its slices are cut."""
    source = fixtures / "layouts" / "autotp-zero1-bf16-qwen2-2ranks" / "checkpoint"
    shutil.copytree(source, work / "run")
    for path in (work / "run").glob("*/mp_rank_*_model_states.pt"):
        damage.edit(path, lambda content: content.pop("universal_checkpoint_info"))
    return [work / "run", "--weights-only"]


def lora(fixtures: Path, work: Path) -> list[object]:
    return [copied(fixtures, work, LORA), "--config", fixtures / "zero" / LORA / "hf"]


FAILURES = [
    Failure("NotACheckpoint", 3, "no checkpoint of a known format", "notes.txt", no_checkpoint),
    Failure("AmbiguousCheckpoint", 2, "there are 2 checkpoints here", "--tag", several),
    Failure(
        "UsageError", 2, "no checkpoint with the tag 'global_step9'", "global_step2", wrong_tag
    ),
    Failure("DamagedCheckpoint", 4, "'global_step9'", "--tag", latest_leads_nowhere),
    Failure("MissingAsset", 2, "config", "--config", no_config),
    Failure("DamagedCheckpoint", 4, "rank", "machine", missing_rank),
    Failure("DamagedCheckpoint", 4, "", "", truncated),
    Failure(
        "UnsupportedLayout",
        5,
        "does not record how its slices are cut",
        "save it again",
        tensor_parallel,
    ),
    Failure("UsageError", 2, "LoRA", "--weights-only", lora),
]


def each(function: Callable[..., None]) -> Callable[..., None]:
    mark = pytest.mark.parametrize("failure", FAILURES, ids=lambda f: f.arguments.__name__)
    return mark(function)


@each
def test_the_message_says_the_fact_the_place_and_the_next_step(
    fixtures: Path, tmp_path: Path, failure: Failure
) -> None:
    ckpt, *options = failure.arguments(fixtures, tmp_path)

    done = run("consolidate", ckpt, tmp_path / "out", *options)

    assert done.exit_code == failure.status, done.output
    assert done.stdout == ""
    first, *others = done.stderr.splitlines()
    assert first.startswith("error: ")
    assert failure.fact in first
    assert not first.endswith(".")
    places = [line.removeprefix("  in: ") for line in others if line.startswith("  in: ")]
    assert len(places) == (failure.kind != "MissingAsset"), "what is in no file has no place"
    assert all(place.startswith((str(tmp_path), str(fixtures))) for place in places)
    hints = "\n".join(others).partition("  next: ")[2]
    assert failure.hint in hints
    assert "Traceback" not in done.output
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob("*.partial-*")) == []


@each
def test_as_json_the_same_is_for_a_program(
    fixtures: Path, tmp_path: Path, failure: Failure
) -> None:
    ckpt, *options = failure.arguments(fixtures, tmp_path)

    done = run("consolidate", ckpt, tmp_path / "out", *options, "--json")

    assert done.exit_code == failure.status
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == failure.kind
    assert error["exit_code"] == failure.status
    assert failure.fact in error["fact"]
    assert failure.hint in (error["hint"] or "")
    assert (error["path"] is None) == (failure.kind == "MissingAsset")


def test_the_choices_are_listed_for_a_program(fixtures: Path, tmp_path: Path) -> None:
    ckpt, *options = several(fixtures, tmp_path)

    done = run("consolidate", ckpt, tmp_path / "out", *options, "--json")

    assert json.loads(done.stdout)["error"]["choices"] == ["global_step2", "global_step4"]


def test_the_missing_files_are_listed(fixtures: Path, tmp_path: Path) -> None:
    ckpt, *options = missing_rank(fixtures, tmp_path)

    done = run("consolidate", ckpt, tmp_path / "out", *options)

    assert "rank_1" in done.stderr or "rank 1" in done.stderr
    assert "rank_2" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("debug", [False, True])
def test_a_traceback_is_shown_only_when_asked_for(tmp_path: Path, debug: bool) -> None:
    options = ["--debug"] if debug else []
    for command in (["inspect", tmp_path], ["consolidate", tmp_path, tmp_path / "out"]):
        done = run_program(*command, *options)
        assert ("Traceback" in done.stderr) == debug
        assert ("NotACheckpoint" in done.stderr) == debug
        assert "no checkpoint of a known format" in done.stderr
        assert done.stdout == ""
        assert done.returncode == (1 if debug else 3)


@pytest.mark.parametrize(
    "arguments",
    [
        ["consolidate"],
        ["consolidate", "ckpt"],
        ["consolidate", "ckpt", "out", "--dtype", "int4"],
        ["consolidate", "ckpt", "out", "--weights", "both"],
        ["consolidate", "ckpt", "out", "--workers", "0"],
        ["consolidate", "ckpt", "out", "--no-such-option"],
        ["inspect"],
        ["no-such-command"],
    ],
    ids=" ".join,
)
def test_a_command_that_is_typed_wrongly_says_how_it_goes(arguments: list[str]) -> None:
    done = run(*arguments)

    assert done.exit_code == 2
    first, *_, last = done.stderr.splitlines()
    assert first.startswith("error: ")
    assert re.fullmatch(r"  next: .*Run ckpt-tools.* --help\.", last)
    assert done.stdout == ""


def test_a_disk_without_room_is_status_6(fixtures: Path, small_disk: Path) -> None:
    (small_disk / "somebody's").write_bytes(bytes(1_045_000))
    checkpoint = fixtures / "zero" / ZERO2 / "checkpoint"

    done = run("consolidate", checkpoint, small_disk / "out", "--weights-only")

    assert done.exit_code == 6
    assert "the output needs" in done.stderr
    assert "  next: Free some space" in done.stderr
    assert [path.name for path in small_disk.iterdir()] == ["somebody's"]


@pytest.mark.slow
def test_an_output_that_cannot_be_written_is_status_6(fixtures: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))

    done = run_program(
        *("consolidate", fixtures / "zero" / ZERO2 / "checkpoint", tmp_path / "made" / "out"),
        "--weights-only",
        preexec_fn=limit,
    )

    assert done.returncode == 6
    assert "error: cannot be written (File too large)" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_output_below_a_file_is_status_6(fixtures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checkpoint = fixtures / "zero" / ZERO2 / "checkpoint"

    done = run("consolidate", checkpoint, tmp_path / "file" / "out", "--weights-only")

    assert done.exit_code == 6
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
