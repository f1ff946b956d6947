"""``ckpt-tools verify``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ckpt_tools.cli import caching, options, reporting, shapes
from ckpt_tools.cli.files import write_whole
from ckpt_tools.cli.outcome import joined_ranks, print_traceback, reports_errors
from ckpt_tools.cli.progress import shown_progress
from ckpt_tools.cli.text import drawn, say
from ckpt_tools.cli.verdicts import UNCHECKED, Outcome, show, status_of
from ckpt_tools.errors import CkptError, OutputFailed

_BY_SUFFIX = {".json": "json", ".xml": "junit"}
_DOCUMENTS = ("json", "junit")

SUMMARY = "Everything that is wrong with a finished directory."


@click.command("verify", cls=options.Command)
@click.argument("directories", nargs=-1, required=True, metavar="DIR...", type=options.PATH)
@shapes.place(
    "--against",
    group=options.CHECK,
    metavar="CKPT",
    help="Compare every tensor, bit for bit, with the checkpoint that it was made from.",
)
@shapes.place(
    "--also",
    group=options.CHECK,
    multiple=True,
    help="With --against: a further folder with files of CKPT, such as another machine's; repeatable.",
)
@shapes.switch(
    "--read-data",
    group=options.CHECK,
    help="Read every byte: digests, NaN, constant weights.",
)
@shapes.switch(
    "--load",
    group=options.CHECK,
    help="Load it with transformers or PEFT, call it, generate. Takes the model's memory.",
)
@shapes.seconds(
    "--load-seconds",
    group=options.CHECK,
    default=3600,
    help="With --load: when the process that loads is ended.",
)
@shapes.count(
    "--load-memory",
    group=options.CHECK,
    metavar="GB",
    help="With --load: the memory of the process that loads. Default: 17 GB and 8 times the weights.",
)
@shapes.place(
    "--base",
    group=options.CHECK,
    help="The base of an adapter. Default: the directory that the adapter names, if there is one.",
)
@shapes.place(
    "--like",
    group=options.CHECK,
    metavar="MODEL",
    help="Compare config, tokenizer, chat template and generation config with those of MODEL: the base, or "
    "the directory that the training run loaded.",
)
@options.option(
    "--for",
    "readers",
    group=options.CHECK,
    type=click.Choice(["transformers-4", "vllm", "sglang", "llama.cpp", "peft"]),
    multiple=True,
    help="What this reader will not take; repeatable. docs/verify.md lists the rules and versions.",
)
@shapes.switch("--strict", group=options.CHECK, help="Warnings fail too.")
@shapes.switch(
    "--trust-remote-code",
    group=options.CHECK,
    help="Run custom code that lies in DIR, in a process of its own.",
)
@options.workers
@caching.no_cache
@shapes.one_of(
    "--format",
    "form",
    group=options.WRITE,
    among=("text", "json", "junit", "github"),
    help="What to print: a table, JSON (docs/verify.md), JUnit XML, or annotations for GitHub.",
)
@options.option(
    "--output",
    group=options.WRITE,
    type=options.LOCAL,
    metavar="FILE",
    help="Write the report to FILE: JSON for .json, JUnit for .xml, otherwise --format. stdout then shows "
    "text, or the annotations.",
)
@reporting.page_with_statistics
@options.json
@options.option("-q", "--quiet", is_flag=True, help="Print no text. The exit status is the result.")
@options.timeout
@options.debug
@reports_errors
def command(
    directories: tuple[Path, ...],
    strict: bool,
    form: str,
    output: Path | None,
    report: Path | None,
    statistics: bool,
    quiet: bool,
    timeout: float,
    as_json: bool,
    load_memory: int | None,
    **asked: Any,
) -> None:
    """Show everything that is wrong with the finished directories DIR...

    Takes models and adapters of any writer. Checks files, index and shards, tensors against the model of the
    config, tokenizer, chat template, generation config and manifest. By default only the structure, in
    seconds at any size; with --read-data every byte.

    \b
    Exit status:
      0  clean
      1  problems were found; warnings alone count with --strict
      2  a directory could not be checked, or the report could not be written

    \b
    Examples:
      ckpt-tools verify out
      ckpt-tools verify out --against run/global_step500 --read-data
      ckpt-tools verify out out-adapter --load --format junit
    """
    from ckpt_tools.cli.page.verification import page_of_verification

    if as_json and form not in ("text", "json"):
        raise click.UsageError(f"--json does not fit --format {form}")
    form = "json" if as_json else form
    written = _format_of(output, form)
    asked["load_memory"] = None if load_memory is None else load_memory * 10**9
    reads = asked["read_data"] or asked["against"] is not None
    ranks = joined_ranks(timeout)
    leads = ranks is None or ranks.leads
    silent = quiet or not reads or form == "github" or not leads
    with shown_progress(silent, "reading") as progress:
        outcomes = [_look_at(path, progress=progress, ranks=ranks, **asked) for path in directories]
    status = status_of(outcomes, strict)
    if not leads:
        sys.exit(status)
    try:
        if report is not None:
            with shown_progress(silent or not statistics, "reading") as progress:
                page = page_of_verification(
                    outcomes,
                    reporting.command_line(),
                    strict=strict,
                    statistics=statistics,
                    workers=asked["workers"],
                    progress=progress,
                )
            reporting.write_page(report, page)
        if output is not None:
            _write(output, _report(written, outcomes, strict))
    except OutputFailed as error:
        say(f"{error.path}: {error.fact}", label="error: ", color="red", bold=True, err=True)
        say(error.hint or "", label="  next: ", err=True)
        status = UNCHECKED
    shown = "text" if output is not None and form in _DOCUMENTS else form
    if shown != "text" or not quiet:
        click.echo(_report(shown, outcomes, strict), nl=False)
    sys.exit(status)


def _format_of(output: Path | None, form: str) -> str:
    """The format of the report in the file."""
    by_suffix = _BY_SUFFIX.get(output.suffix.lower(), form) if output is not None else form
    if form in _DOCUMENTS and by_suffix != form:
        raise click.UsageError(f"--format {form} does not fit --output {output}")
    return by_suffix


def _look_at(path: Path, *, progress: Callable[[int, int], None] | None, **asked: Any) -> Outcome:
    """The outcome of one directory; an error does not stop the next ones."""
    from ckpt_tools.verification import verify

    try:
        return Outcome(path, verify(path, progress=progress, **asked))
    except CkptError as error:
        if click.get_current_context().params["debug"]:
            print_traceback()
        return Outcome(path, None, error)
    except Exception as error:
        # Status 1 means that the directory has problems.
        if click.get_current_context().params["debug"]:
            print_traceback()
        return Outcome(path, None, CkptError(f"unforeseen: {type(error).__name__}: {error}"))


def _report(form: str, outcomes: Sequence[Outcome], strict: bool) -> str:
    if form == "text":
        return drawn(lambda console: show(console, outcomes, strict))
    from ckpt_tools.cli import documents

    make = {
        "json": documents.json_document,
        "junit": documents.junit_document,
        "github": documents.github_annotations,
    }
    return make[form](outcomes, strict)


def _write(output: Path, text: str) -> None:
    try:
        write_whole(output, text)
    except OSError as error:
        raise OutputFailed(
            f"it cannot be written ({error.strerror})",
            path=output,
            hint="Name a file in a directory that exists and can be written.",
        ) from error
