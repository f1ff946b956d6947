"""Text for terminals and logs: numbers and durations for people, and JSON.

Owns :func:`say`, the one way to print a line. All text from checkpoints goes through
:mod:`ckpt_tools.text`.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from ckpt_tools.errors import counted as counted
from ckpt_tools.text import nbytes_text as nbytes_text
from ckpt_tools.text import neutral
from ckpt_tools.text import printable as printable

if TYPE_CHECKING:
    from rich.console import Console

_LOG_WIDTH = 160

# A number and its unit, between which a line does not end.
_SIZE = re.compile(r"(?<=\d) (?=(?:B|kB|MB|GB|TB|s|K|M|T)\b)")
_NO_BREAK = "\N{NO-BREAK SPACE}"


def say(
    line: str = "",
    *,
    label: str = "",
    color: str | None = None,
    bold: bool = False,
    err: bool = False,
) -> None:
    """Print one line.

    Args:
        line: the line; characters that are not printable become escapes.
        label: text before the line, in color if colors are shown.
        color: the color of the label, by Click's name.
        bold: whether the label is bold.
        err: print to stderr.
    """
    shown = printable(line) if label else neutral(printable(line))
    click.echo(click.style(label, fg=color, bold=bold) + shown, err=err)


def print_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    click.echo(json_text(value), nl=False)


def json_text(value: Any) -> str:
    """A value as JSON in which no line is a command to a workflow's runner."""
    return json.dumps(value, indent=2).replace("##", "#\\u0023") + "\n"


def json_line(value: Any) -> str:
    """A value as JSON on one line, which is no command to a workflow's runner."""
    return json.dumps(value).replace("##", "#\\u0023")


def drawn(draw: Callable[[Console], None]) -> str:
    """The text that a function draws on a console as wide as the terminal, or as a log."""
    from rich.console import Console

    is_terminal = sys.stdout.isatty()
    text = io.StringIO()
    asked = os.environ.get("COLUMNS", "")
    width = int(asked) if asked.isdecimal() and int(asked) else None
    if width is None and not is_terminal:
        width = _LOG_WIDTH
    draw(Console(file=text, force_terminal=is_terminal, highlight=False, width=width))
    # rich fills lines of a table with spaces.
    return "".join(f"{neutral(line.rstrip())}\n" for line in text.getvalue().splitlines())


def folded(text: str, width: int) -> str:
    """Text in lines of at most ``width`` characters; a number and its unit stay together."""
    glued = _SIZE.sub(_NO_BREAK, text)
    lines = textwrap.wrap(glued, max(width, 8), break_on_hyphens=False) or [""]
    return "\n".join(lines).replace(_NO_BREAK, " ")


def count_text(count: int) -> str:
    """A number of parameters for a person."""
    for limit, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if count >= limit:
            return f"{count:,} ({count / limit:.3g} {unit})"
    return f"{count:,}"


def seconds_text(seconds: float) -> str:
    """A duration for a person."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
