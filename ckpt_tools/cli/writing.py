"""Carries out a command that writes a directory, and reports what was done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_tools.cli import reporting
from ckpt_tools.cli.outcome import joined_ranks
from ckpt_tools.cli.progress import shown_progress
from ckpt_tools.cli.text import count_text, counted, nbytes_text, print_json, say, seconds_text

if TYPE_CHECKING:
    from ckpt_tools.conversion.report import Report


def write_directory(
    convert: Callable[..., Report],
    *,
    quiet: bool,
    verbose: bool,
    as_json: bool,
    timeout: float,
    report: Path | None,
    statistics: bool,
    **options: Any,
) -> None:
    """Carry out ``convert``, print what was done, and write the page for a browser."""
    if report is not None:
        reporting.refuse_misplaced(report)
    ranks = joined_ranks(timeout)
    leads = ranks is None or ranks.leads
    with shown_progress(quiet or as_json or not leads) as progress:
        done = convert(progress=progress, ranks=ranks, **options)
    if not leads:
        return
    if as_json:
        print_json(done.to_json())
    elif not quiet:
        show_report(done, verbose)
    if report is not None:
        from ckpt_tools.cli.page.conversion import page_of_conversion

        with shown_progress(quiet or as_json or not statistics, "reading") as progress:
            page = page_of_conversion(
                done,
                reporting.command_line(),
                verified=options["verify"],
                statistics=statistics,
                workers=options["workers"],
                progress=progress,
            )
        reporting.write_page(report, page)


def show_report(report: Report, verbose: bool) -> None:
    """Print what was done."""
    _show(report)
    if verbose and not report.complete:
        _show_details(report)


def _show(report: Report) -> None:
    for note in report.notes:
        say(f"note: {note}")
    for warning in report.warnings:
        say(warning, label="warning: ", color="yellow", err=True)
    if report.complete:
        say(f"{report.output} is complete, written by the same request. Nothing was done.")
        return
    if report.dry_run:
        for file in report.plan:
            tensors = counted(len(file["tensors"]), "tensor")
            say(f"{file['file']}: {nbytes_text(file['bytes'])}, {tensors}")
        say(f"Nothing was written to {report.output} (dry run).")
        return
    seconds = report.seconds
    rate = report.bytes_written / max(seconds["move"] + seconds["sync"], 1e-9)
    tensors = counted(report.tensors, "tensor")
    parameters = f"{count_text(report.parameters)} parameters"
    say(f"{report.output}: {tensors}, {parameters}, {', '.join(report.dtypes)}")
    masters = counted(report.checked, "master")
    checked = f", {masters} compared with the 16-bit weights" if report.checked else ""
    say(
        f"{nbytes_text(report.bytes_read)} read, {nbytes_text(report.bytes_written)} written in "
        f"{counted(len(report.files), 'file')}, {seconds_text(seconds['total'])} "
        f"({nbytes_text(rate)}/s written){checked}"
    )


def _show_details(report: Report) -> None:
    for name, size in report.files.items():
        say(f"{name}: {nbytes_text(size)}")
    stages = (f"{stage} {seconds_text(taken)}" for stage, taken in report.seconds.items())
    say(f"time: {', '.join(stages)}")
