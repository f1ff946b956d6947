"""The fenced blocks of a page: which of them are run, how, and what they must print.

The convention, for README.md and every page of docs/:

- ``console``: a line that starts with ``$ `` is a command; a backslash at its end continues it on the next
  line. The lines after it are what it prints, stdout and stderr together. A command must end with status 0,
  or be followed by ``$ echo $?`` and its status. A line ``...`` stands for any lines, ``...`` at the end of
  a line for the rest of it. Durations, rates and bytes written are not compared.
- ``python``: executed. A ``text`` block directly after ``<!-- prints -->`` is what it prints.
- ``bash``: a script, executed.
- A block after ``<!-- not run: REASON -->`` is not run.
- ``json``, ``text``, ``yaml`` are never run, so they hold no commands. No other language and no indented
  block is allowed.

The blocks of a page are run from top to bottom in one directory, which holds copies of the fixtures that the
page names.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from click.testing import CliRunner

from ckpt_tools.cli import cli

ROOT = Path(__file__).resolve().parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

RUN = ("console", "python", "bash")
NOT_RUN = ("json", "text", "yaml")
_NEEDS_A_SHELL = re.compile(r"[|<>;&$`*~]")
_FIXTURE = re.compile(r"\bfixtures/\w+/[\w.-]*\w")
_SECONDS = 120

# What depends on the machine, as commands that write print it: a duration with its rate, and bytes, for
# the manifest among them names versions.
_MASKED = re.compile(
    r"\b[\d.]+ [kMG]?B written|\b(\d[\d.]* s|\d+:\d\d) \([\d.]+ [kMG]?B/s written\)"
)


class PageError(Exception):
    """A page breaks the convention, or does not show what its commands do."""


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: the word after the fence.
        text: what is between the fences.
        start: index of its first line in the page.
        reason: why it is not run, if it is not.
        prints: whether it shows what the ``python`` block before it prints.
    """

    language: str
    text: str
    start: int
    reason: str | None = None
    prints: bool = False

    @property
    def is_run(self) -> bool:
        return self.language in RUN and self.reason is None


@dataclass(frozen=True)
class Step:
    """A command of a ``console`` block: its lines as they stand there, and the lines after it."""

    typed: tuple[str, ...]
    shown: tuple[str, ...]

    @property
    def command(self) -> str:
        lines = [line.removeprefix("$ ") if i == 0 else line for i, line in enumerate(self.typed)]
        return " ".join(line.removesuffix("\\").strip() for line in lines)


def blocks_of(page: str) -> list[Block]:
    """The blocks of a page, in order."""
    blocks: list[Block] = []
    lines = page.splitlines()
    index, comment = 0, ""
    while index < len(lines):
        line = lines[index]
        index += 1
        if not line.startswith("```"):
            if line.startswith("    ") or line.lstrip().startswith("```"):
                raise PageError(f"line {index}: an indented block; use a fence with a language")
            comment = line if line.startswith("<!--") else comment if not line else ""
            continue
        language = line.removeprefix("```")
        if language not in RUN + NOT_RUN:
            raise PageError(f"line {index}: a block of the language {language!r}")
        start = index
        while lines[index] != "```":
            index += 1
        text = "".join(f"{held}\n" for held in lines[start:index])
        index += 1
        reason = re.fullmatch(r"<!-- not run: (.+) -->", comment)
        block = Block(
            language, text, start, reason[1] if reason else None, comment == "<!-- prints -->"
        )
        if language in NOT_RUN and re.search(
            r"^(\$ |ckpt-tools |torchrun |pip |make )", text, re.MULTILINE
        ):
            raise PageError(
                f"line {start}: commands in a {language!r} block; use console, or bash for a script"
            )
        blocks.append(block)
        comment = ""
    return blocks


def steps_of(block: Block) -> list[Step]:
    """The commands of a ``console`` block."""
    steps: list[Step] = []
    lines = block.text.splitlines()
    while lines:
        if not lines[0].startswith("$ "):
            raise PageError(f"line {block.start}: output before the first command")
        count = 1 + next(i for i, line in enumerate(lines) if not line.endswith("\\"))
        typed, lines = lines[:count], lines[count:]
        count = next((i for i, line in enumerate(lines) if line.startswith("$ ")), len(lines))
        shown, lines = lines[:count], lines[count:]
        steps.append(Step(tuple(typed), tuple(shown)))
    return steps


def agrees(printed: str, shown: tuple[str, ...]) -> bool:
    """Whether a command printed what the page shows; empty lines at either end do not count."""
    lines = [line.rstrip() for line in printed.splitlines()]
    return re.fullmatch(_pattern(_stripped(shown)), _text(_stripped(lines))) is not None


def _stripped(lines: Sequence[str]) -> list[str]:
    return "\n".join(lines).strip("\n").split("\n")


def _text(lines: list[str]) -> str:
    return "".join(f"{_MASKED.sub('MASKED', line)}\n" for line in lines)


def _pattern(lines: list[str]) -> str:
    pattern = ""
    for line in _text(lines).splitlines():
        if line == "...":
            pattern += r"(?:.*\n)*?"
        elif line.endswith("..."):
            pattern += re.escape(line.removesuffix("...")) + ".*\n"
        else:
            pattern += re.escape(line) + "\n"
    return pattern


class Workspace:
    """The directory in which the blocks of one page are run."""

    def __init__(self, directory: Path, page: str) -> None:
        self.directory = directory
        self.status = 0  # of the last command, unless the page has asked for it
        self._globals: dict[str, object] = {"__name__": "__main__"}
        for name in sorted(set(_FIXTURE.findall(page))):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, directory / name, dirs_exist_ok=True)
            elif source.is_file():
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, directory / name)

    def shell(self, command: str) -> str:
        """What a line of a ``console`` block prints; its status is kept for ``$ echo $?``."""
        if command == "echo $?":
            status, self.status = self.status, 0
            return f"{status}\n"
        arguments = [] if _NEEDS_A_SHELL.search(command) else shlex.split(command)
        if arguments[:1] == ["ckpt-tools"]:
            # In this process, for speed: the interpreter and torch start once.
            with _chdir(self.directory):
                done = CliRunner().invoke(cli, arguments[1:])
            if done.exception is not None and not isinstance(done.exception, SystemExit):
                raise done.exception
            self.status = done.exit_code
            return done.output
        return self.script(command)

    def script(self, text: str) -> str:
        """What a script prints."""
        done = subprocess.run(
            ["bash", "-c", text],
            cwd=self.directory,
            env={
                **os.environ,
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
                "COLUMNS": "160",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        self.status = done.returncode
        return done.stdout

    def python(self, text: str, line: int) -> str:
        """What a ``python`` block prints; the blocks of a page share their names."""
        printed = io.StringIO()
        code = compile("\n" * line + text, "page", "exec")
        with _chdir(self.directory), contextlib.redirect_stdout(printed):
            exec(code, self._globals)  # noqa: S102 -- the pages are ours
        return printed.getvalue()


@contextlib.contextmanager
def _chdir(directory: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


def run_page(page: str, directory: Path) -> str:
    """Run what is to be run; the page as it should be, which is ``page`` if it shows the truth.

    Raises:
        PageError: a command fails and the page does not say so, or the page breaks the convention.
    """
    workspace = Workspace(directory, page)
    lines = page.splitlines()
    printed, changes = "", {}
    for block in blocks_of(page):
        new: str | None = None
        if block.prints:
            new = None if agrees(printed, tuple(block.text.splitlines())) else printed
        elif not block.is_run:
            continue
        elif block.language == "console":
            new = _run_console(block, workspace)
        elif block.language == "bash":
            workspace.script(block.text)
            if status := workspace.status:
                raise PageError(f"line {block.start}: the script ends with status {status}")
        else:
            printed = workspace.python(block.text, block.start)
        if new is not None:
            changes[block.start] = (len(block.text.splitlines()), _stripped(new.splitlines()))
    for start in sorted(changes, reverse=True):
        count, replacement = changes[start]
        lines[start : start + count] = [line.rstrip() for line in replacement]
    return "\n".join(lines) + "\n"


def _run_console(block: Block, workspace: Workspace) -> str | None:
    """The block as it should be, or None where it is right."""
    steps = steps_of(block)
    right, text = True, ""
    for number, step in enumerate(steps):
        printed = workspace.shell(step.command)
        status, asked = workspace.status, [s.command for s in steps[number + 1 : number + 2]]
        if status and asked != ["echo $?"]:
            raise PageError(
                f"line {block.start}: {step.command!r} ends with status {status}, and the page does not show "
                f"it by `$ echo $?`; it printed:\n{printed}"
            )
        shown = "".join(f"{line}\n" for line in step.shown)
        if not agrees(printed, step.shown):
            right, shown = False, printed.strip("\n") + "\n" if printed.strip("\n") else ""
            if number + 1 < len(steps):
                shown += "\n" if "\n" in shown.strip("\n") else ""
        text += "".join(f"{line}\n" for line in step.typed) + shown
    return None if right else text
