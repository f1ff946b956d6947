"""How commands are typed: what is wrong is named in one form, and names that come close are offered."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ckpt_tools import consolidate, readers
from ckpt_tools.cli import cli
from tests.cli.test_consolidate import CASE, PROGRAM, run
from tests.conftest import FIXTURES


@pytest.mark.parametrize(
    ("typed", "fact", "hint"),
    [
        (
            ["insect", "x"],
            "no such command 'insect'",
            "Did you mean inspect? Run ckpt-tools --help.",
        ),
        (["help", "dif"], "no such command 'dif'", "Did you mean diff? Run ckpt-tools --help."),
        (
            ["verify", "x", "--redd-data"],
            "no such option '--redd-data'",
            "Did you mean --read-data? Run ckpt-tools verify --help.",
        ),
        (["inspect"], "missing argument 'CKPT'", "Run ckpt-tools inspect --help."),
        (
            ["consolidate", "a", "b", "--dtype", "int7"],
            "invalid value for '--dtype': 'int7' is not one of 'auto', 'keep', 'fp32', 'bf16', 'fp16'",
            "Run ckpt-tools consolidate --help.",
        ),
        (
            ["watch", "s3://bucket/run", "out"],
            "s3://bucket/run is in a store, where no run is watched",
            "Name folders of this machine, or convert each checkpoint with ckpt-tools consolidate.",
        ),
        (
            ["extract-attr", str(CASE), "policy", "out"],
            f"the attribute is the first argument, and {CASE} is a path",
            f"Type: ckpt-tools extract-attr policy {CASE} out",
        ),
        (
            ["extract-attr", str(CASE / "checkpoint"), "out", "model"],
            f"the attribute is the first argument, and {CASE / 'checkpoint'} is a path",
            f"Type: ckpt-tools extract-attr model {CASE / 'checkpoint'} out",
        ),
        (
            ["extract-attr", "policy", "out"],
            "the arguments are ATTR CKPT OUT, or CKPT OUT with --attr",
            "Run ckpt-tools extract-attr --help.",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_typed_wrong_is_named(typed: list[str], fact: str, hint: str) -> None:
    done = run(*typed)

    assert done.exit_code == 2
    lines = done.stderr.splitlines()
    assert lines[0] == f"error: {fact}"
    assert lines[-1] == f"  next: {hint}"
    assert done.stdout == ""


def test_an_argument_that_lacks_shows_the_usage() -> None:
    assert "  usage: ckpt-tools diff [OPTIONS] A B" in run("diff", "x").stderr.splitlines()


def test_help_is_that_of_the_option() -> None:
    assert run("help").stdout == run("--help").stdout
    assert run("help", "verify").stdout == run("verify", "--help").stdout


@pytest.mark.parametrize("name", ["torch.float32", "float32", "fp32", torch.float32])
def test_a_dtype_has_the_names_of_torch(name: object, tmp_path: Path) -> None:
    if isinstance(name, str):
        asked = ("--config", CASE / "hf", "--dtype", name)
        assert run("consolidate", CASE / "checkpoint", tmp_path / "o", *asked).exit_code == 0
    else:
        consolidate(CASE / "checkpoint", tmp_path / "o", config=CASE / "hf", dtype=name)  # type: ignore[arg-type]

    with safe_open(tmp_path / "o" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}  # noqa: SIM118


def test_options_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("CKPT_TOOLS_CONSOLIDATE_CONFIG", str(CASE / "hf"))
    monkeypatch.setenv("CKPT_TOOLS_CONSOLIDATE_NO_CARD", "1")
    monkeypatch.setenv("CKPT_TOOLS_CONSOLIDATE_DRY_RUN", "no")
    monkeypatch.setenv("CKPT_TOOLS_CONSOLIDATE_DTYPE", "fp16")
    monkeypatch.setenv("CKPT_TOOLS_CONSOLIDATE_JSON", "true")

    done = run("consolidate", CASE / "checkpoint", out, "--dtype", "bf16")

    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert list(report["dtypes"]) == ["bfloat16"]
    assert "README.md" not in report["files"]

    monkeypatch.setenv("CKPT_TOOLS_CONSOLIDATE_OVERWRITE", "perhaps")
    done = run("consolidate", CASE / "checkpoint", out)
    assert done.exit_code == 2
    assert "'perhaps' is not a valid boolean" in done.stderr


def test_the_old_name_of_the_source_format_warns() -> None:
    old = run("inspect", CASE / "checkpoint", "--format", "deepspeed")
    new = run("inspect", CASE / "checkpoint", "--source-format", "deepspeed")

    assert (old.exit_code, new.exit_code) == (0, 0)
    assert old.stdout == new.stdout
    assert old.stderr == "warning: --format is now --source-format\n"
    assert new.stderr == ""
    assert run("inspect", CASE / "checkpoint", "--format", "accelerate").exit_code == 2


def test_help_lists_every_source_format() -> None:
    shown = " ".join(run("inspect", "--help").stdout.split())

    assert (
        f"Which format, where the directory fits several: {', '.join(readers.readers())}." in shown
    )


def test_an_attribute_is_named_by_option_or_by_place(tmp_path: Path) -> None:
    torch.save({"policy.a.weight": torch.ones(2), "value.b": torch.zeros(1)}, tmp_path / "s.bin")
    state = tmp_path / "s.bin"

    first = run("extract-attr", "policy", state, tmp_path / "one", "--weights-only")
    second = run("extract-attr", state, tmp_path / "two", "--attr", "policy", "--weights-only")

    assert (first.exit_code, second.exit_code) == (0, 0), first.stderr + second.stderr
    for name in ("one", "two"):
        with safe_open(tmp_path / name / "model.safetensors", "pt") as file:
            assert list(file.keys()) == ["a.weight"]


def test_every_command_has_json(tmp_path: Path) -> None:
    context = click.Context(cli)
    commands = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    without = [
        name
        for name, command in commands.items()
        if command is None or not any("--json" in option.opts for option in command.params)
    ]
    assert without == ["help", "completion"]
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")

    same = run("diff", tmp_path / "a.safetensors", tmp_path / "a.safetensors", "--json")
    gone = run("diff", tmp_path / "a.safetensors", tmp_path / "gone", "--json")
    found = run("verify", tmp_path, "--json")

    assert json.loads(same.stdout)["compared"] == 1
    assert json.loads(gone.stdout)["error"]["kind"] == "NotACheckpoint"
    assert json.loads(found.stdout)["directories"][0]["directory"] == str(tmp_path)
    assert run("verify", tmp_path, "--json", "--format", "junit").exit_code == 2


def test_verbose_prints_files_and_stages(tmp_path: Path) -> None:
    done = run(
        "consolidate", CASE / "checkpoint", tmp_path / "out", "--config", CASE / "hf", "--verbose"
    )

    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert re.search(rf"^model.safetensors: {size / 1000:.3g} kB$", done.stdout, re.MULTILINE)
    assert re.search(r"^time: .*total [\d.]+ s", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("columns", [40, 60, 100])
def test_a_table_is_as_wide_as_is_asked(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))

    lines = run("inspect", CASE / "checkpoint").stdout.splitlines()

    assert max(map(len, lines)) <= columns
    # A number and its unit stay on one line.
    assert not any(re.match(r"^ +(kB|MB|GB)\b", line) for line in lines)


def completed(*words: str) -> list[str]:
    """The words that a shell is offered for the last of ``words``."""
    shown = subprocess.run(
        PROGRAM,
        env={
            "_CKPT_TOOLS_COMPLETE": "bash_complete",
            "COMP_WORDS": shlex.join(["ckpt-tools", *words]),
            "COMP_CWORD": str(len(words)),
        },
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [line.split(",", 1)[1] for line in shown.splitlines() if "," in line]


@pytest.mark.slow
def test_a_shell_completes_commands_options_and_values() -> None:
    run_of_two = FIXTURES / "dcp" / "torchtitan-2ranks" / "checkpoint"
    adapted = FIXTURES / "peft" / "zero3-qwen2-lora-bias-fp32" / "checkpoint"

    assert completed("cons") == ["consolidate"]
    assert completed("verify", "out", "--read") == ["--read-data"]
    assert completed("consolidate", "a", "b", "--dtype", "b") == ["bf16"]
    assert completed("inspect", "x", "--source-format", "torch-dcp") == [
        "torch-dcp",
        "torch-dcp-huggingface",
    ]
    assert completed("inspect", str(run_of_two), "--tag", "s") == ["step-1", "step-2"]
    assert completed("diff", "x", str(run_of_two), "--tag-b", "") == ["step-1", "step-2"]
    assert completed("extract-lora", str(adapted), "out", "--adapter", "") == ["default"]
    assert completed("inspect", "nowhere", "--tag", "") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_is_printed_for_each_shell(shell: str) -> None:
    done = run("completion", shell)

    assert done.exit_code == 0
    assert f"_CKPT_TOOLS_COMPLETE={shell}_complete" in done.stdout
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=done.stdout, text=True, check=True, timeout=30)
