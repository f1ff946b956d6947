"""Owns the content of a page, without its markup: sections of facts, problems, pictures and tables.

Text is plain: :mod:`ckpt_tools.cli.page.rendering` alone writes markup, and escapes every character of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["good", "warning", "error"]


@dataclass(frozen=True)
class Notice:
    """A problem.

    Attributes:
        level: how bad it is.
        title: what kind of problem.
        text: the fact.
        where: the file or tensor.
        hint: the next step.
    """

    level: Level
    title: str
    text: str
    where: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        head: its title.
        cells: what is shown, one for each row.
        keys: the numbers to sort by; None sorts last. Without keys, the text is sorted.
    """

    head: str
    cells: Sequence[str]
    keys: Sequence[float | None] | None = None


@dataclass(frozen=True)
class Table:
    """A table that a reader can sort, filter and page through."""

    title: str
    columns: Sequence[Column]
    note: str = ""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.columns[0].cells)


@dataclass(frozen=True)
class Mark:
    """One mark of a picture.

    Attributes:
        start: where it begins, from 0 to 1.
        length: how long or high it is, from 0 to 1.
        style: a class of the style sheet: a hue or a level.
        text: what it stands for.
        width: of a column or cell, from 0 to 1.
    """

    start: float
    length: float
    style: str
    text: str
    width: float = 0.0


@dataclass(frozen=True)
class Row:
    """A labelled row of a picture: its marks, and its value as text.

    Attributes:
        label: what the row is of.
        text: its value.
        marks: the marks in it.
        path: of a line, the points as SVG takes them.
    """

    label: str
    text: str
    marks: Sequence[Mark]
    path: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture.

    Attributes:
        kind: ``shares`` is one bar in parts, ``bars`` a bar for each row, ``columns`` one row of upright
            bars, ``lines`` and ``cells`` a line or a strip of cells for each row.
        title: what it shows.
        note: how to read it.
        rows: its rows; of ``shares``, one row a part.
        ends: what stands at the left and the right end below the rows.
        legend: a style and its meaning.
    """

    kind: Literal["shares", "bars", "columns", "lines", "cells"]
    title: str
    rows: Sequence[Row]
    note: str = ""
    ends: tuple[str, str] = ("", "")
    legend: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading: of several directories, one each."""

    title: str
    level: Level
    verdict: str
    facts: Sequence[tuple[str, str]] = ()
    notices: Sequence[Notice] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        title: what it is about.
        lead: one line below the title.
        sections: its parts.
        commands: command lines that make the same again, or prove it.
    """

    title: str
    lead: str
    sections: Sequence[Section]
    commands: Sequence[tuple[str, str]] = ()
