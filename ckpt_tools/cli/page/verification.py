"""Owns the page of ``verify``: the problems of each directory first, then what is in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Protocol

from ckpt_tools.cli.page.numbers import texts
from ckpt_tools.cli.page.parts import Level, Notice, Page, Section, Table
from ckpt_tools.cli.page.weights import Progress, Weights, read_directory
from ckpt_tools.errors import CkptError
from ckpt_tools.storage.naming import as_path
from ckpt_tools.text import nbytes_text

if TYPE_CHECKING:
    from ckpt_tools.verification import Problem, Verdict

# More problems than these are rows of a table.
_NOTICES = 20


class Verified(Protocol):
    """One directory, as it was named, with its verdict or the reason why there is none."""

    @property
    def directory(self) -> Path | str:
        """The directory, or its address in a store."""

    @property
    def verdict(self) -> Verdict | None:
        """The verdict; None if the directory could not be checked."""

    @property
    def error(self) -> CkptError | None:
        """Why it could not be checked."""


def page_of_verification(
    verified: Sequence[Verified],
    command: str,
    *,
    strict: bool,
    statistics: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Page:
    """The page of a run of ``verify``.

    Args:
        verified: the directories.
        command: the command line.
        strict: whether warnings count as problems.
        statistics: read the values of each directory too.
        workers: number of threads that read them.
        progress: called with bytes done and bytes in all.
    """
    sections = [
        _section(one, strict, statistics, workers, progress)
        for one in sorted(verified, key=lambda one: one.verdict is not None)
    ]
    clean = sum(1 for section in sections if section.level == "good")
    first, many = str(verified[0].directory), f"{len(sections):,} directories"
    one = len(sections) == 1
    return Page(
        title=f"Verification of {PurePath(first).name or first if one else many}",
        lead=first
        if one
        else f"{clean:,} of {len(sections):,} {'is' if clean == 1 else 'are'} clean.",
        sections=sorted(sections, key=lambda section: _RANK[section.level]),
        commands=[("The same again:", command)],
    )


_RANK: dict[Level, int] = {"error": 0, "warning": 1, "good": 2}


def _section(
    one: Verified, strict: bool, statistics: bool, workers: int | None, progress: Progress | None
) -> Section:
    title = str(one.directory)
    if one.verdict is None:
        error = one.error
        fact, where, hint = ("", "", "") if error is None else (error.fact, error.path, error.hint)
        notice = Notice("error", "could not be checked", fact, str(where or ""), hint or "")
        return Section(title, "error", "Could not be checked", notices=[notice])
    verdict = one.verdict
    try:
        weights: Weights | None = read_directory(
            as_path(one.directory), statistics=statistics, workers=workers, progress=progress
        )
    except CkptError:
        weights = None  # it went away meanwhile; the verdict stands
    level, said = _told(verdict, strict)
    found = [*map(_notice, verdict.problems), *(weights.notices if weights is not None else ())]
    notices = sorted(found, key=lambda notice: _RANK[notice.level])
    tables = list(weights.tables()) if weights is not None else []
    if len(notices) > _NOTICES:
        tables.insert(0, _problems(verdict.problems))
    return Section(
        title,
        level,
        said,
        facts=list(_facts(verdict)),
        notices=[*notices[:_NOTICES], *_rest(notices)],
        pictures=weights.pictures() if weights is not None else (),
        tables=tables,
    )


def _told(verdict: Verdict, strict: bool) -> tuple[Level, str]:
    parts = [
        f"{len(held):,} {word}{'' if len(held) == 1 else 's'}"
        for word, held in (("error", verdict.errors), ("warning", verdict.warnings))
        if held
    ]
    if not verdict.clean(strict):
        return "error", f"Not clean: {', '.join(parts)}"
    return ("warning", f"Clean, with {', '.join(parts)}") if parts else ("good", "Clean")


def _notice(problem: Problem) -> Notice:
    where = ": ".join(filter(None, (problem.file, problem.tensor)))
    level: Level = "error" if problem.severity == "error" else "warning"
    return Notice(level, problem.kind, problem.detail, where, problem.hint or "")


def _rest(notices: Sequence[Notice]) -> list[Notice]:
    left = len(notices) - _NOTICES
    if left <= 0:
        return []
    return [Notice("warning", "and more", f"{left:,} more problems are in the table of problems.")]


def _problems(problems: Sequence[Problem]) -> Table:
    return Table(
        "Problems",
        [
            texts("what", [problem.detail for problem in problems]),
            texts("kind", [problem.kind for problem in problems]),
            texts("severity", [problem.severity for problem in problems]),
            texts("file", [problem.file or "" for problem in problems]),
            texts("tensor", [problem.tensor or "" for problem in problems]),
        ],
    )


def _facts(verdict: Verdict) -> Iterator[tuple[str, str]]:
    yield "tensors", f"{verdict.tensors:,}, {nbytes_text(verdict.nbytes)}"
    yield from (("checked", text) for text in verdict.checked)
    yield from (("not checked", text) for text in verdict.skipped)
    yield "time", f"{verdict.seconds:.1f} s"
