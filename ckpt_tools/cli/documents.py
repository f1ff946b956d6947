"""The result of ``verify`` for programs: JSON, JUnit XML, and GitHub's annotations.

Owns the three formats. JSON is described in ``docs/verify.md`` and ``docs/verify.schema.json``. Names from a
checkpoint never become markup or commands: control characters are written as escapes everywhere.

Sources: Jenkins' ``junit-10.xsd``; ``packages/core/src/command.ts`` of GitHub's actions toolkit
for the escapes of workflow commands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any
from xml.etree import ElementTree

from ckpt_tools._version import __version__
from ckpt_tools.cli.text import json_text, printable
from ckpt_tools.cli.verdicts import (
    Outcome,
    depth_of,
    next_steps,
    place_of,
    status_of,
    summary,
)
from ckpt_tools.verification.problem import SCHEMA_VERSION, Problem, Verdict

_IN_ONE_ANNOTATION = 10


def json_document(outcomes: Sequence[Outcome], strict: bool) -> str:
    """One JSON object."""
    document = {
        "version": SCHEMA_VERSION,
        "tool": {"name": "ckpt-tools", "version": __version__},
        "strict": strict,
        "status": status_of(outcomes, strict),
        "directories": [_directory(outcome, strict) for outcome in outcomes],
    }
    return json_text(document)


def _directory(outcome: Outcome, strict: bool) -> dict[str, Any]:
    error = outcome.error
    held = outcome.verdict or Verdict(outcome.directory, (), (), (), 0, 0, 0.0)
    data = held.to_json()
    del data["version"]
    data["directory"] = str(outcome.directory)
    data["clean"] = outcome.is_clean(strict)
    data["unchecked"] = None if error is None else {"fact": error.fact, "hint": error.hint}
    return data


def junit_document(outcomes: Sequence[Outcome], strict: bool) -> str:
    """JUnit XML: a suite for each directory, a case for each check that was made and each kind of problem.

    A warning is a passed case with output, unless ``strict``.
    """
    root = ElementTree.Element("testsuites", name="ckpt-tools verify")
    for outcome in outcomes:
        suite = ElementTree.SubElement(root, "testsuite", name=printable(str(outcome.directory)))
        suite.extend(_cases(outcome, strict))
        seconds = outcome.verdict.seconds if outcome.verdict is not None else 0.0
        suite.attrib.update(_counts(suite), time=f"{seconds:.3f}")
    total = sum(float(suite.attrib["time"]) for suite in root)
    root.attrib.update(_counts(root), time=f"{total:.3f}")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _counts(element: ElementTree.Element) -> dict[str, str]:
    names = {"tests": "testcase", "failures": "failure", "errors": "error", "skipped": "skipped"}
    return {key: str(sum(1 for _ in element.iter(tag))) for key, tag in names.items()}


def _cases(outcome: Outcome, strict: bool) -> Iterator[ElementTree.Element]:
    verdict = outcome.verdict
    if verdict is None:
        fact = outcome.error.fact if outcome.error is not None else ""
        case = _case(outcome, "checked at all")
        error = type(outcome.error).__name__
        ElementTree.SubElement(case, "error", type=error, message=printable(fact)).text = "\n".join(
            [printable(fact), *next_steps(outcome)]
        )
        yield case
        return
    for name in verdict.checked:
        yield _case(outcome, name)
    for name in verdict.skipped:
        case = _case(outcome, name)
        ElementTree.SubElement(case, "skipped", message=printable(name))
        yield case
    for (severity, kind), problems in _by_kind(verdict.problems):
        case = _case(outcome, kind if severity == "error" else f"{kind} (warning)")
        lines = "\n".join(_line(outcome, problem) for problem in problems)
        if severity == "error" or strict:
            message = _told(problems)
            ElementTree.SubElement(case, "failure", type=kind, message=message).text = lines
        else:
            ElementTree.SubElement(case, "system-out").text = lines
        yield case


def _case(outcome: Outcome, name: str) -> ElementTree.Element:
    classname = printable(str(outcome.directory))
    return ElementTree.Element("testcase", classname=classname, name=printable(name), time="0")


def _by_kind(problems: Sequence[Problem]) -> Iterator[tuple[tuple[str, str], list[Problem]]]:
    def kind(problem: Problem) -> tuple[str, str]:
        return problem.severity, problem.kind

    for key, group in groupby(sorted(problems, key=kind), key=kind):
        yield key, list(group)


def _line(outcome: Outcome, problem: Problem) -> str:
    tensor = f"{printable(problem.tensor)}: " if problem.tensor else ""
    hint = f"\n    next: {printable(problem.hint)}" if problem.hint else ""
    return f"{place_of(outcome, problem)}: {tensor}{printable(problem.detail)}{hint}"


def _told(problems: Sequence[Problem]) -> str:
    first = problems[0]
    tensor = f"{first.tensor}: " if first.tensor else ""
    more = f" (and {len(problems) - 1:,} more)" if len(problems) > 1 else ""
    return printable(f"{tensor}{first.detail}{more}")


def github_annotations(outcomes: Sequence[Outcome], strict: bool) -> str:
    """Workflow commands: an annotation for each kind of problem in each file, and a line of summary.

    GitHub shows ten annotations of a severity for each step, so problems of a kind share one.
    """
    return "\n".join(line for outcome in outcomes for line in _annotations(outcome, strict)) + "\n"


def _annotations(outcome: Outcome, strict: bool) -> Iterator[str]:
    if outcome.verdict is None:
        told = [summary(outcome, strict), *next_steps(outcome)]
        yield _annotation("error", str(outcome.directory), "could not be checked", "\n".join(told))
        return

    def place(problem: Problem) -> tuple[str, str, str]:
        return problem.severity, problem.kind, place_of(outcome, problem)

    problems = sorted(outcome.verdict.problems, key=place)
    for (severity, kind, file), group in groupby(problems, key=place):
        held = list(group)
        lines = [
            printable(f"{p.tensor}: {p.detail}" if p.tensor else p.detail)
            for p in held[:_IN_ONE_ANNOTATION]
        ]
        if len(held) > len(lines):
            lines.append(f"and {len(held) - len(lines):,} more")
        lines += [f"next: {printable(h)}" for h in dict.fromkeys(p.hint for p in held) if h]
        level = "error" if severity == "error" or strict else "warning"
        yield _annotation(level, file, kind, "\n".join(lines))
    for line in (summary(outcome, strict), *depth_of(outcome)):
        yield line.replace("::", ": :")


def _annotation(level: str, file: str, title: str, message: str) -> str:
    file = printable(file)
    return f"::{level} file={_property(file)},title={_property(title)}::{_data(message)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
