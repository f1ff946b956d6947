"""A command is one new module: nothing else changes, and it stands in the help."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import ckpt_tools

COMMAND = '''
"""``ckpt-tools count-files``."""

from pathlib import Path

import click

from ckpt_tools.cli import options
from ckpt_tools.cli.outcome import reports_errors
from ckpt_tools.cli.text import say

SUMMARY = "How many files a directory holds."


@click.command("count-files", cls=options.Command)
@click.argument("directory", type=options.PATH)
@options.debug
@reports_errors
def command(directory: Path) -> None:
    """Say how many files DIRECTORY holds."""
    say(str(len(list(directory.iterdir()))))
'''


def test_a_command_is_one_new_module(tmp_path: Path) -> None:
    site = tmp_path / "site"
    package = site / "ckpt_tools"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(ckpt_tools.__file__).parent, package, ignore=ignored)
    (package / "cli" / "commands" / "count_files.py").write_text(COMMAND)
    held = tmp_path / "held"
    held.mkdir()
    for name in "abc":
        (held / name).touch()

    def run(*arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "ckpt_tools", *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": str(site)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "count-files   How many files a directory holds." in run("--help")
    assert "Running:\n  --debug" in run("count-files", "--help")
    assert run("count-files", held) == "3\n"
