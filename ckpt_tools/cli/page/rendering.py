"""Owns the markup of a page: one HTML file that loads nothing.

Every text passes :func:`ckpt_tools.text.printable` and is escaped. The policy of the page allows its own
style and its own script alone, by their digests, so nothing that a name holds can run. The cells of a table
are JSON, of which a browser builds a hundred rows at a time.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from ckpt_tools._version import __version__
from ckpt_tools.cli.page.parts import Page, Table
from ckpt_tools.text import printable

# Rows that are in the page as markup, for browsers without JavaScript and for print.
FIRST = 100
_LONGEST = 400
# A browser ends a line after a hyphen, also after those that begin an option.
_OPTION = re.compile(r"(?<![^\s(])(--?[A-Za-z][\w-]*)")


class _Cell(NamedTuple):
    text: str
    style: str


def rendered(page: Page) -> str:
    """The page as HTML."""
    environment = Environment(
        autoescape=True, finalize=_shown, undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters |= {
        "breakable": _breakable,
        "data": _data,
        "first_rows": _first_rows,
        "prose": _prose,
    }
    style, script = _own("page.css"), _own("page.js")
    return environment.from_string(_own("page.html")).render(
        page=page,
        first=FIRST,
        version=__version__,
        style=Markup(style),
        script=Markup(script),
        style_digest=_digest(style),
        script_digest=_digest(script),
    )


@cache
def _own(name: str) -> str:
    """A file of this package."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """The digest by which the policy allows a style or a script."""
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"


def _shown(value: object) -> object:
    """A value as text without characters that a terminal or browser interprets; markup is our own."""
    return value if isinstance(value, Markup) else printable(str(value))


def _cut(text: str) -> str:
    """The text of a cell; a name of kilobytes would hide the rest."""
    text = printable(text)
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]}… ({len(text):,} characters)"


def _breakable(text: str) -> Markup:
    """A name in which a line may end after each dot."""
    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=\.)", printable(text)))


def _prose(text: str) -> Markup:
    """Sentences or a command line, in which no line ends within the name of an option."""
    parts = _OPTION.split(printable(text))  # every second part is an option
    option = Markup('<span class="option">{}</span>')
    return Markup("").join(
        option.format(part) if number % 2 else escape(part) for number, part in enumerate(parts)
    )


def _first_rows(table: Table) -> Iterator[list[_Cell]]:
    for row in range(min(table.rows, FIRST)):
        yield [
            _Cell(
                _cut(column.cells[row]),
                "number" if column.keys is not None else "" if index else "wrap",
            )
            for index, column in enumerate(table.columns)
        ]


def _data(table: Table) -> Markup:
    """The columns as JSON in which no character is markup."""
    columns: list[dict[str, Any]] = []
    for column in table.columns:
        held: dict[str, Any] = {"cells": [_cut(cell) for cell in column.cells]}
        if column.keys is not None:
            held["keys"] = list(column.keys)
        columns.append(held)
    text = json.dumps(columns, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
