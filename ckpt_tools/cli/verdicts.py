"""The result of ``verify`` for people: a table of problems, the next steps, and a summary of each directory.

Owns the outcome of one directory and the exit status of a run.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_tools.cli.text import nbytes_text, printable
from ckpt_tools.errors import CkptError

if TYPE_CHECKING:
    from rich.console import Console

    from ckpt_tools.verification import Problem, Verdict

CLEAN, PROBLEMS, UNCHECKED = 0, 1, 2

_LISTED = 20
_WIDTH = 100


@dataclass(frozen=True)
class Outcome:
    """The outcome of one directory.

    Attributes:
        directory: the directory, as the user named it.
        verdict: the result; None if the directory could not be checked.
        error: the reason why it could not be checked; None if it was.
    """

    directory: Path
    verdict: Verdict | None
    error: CkptError | None = None

    def is_clean(self, strict: bool) -> bool:
        """Whether it was checked and nothing is wrong."""
        return self.verdict is not None and self.verdict.clean(strict)


def status_of(outcomes: Iterable[Outcome], strict: bool) -> int:
    """The exit status: 2 if a directory could not be checked, 1 if one has problems, else 0."""
    statuses = (
        UNCHECKED if one.verdict is None else CLEAN if one.is_clean(strict) else PROBLEMS
        for one in outcomes
    )
    return max(statuses, default=CLEAN)


def place_of(outcome: Outcome, problem: Problem) -> str:
    """The path of the file that a problem is in, or of the directory."""
    return printable(str(outcome.directory / problem.file if problem.file else outcome.directory))


def summary(outcome: Outcome, strict: bool) -> str:
    """The summary line of one directory."""
    name = printable(str(outcome.directory))
    verdict = outcome.verdict
    if verdict is None:
        return f"{name}: could not be checked: {printable(_reason(outcome))}"
    noun = "tensor" if verdict.tensors == 1 else "tensors"
    size = f"{verdict.tensors:,} {noun}, {nbytes_text(verdict.nbytes)}"
    counts = ((len(verdict.errors), "error"), (len(verdict.warnings), "warning"))
    told = [f"{count:,} {noun}{'' if count == 1 else 's'}" for count, noun in counts if count]
    state = "clean" if verdict.clean(strict) else "not clean"
    return printable(f"{name}: {', '.join([state, *told])} ({size})")


def _reason(outcome: Outcome) -> str:
    """Why a directory could not be checked, with the file or checkpoint that caused it."""
    error = outcome.error
    if error is None:
        return ""
    if error.where is None or error.where == str(outcome.directory):
        return error.fact
    return f"{error.fact} (in {error.where})"


def depth_of(outcome: Outcome) -> list[str]:
    """The checks that were made in one directory, and those that were skipped: a line each."""
    if outcome.verdict is None:
        return []
    parts = (("checked", outcome.verdict.checked), ("not checked", outcome.verdict.skipped))
    lines = [f"  {word}: {'; '.join(what)}" for word, what in parts if what]
    # GitHub runs a line that begins with two colons, also behind spaces, and folding can produce one.
    return [printable(line).replace("::", ": :") for line in lines]


def show(console: Console, outcomes: Sequence[Outcome], strict: bool) -> None:
    """Print the problems, the next steps and the summary of each directory."""
    for outcome in outcomes:
        if outcome.verdict is not None and outcome.verdict.problems:
            _show_problems(console, outcome.verdict.problems)
        style = "green" if outcome.is_clean(strict) else "red"
        lines = [(f"next: {hint}", "") for hint in next_steps(outcome)]
        # The table shows problems; the summary says why there is no verdict.
        lines.insert(
            len(lines) if outcome.verdict is not None else 0, (summary(outcome, strict), style)
        )
        for line, color in lines:
            console.print(line, style=color, soft_wrap=True, markup=False)
        for line in depth_of(outcome):
            for part in _folded(line, min(console.width, _WIDTH)):
                console.print(part, soft_wrap=True, markup=False)


def _folded(line: str, width: int) -> list[str]:
    """A line folded into several; long paths are not cut."""
    return textwrap.wrap(
        line, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )


def next_steps(outcome: Outcome) -> list[str]:
    """The next steps, each once."""
    if outcome.verdict is None:
        hints = [outcome.error.hint] if outcome.error is not None else []
    else:
        hints = [problem.hint for problem in outcome.verdict.problems]
    return [printable(hint) for hint in dict.fromkeys(hints) if hint]


def _show_problems(console: Console, problems: Sequence[Problem]) -> None:
    from rich.table import Table
    from rich.text import Text

    rows = list(_rows(problems))
    # Most problems have no tensor, or no file.
    used = [number for number in range(4) if any(row[number] for row, _ in rows)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number in used:
        name = ("kind", "file", "tensor", "detail")[number]
        table.add_column(
            name, no_wrap=number == 0, overflow="fold", ratio=1 if number == 3 else None
        )
    for row, style in rows:
        kind, *others = (Text(printable(row[number])) for number in used)
        kind.stylize(style)
        table.add_row(kind, *others)
    console.print(table)


def _rows(problems: Sequence[Problem]) -> Iterator[tuple[tuple[str, str, str, str], str]]:
    """The cells of each problem; many problems of one kind are shortened to the first and a count."""
    counts = Counter((problem.severity, problem.kind) for problem in problems)
    listed: Counter[tuple[str, str]] = Counter()
    for problem in problems:
        key = problem.severity, problem.kind
        listed[key] += 1
        style = "red" if problem.severity == "error" else "yellow"
        name = problem.kind if problem.severity == "error" else f"{problem.kind} (warning)"
        if listed[key] <= _LISTED:
            yield (name, problem.file or "", problem.tensor or "", problem.detail), style
        elif listed[key] == counts[key]:
            more = f"and {counts[key] - _LISTED:,} more of this kind; --json lists all"
            yield (name, "", "", more), style
