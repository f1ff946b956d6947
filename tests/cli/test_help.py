"""Every command explains itself, is documented, and starts at once."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from ckpt_tools import __version__
from ckpt_tools.cli import cli
from tests.cli.test_consolidate import run, run_program

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS_PAGE = (ROOT / "docs" / "commands.md").read_text()
STATUSES_PAGE = (ROOT / "docs" / "exit-statuses.md").read_text()
CONTEXT = click.Context(cli)
COMMANDS = cli.list_commands(CONTEXT)


def command(name: str) -> click.Command:
    found = cli.get_command(CONTEXT, name)
    assert found is not None
    return found


def options(name: str) -> list[click.Option]:
    return [p for p in command(name).params if isinstance(p, click.Option) and not p.hidden]


def test_the_commands_of_the_first_issue_are_there() -> None:
    assert COMMANDS[:2] == ["inspect", "consolidate"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_help_with_an_example(name: str) -> None:
    done = run(name, "--help")

    assert done.exit_code == 0
    assert len((command(name).help or "").splitlines()[0]) > 20
    example = re.search(r"Examples?:\n((?: +ckpt-tools .*\n?)+)", done.stdout)
    assert example is not None
    assert f"ckpt-tools {name} " in example[1]
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_can_be_typed(name: str) -> None:
    """Its options exist and its arguments are of the right number; the paths are made up."""
    lines = re.findall(rf"^ +ckpt-tools {name} (.*)$", run(name, "--help").stdout, re.MULTILINE)
    assert lines
    for line in lines:
        done = run(name, *line.split())
        assert "Usage: " not in done.stderr, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_in_the_overview_and_in_the_readme(name: str) -> None:
    overview = run("--help").stdout

    (line,) = [line for line in overview.splitlines() if line.split()[:1] == [name]]
    assert len(line.split()) > 3
    assert f"`ckpt-tools {name} " in README


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_a_section_with_its_own_options(name: str) -> None:
    """An option that `consolidate` explains in the same words stands there alone."""
    section = sections(COMMANDS_PAGE)[name]
    shared = (
        {(o.opts[0], o.help) for o in options("consolidate")} if name != "consolidate" else set()
    )
    refers = "all options of [consolidate](#consolidate)" in section
    for option in options(name):
        row = rf"^\| `[^|]*{option.opts[0]}\b"
        assert re.search(row, section, re.MULTILINE) or (
            refers and (option.opts[0], option.help) in shared
        ), option.opts


def sections(page: str) -> dict[str, str]:
    """The text below each heading of the second level."""
    return dict(part.split("\n", 1) for part in page.split("\n## ")[1:])


@pytest.mark.parametrize("name", COMMANDS)
def test_an_option_is_explained(name: str) -> None:
    shown = run(name, "--help").stdout
    for option in options(name):
        assert option.opts[0] in shown
        assert option.help or option.name == "max_shard_size"


@pytest.mark.parametrize("option", [o.opts[0] for o in options("consolidate")])
def test_an_option_of_consolidate_is_documented(option: str) -> None:
    assert re.search(rf"`{option}\b", COMMANDS_PAGE)


def test_help_lists_the_exit_statuses_of_the_page() -> None:
    shown = re.findall(r"^ +(\d)  \S", run("--help").stdout, re.MULTILINE)

    assert shown == re.findall(r"^\| (\d) \|", STATUSES_PAGE, re.MULTILINE) == list("0123456789")


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_can_be_asked_for_in_both_ways(flag: str) -> None:
    assert run(flag).stdout == run("--help").stdout
    assert run("inspect", flag).exit_code == 0


def test_no_command_at_all_shows_help() -> None:
    done = run()

    assert "Commands:" in done.output
    assert "consolidate" in done.output


def test_the_version_is_printed() -> None:
    assert run_program("--version").stdout == f"ckpt-tools, version {__version__}\n"


HEAVY = {"torch", "numpy", "transformers", "safetensors", "huggingface_hub", "rich", "deepspeed"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], [], *([name, "--help"] for name in COMMANDS)],
    ids=lambda arguments: " ".join(arguments) or "nothing",
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from ckpt_tools.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "except SystemExit:\n"
        "    pass\n"
        "print('loaded:', *sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    shown, _, loaded = done.stdout.partition("loaded:")
    assert "click" in loaded.split()
    assert not HEAVY & set(loaded.split())
    assert "ckpt-tools" in shown + done.stderr


def test_completion_works() -> None:
    done = run_program(env={"_CKPT_TOOLS_COMPLETE": "zsh_source", "PATH": "/usr/bin:/bin"})

    assert done.returncode == 0
    assert "_CKPT_TOOLS_COMPLETE=zsh_complete" in done.stdout
