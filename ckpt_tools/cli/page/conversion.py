"""Owns the page of a conversion: what became what, from the report and the directory that was written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_tools.cli.page.commands import shell_line
from ckpt_tools.cli.page.parts import Level, Notice, Page, Section
from ckpt_tools.cli.page.weights import Progress, read_directory
from ckpt_tools.storage.naming import as_path
from ckpt_tools.text import nbytes_text
from ckpt_tools.verification.directory import MANIFEST, SHA256SUMS

if TYPE_CHECKING:
    from ckpt_tools.conversion.report import Report

_COPIES = {
    "master": "the optimizer's masters, where there are any",
    "model": "the copy that the model computed with",
}


def page_of_conversion(
    report: Report,
    command: str,
    *,
    verified: bool,
    statistics: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Page:
    """The page of a conversion that is done.

    Args:
        report: what was done.
        command: the command line.
        verified: whether every byte was verified before the directory appeared.
        statistics: read the values of the directory too.
        workers: number of threads that read them.
        progress: called with bytes done and bytes in all.

    Raises:
        UsageError: the directory that was written cannot be listed.
    """
    weights = read_directory(
        as_path(report.output), statistics=statistics, workers=workers, progress=progress
    )
    warnings = [Notice("warning", "warning", text) for text in report.warnings]
    problems = [*weights.notices, *warnings]
    level, verdict = _verdict(problems, report.complete, verified)
    output, checkpoint = str(report.output), str(report.checkpoint)
    section = Section(
        title=output,
        level=level,
        verdict=verdict,
        facts=list(_facts(report, _manifest(report, weights.directory.path))),
        notices=sorted(problems, key=lambda one: one.level != "error"),
        pictures=weights.pictures(),
        tables=weights.tables(),
    )
    commands = [
        ("The same again, with --overwrite where the directory still exists:", command),
        (
            "Every byte against the checkpoint:",
            shell_line(["ckpt-tools", "verify", output, "--against", checkpoint, "--read-data"]),
        ),
    ]
    if SHA256SUMS in report.files:
        sums = f"cd {shell_line([output])} && sha256sum -c {SHA256SUMS}"
        commands.append(("Without ckpt-tools:", sums))
    return Page(
        title=f"Conversion of {report.checkpoint.name}",
        lead=f"{checkpoint} became {output}.",
        sections=[section],
        commands=commands,
    )


def _verdict(problems: Sequence[Notice], complete: bool, verified: bool) -> tuple[Level, str]:
    proof = "every byte was verified" if verified else "the output was not verified"
    done, proof = ("Complete before", "nothing was written") if complete else ("Converted", proof)
    if any(one.level == "error" for one in problems):
        return "error", f"{done}, with problems; {proof}"
    if problems:
        many = f"{len(problems):,} warnings" if len(problems) > 1 else "1 warning"
        return "warning", f"{done}, with {many}; {proof}"
    return "good", f"{done}; {proof}"


def _facts(report: Report, manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "checkpoint", str(report.checkpoint)
    by = f", by {report.framework}" if report.framework else ""
    yield "format", f"{report.source}{by}"
    if report.world_size is not None:
        yield "ranks", f"{report.world_size:,}"
    if report.step is not None:
        yield "step", f"{report.step:,}"
    yield "weights", _COPIES.get(report.weights, report.weights)
    yield "output", str(report.output)
    yield "tensors", f"{report.tensors:,} with {report.parameters:,} values"
    yield "dtypes", ", ".join(f"{name} ({count:,})" for name, count in report.dtypes.items())
    written = f"{nbytes_text(report.bytes_written)} written in {len(report.files):,} files"
    yield "bytes", f"{nbytes_text(report.bytes_read)} read, {written}"
    yield "time", f"{report.seconds.get('total', 0):.1f} s"
    yield from _checks(report)
    yield from (("note", note) for note in report.notes)
    for name, value in (manifest.get("options") or {}).items():
        if name not in ("weights",) and value not in (None, "", [], False):
            yield f"option {name}", value if isinstance(value, str) else json.dumps(value)
    versions = manifest.get("versions") or {}
    tool = manifest.get("tool")
    if tool:
        yield "made by", ", ".join([tool, *(f"{name} {held}" for name, held in versions.items())])
    if manifest.get("xxh3_128"):
        yield "digest of the manifest", f"XXH3-128 {manifest['xxh3_128']}"


def _checks(report: Report) -> Iterator[tuple[str, str]]:
    if report.checked:
        yield "masters", f"{report.checked:,} compared with the 16-bit weights"
    words = (
        ("checked", "compared with checksums of their files"),
        ("partly", "in records that were read in part, so not compared"),
        ("without", "without a checksum"),
    )
    parts = [
        f"{nbytes_text(report.checksums[key])} {text}"
        for key, text in words
        if report.checksums.get(key)
    ]
    if parts:
        yield "source bytes", ", ".join(parts)


def _manifest(report: Report, directory: Path) -> dict[str, Any]:
    """The manifest of the directory, or of its first adapter."""
    for name in sorted(name for name in report.files if name.rpartition("/")[2] == MANIFEST):
        try:
            content = json.loads((directory / name).read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(content, dict):
            return content
    return {}
