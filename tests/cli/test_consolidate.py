"""``ckpt-tools consolidate`` as it is typed: what it writes, what it prints and where."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from ckpt_tools.cli import cli, progress
from tests.conftest import FIXTURES

CASE = FIXTURES / "zero" / "zero3-bf16-qwen3-tied-2ranks"
CHAT = FIXTURES / "zero" / "zero3-bf16-olmo2-chat-2ranks"
PROGRAM = [sys.executable, "-m", "ckpt_tools"]


def run(*arguments: object) -> Result:
    """The command in this process, for speed; stdout and stderr apart."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def run_program(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command as a shell runs it."""
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.slow
def test_a_checkpoint_becomes_a_directory(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_program("consolidate", CASE / "checkpoint", out, "--config", CASE / "hf")

    assert done.returncode == 0, done.stderr
    assert names(out) == {
        "README.md",
        "ckpt_tools_manifest.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    truth = load_file(CASE / "truth" / "model.safetensors")
    found = load_file(out / "model.safetensors")
    assert found.keys() == truth.keys() - {"lm_head.weight"}
    assert all(found[name].equal(truth[name]) for name in found)
    lines = done.stdout.splitlines()
    assert "note: lm_head.weight is tied to model.embed_tokens.weight and left out" in lines
    assert lines[-2].startswith(f"{out}: {len(found)} tensors, ")
    assert lines[-2].endswith(", bfloat16")
    size = sum(path.stat().st_size for path in out.iterdir())
    assert f"{size / 1000:.3g} kB written in 5 files" in lines[-1]
    assert done.stderr.splitlines() == [
        "warning: no tokenizer was found, so none was written; pass --tokenizer DIR"
    ]


@pytest.mark.slow
def test_json_is_all_there_is_on_stdout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    done = run("consolidate", CASE / "checkpoint", out, "--config", CASE / "hf", "--json")

    assert done.exit_code == 0
    assert capfd.readouterr() == ("", ""), "what a library writes past sys.stdout"
    report = json.loads(done.stdout)
    assert done.stderr == ""
    assert report["output"] == str(out)
    assert report["checkpoint"] == str(CASE / "checkpoint" / "global_step2")
    assert report["files"] == {path.name: path.stat().st_size for path in out.iterdir()}
    assert report["bytes_written"] == sum(report["files"].values())
    assert report["step"] == 2
    assert report["world_size"] == 2
    assert report["seconds"]["total"] > 0
    assert "no tokenizer was found" in report["warnings"][0]


@pytest.mark.slow
def test_quiet_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done = run("consolidate", CASE / "checkpoint", tmp_path / "out", "--config", CASE / "hf", "-q")

    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_quiet_still_prints_errors(tmp_path: Path) -> None:
    done = run("consolidate", tmp_path / "gone", tmp_path / "out", "-q")

    assert done.exit_code == 3
    assert done.stdout == ""
    assert done.stderr.startswith("error: no such file or directory\n")


def test_quiet_json_is_json(tmp_path: Path) -> None:
    done = run(
        "consolidate", CASE / "checkpoint", tmp_path / "out", "--weights-only", "-q", "--json"
    )

    assert done.exit_code == 0
    assert json.loads(done.stdout)["tensors"] == 24
    assert done.stderr == ""


def test_what_weights_only_makes_useless_is_said(tmp_path: Path) -> None:
    arguments = ("consolidate", CASE / "checkpoint", tmp_path / "out", "--weights-only")
    done = run(*arguments, "--config", CASE / "hf", "--tokenizer", CASE / "hf")
    assert done.exit_code == 0
    assert "warning: --config, --tokenizer had no effect: --weights-only writes" in done.stderr

    assert "had no effect" not in run(*arguments, "--overwrite").stderr


def test_a_dry_run_lists_the_files_and_writes_nothing(tmp_path: Path) -> None:
    arguments = ("consolidate", CASE / "checkpoint", tmp_path / "out", "--config", CASE / "hf")
    planned = run(*arguments, "--dry-run", "--max-shard-size", "3KB")

    assert planned.exit_code == 0, planned.output
    assert list(tmp_path.iterdir()) == []
    assert f"Nothing was written to {tmp_path / 'out'} (dry run)." in planned.stdout

    assert run(*arguments, "--max-shard-size", "3KB").exit_code == 0
    shards = names(tmp_path / "out") - {"config.json", "generation_config.json"}
    weights = {name for name in shards if name.endswith(".safetensors")}
    assert len(weights) > 2
    for name in weights:
        size = (tmp_path / "out" / name).stat().st_size / 1000
        assert f"{name}: {size:.3g} kB, " in planned.stdout


def test_a_dry_run_as_json_lists_every_tensor(tmp_path: Path) -> None:
    planned = run(
        "consolidate",
        CASE / "checkpoint",
        tmp_path / "out",
        "--weights-only",
        "--dry-run",
        "--json",
    )

    report = json.loads(planned.stdout)
    assert report["dry_run"] is True
    (file,) = report["plan"]
    assert file["file"] == "model.safetensors"
    assert len(file["tensors"]) == report["tensors"] == 24
    assert file["tensors"][0].keys() == {"name", "dtype", "shape"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "dtypes"),
    [
        (["--dtype", "fp32"], {"float32"}),
        (["--dtype", "bf16"], {"bfloat16"}),
        (["--dtype", "fp16"], {"float16"}),
        (["--dtype", "keep"], {"float32"}),
        (["--dtype", "auto"], {"bfloat16"}),
        ([], {"bfloat16"}),
        (["--weights", "model", "--dtype", "keep"], {"bfloat16"}),
    ],
    ids=" ".join,
)
def test_dtype_and_weights_choose_what_is_written(
    tmp_path: Path, option: list[str], dtypes: set[str]
) -> None:
    checkpoint = FIXTURES / "zero" / "zero2-bf16-llama-3ranks" / "checkpoint"
    done = run("consolidate", checkpoint, tmp_path / "out", "--weights-only", *option)

    assert done.exit_code == 0, done.output
    tensors = load_file(tmp_path / "out" / "model.safetensors").values()
    assert {str(tensor.dtype).removeprefix("torch.") for tensor in tensors} == dtypes


def test_every_option_of_the_issue_is_there(tmp_path: Path) -> None:
    done = run(
        *("consolidate", CHAT / "checkpoint", tmp_path / "out"),
        *("--tag", json.loads((CHAT / "facts.json").read_text())["tags"][0]),
        *("--dtype", "auto", "--weights", "master", "--config", CHAT / "hf" / "config.json"),
        *("--tokenizer", CHAT / "hf", "--generation-config", "olmo", "--max-shard-size", "50KB"),
        *("--workers", 3, "--overwrite", "--check-masters", "--quiet", "--json"),
    )

    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["warnings"] == []
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= names(
        tmp_path / "out"
    )
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert len(generation["eos_token_id"]) == 2


def test_check_masters_compares_all(tmp_path: Path) -> None:
    checkpoint = FIXTURES / "zero" / "zero2-bf16-llama-3ranks" / "checkpoint"
    done = run("consolidate", checkpoint, tmp_path / "out", "--weights-only", "--check-masters")

    assert done.exit_code == 0
    assert "21 masters compared with the 16-bit weights" in done.stdout


def test_an_existing_output_is_replaced_only_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    arguments = ("consolidate", CASE / "checkpoint", out, "--weights-only")

    refused = run(*arguments)
    assert refused.exit_code == 2
    assert names(out) == {"notes.txt"}
    assert "--overwrite" in refused.stderr

    assert run(*arguments, "--overwrite").exit_code == 0
    assert names(out) == {"ckpt_tools_manifest.json", "model.safetensors"}


def test_plain_lines_show_progress_where_there_is_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One every ten seconds; here every time something was written, after the first."""
    monkeypatch.setattr(progress, "_LINE_SECONDS", 1e-9)

    done = run(
        *("consolidate", CASE / "checkpoint", tmp_path / "out", "--weights-only"),
        *("--max-shard-size", "1KB", "--workers", 1),
    )

    assert done.exit_code == 0, done.output
    last = [line for line in done.stderr.splitlines() if line.startswith("100%: ")]
    assert last
    assert "6.51 kB of 6.51 kB, " in last[-1]
    assert last[-1].endswith(" left")
    assert "\r" not in done.stderr
    assert "\x1b" not in done.stderr


def test_a_short_run_shows_no_progress_line(tmp_path: Path) -> None:
    done = run("consolidate", CASE / "checkpoint", tmp_path / "out", "--weights-only")

    assert "%" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("quiet", [False, True])
def test_a_bar_shows_progress_on_a_terminal(tmp_path: Path, quiet: bool) -> None:
    terminal, ours = pty.openpty()
    process = subprocess.Popen(
        [*PROGRAM, "consolidate", CASE / "checkpoint", tmp_path / "out", "--weights-only"]
        + (["--quiet"] if quiet else []),
        stdout=subprocess.PIPE,
        stderr=ours,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(ours)
    shown = b""
    try:
        while part := os.read(terminal, 4096):
            shown += part
    except OSError:
        pass  # the other end is closed
    finally:
        os.close(terminal)
    stdout, _ = process.communicate()

    assert process.returncode == 0
    assert (b"writing" in shown) == (not quiet)
    assert (b"\x1b[" in shown) == (not quiet)
    assert (b"24 tensors" in stdout) == (not quiet)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["inspect", CASE / "checkpoint"],
        ["consolidate", CASE / "checkpoint", "OUT", "--weights-only"],
        [
            "consolidate",
            CHAT / "checkpoint",
            "OUT",
            "--config",
            CHAT / "hf",
            "--tokenizer",
            CHAT / "hf",
        ],
    ],
    ids=["inspect", "weights only", "with config and tokenizer"],
)
def test_no_training_framework_is_imported(tmp_path: Path, command: list[object]) -> None:
    program = (
        "import sys\n"
        "from ckpt_tools.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "sys.stderr.write('loaded: ' + ' '.join(sys.modules))\n"
    )
    arguments = [str(tmp_path / "out") if word == "OUT" else str(word) for word in command]

    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )

    loaded = set(done.stderr.partition("loaded: ")[2].split())
    assert "ckpt_tools.readers.deepspeed.reader" in loaded
    assert not loaded & {"deepspeed", "peft", "accelerate", "transformers"}
    assert command[0] != "inspect" or not loaded & {"torch", "numpy"}
    assert command[0] == "inspect" or "torch" in loaded


@pytest.mark.slow
def test_it_works_where_deepspeed_peft_and_accelerate_are_not_installed(tmp_path: Path) -> None:
    """Packages of these names that fail when imported stand in front of the real ones."""
    for name in ("deepspeed", "peft", "accelerate"):
        (tmp_path / "path" / name).mkdir(parents=True)
        (tmp_path / "path" / name / "__init__.py").write_text("raise ImportError('not installed')")

    done = run_program(
        *("consolidate", CASE / "checkpoint", tmp_path / "out", "--config", CASE / "hf"),
        env={**os.environ, "PYTHONPATH": str(tmp_path / "path")},
    )

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("spelling", ["run", "global_step2", "checkpoint-2", "latest", "file"])
def test_the_checkpoint_is_what_one_has_at_hand(tmp_path: Path, spelling: str) -> None:
    directory = tmp_path / ("checkpoint-2" if spelling == "checkpoint-2" else "run")
    shutil.copytree(CASE / "checkpoint", directory)
    at_hand = {
        "run": directory,
        "global_step2": directory / "global_step2",
        "checkpoint-2": directory,
        "latest": directory / "latest",
        "file": directory / "global_step2" / "zero_pp_rank_0_mp_rank_00_model_states.pt",
    }[spelling]

    done = run("consolidate", at_hand, tmp_path / "out", "--weights-only")

    assert done.exit_code == 0, done.output
    assert names(tmp_path / "out") == {"ckpt_tools_manifest.json", "model.safetensors"}


def test_a_reader_that_stops_reading_is_no_failure_to_talk_about(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*PROGRAM, "inspect", str(CASE / "checkpoint")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    said = process.stderr.read().decode()
    process.wait()

    assert "Traceback" not in said
