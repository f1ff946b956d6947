"""Owns ``--report`` and ``--statistics``: the page that a command writes, checked before the work begins.

:mod:`ckpt_tools.cli.page` makes the page.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from ckpt_tools.cli import options
from ckpt_tools.cli.files import write_whole
from ckpt_tools.cli.usage import Unusable
from ckpt_tools.errors import OutputFailed

if TYPE_CHECKING:
    from ckpt_tools.cli.page import Page

F = TypeVar("F", bound=Callable[..., Any])

# Key of the words that were typed after the program's name, in the context.
TYPED = "ckpt_tools.typed"
_SUFFIXES = (".html", ".htm")


def _writable(_: click.Context, __: click.Parameter, file: Path | None) -> Path | None:
    """The file, if a page can be written there; an hour's work must not end with a wrong name."""
    if file is None:
        return None
    if file.suffix.lower() not in _SUFFIXES:
        raise Unusable(
            f"--report {file} does not end in .html",
            hint="The page is HTML. Name the file report.html, for example.",
        )
    if file.is_dir():
        raise Unusable(f"--report {file} is a directory", hint="Name a file in it.")
    folder = file.parent
    if not folder.is_dir():
        raise Unusable(
            f"--report {file}: the directory {folder} does not exist", hint="Make it first."
        )
    if not os.access(folder, os.W_OK):
        raise Unusable(f"--report {file}: {folder} is not writable", hint="Name another directory.")
    return file


page = options.option(
    "--report",
    group=options.WRITE,
    type=options.LOCAL,
    metavar="FILE",
    callback=_writable,
    is_eager=True,
    help="Write a page for a browser: problems, tensors, sizes, digests, commands. FILE ends in .html.",
)


def _with_report(context: click.Context, _: click.Parameter, asked: bool) -> bool:
    if asked and context.params.get("report") is None:
        raise Unusable(
            "--statistics has no place to go without --report",
            hint="Add --report FILE.html. The page shows them.",
        )
    return asked


statistics = options.option(
    "--statistics",
    group=options.WRITE,
    is_flag=True,
    callback=_with_report,
    help="With --report: read every value too; show min, max, norm, NaN and zeros of each tensor.",
)


def page_with_statistics(function: F) -> F:
    """Both options. ``--report`` is eager, so that it is known when ``--statistics`` is looked at."""
    return page(statistics(function))


def command_line() -> str:
    """The command line of this process, with the variables of the environment that stood for options."""
    from ckpt_tools.cli.page import shell_line

    context = click.get_current_context()
    settings = {}
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if isinstance(parameter, options.Option) and source is ParameterSource.ENVIRONMENT:
            name = parameter.variable(context)
            settings[name] = os.environ[name]
    return shell_line(["ckpt-tools", *context.meta[TYPED]], settings)


def refuse_misplaced(file: Path) -> None:
    """Refuse a page of a dry run, and a page in the directory that is written."""
    asked = click.get_current_context().params
    if asked["dry_run"]:
        raise Unusable(
            "--report does not fit --dry-run: there is no output to show",
            hint="Leave one of them out.",
        )
    out = Path(asked["out"]).resolve()
    if out in file.resolve().parents:
        raise Unusable(
            f"--report {file} lies in the output",
            hint="Name a file outside of it, such as report.html.",
        )


def write_page(file: Path, made: Page) -> None:
    """Write the page.

    Raises:
        OutputFailed: it cannot be written.
    """
    from ckpt_tools.cli.page import rendered

    try:
        write_whole(file, rendered(made))
    except OSError as error:
        raise OutputFailed(
            f"the page cannot be written ({error.strerror})",
            path=file,
            hint="All else is done. Name a file in a directory that exists and can be written.",
        ) from error
