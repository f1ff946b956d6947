"""Owns the page of ``diff``: what changed where, and by how much."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ckpt_tools.cli.page.numbers import counts, numbers, shares, texts
from ckpt_tools.cli.page.parts import Notice, Page, Section, Table
from ckpt_tools.cli.page.pictures import of_changes
from ckpt_tools.cli.page.weights import shape_text

if TYPE_CHECKING:
    from ckpt_tools.analysis.difference import Difference, TensorDifference


def page_of_difference(found: Difference, command: str) -> Page:
    """The page of a comparison.

    Args:
        found: the differences.
        command: the command line.
    """
    picture = of_changes(_changes(found))
    tables = [table for table in (_changed(found), _others(found)) if table.rows]
    section = Section(
        title="Differences",
        level="good" if found.is_empty else "warning",
        verdict=_verdict(found),
        facts=list(_facts(found)),
        notices=list(_odd(found)),
        pictures=[picture] if picture is not None else (),
        tables=tables,
    )
    return Page(
        title=f"Differences of {found.a['name']} and {found.b['name']}",
        lead=f"A is {found.a['path']}. B is {found.b['path']}.",
        sections=[section],
        commands=[("The same again:", command)],
    )


def _verdict(found: Difference) -> str:
    parts = [
        f"{len(held):,} {word}"
        for word, held in (
            ("changed", found.changed),
            ("recast", found.recast),
            ("reshaped", found.reshaped),
            ("added", found.added),
            ("removed", found.removed),
        )
        if held
    ]
    if parts:
        return f"Different: {', '.join(parts)}"
    return "The same" if found.rtol or found.atol else "The same, bit for bit"


def _facts(found: Difference) -> Iterator[tuple[str, str]]:
    for label, side in (("A", found.a), ("B", found.b)):
        yield label, str(side["path"])
        step = "" if side["step"] is None else f", step {side['step']:,}"
        yield f"format of {label}", f"{side['title']}{step}"
    yield "compared", f"{found.compared:,} tensors with {found.elements:,} values"
    yield "the same", f"{found.same:,} tensors"
    if found.rtol or found.atol:
        yield "tolerance", f"|a - b| ≤ {found.atol:g} + {found.rtol:g} |b|"
    else:
        yield "tolerance", "none: every bit counts"
    yield from (("note", note) for note in found.notes)


def _odd(found: Difference) -> Iterator[Notice]:
    for each in found.changed:
        for word, held in (("NaN", each.nan), ("infinite", each.inf)):
            if held[0] != held[1]:
                text = f"{held[0]:,} {word} values in A, {held[1]:,} in B"
                yield Notice("error", f"{word} on one side", text, each.name)
                return  # the table has the others


def _changes(found: Difference) -> dict[str, float | str | None]:
    """For each tensor its relative change, in the order of the names."""
    changes: dict[str, float | str | None] = dict.fromkeys(found.unchanged, 0.0)
    changes |= {each.name: _relative(each) for each in found.changed}
    for held in (found.reshaped, found.added, found.removed):
        changes |= dict.fromkeys(held, "only")
    return dict(sorted(changes.items(), key=lambda item: _natural(item[0])))


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that puts layer 2 before layer 10."""
    return [
        (int(part), "") if part.isascii() and part.isdecimal() and len(part) < 10 else (-1, part)
        for part in name.split(".")
    ]


def _relative(each: TensorDifference) -> float | None:
    if any((*each.nan, *each.inf)) or (each.relative is None and each.max_abs):
        return None
    # A change of bits alone, such as the sign of a zero, is the smallest level.
    return each.relative or math.ulp(0.0)


def _changed(found: Difference) -> Table:
    held = found.changed
    nan = [sum(each.nan) for each in held]
    inf = [sum(each.inf) for each in held]
    columns = [
        texts("tensor", [each.name for each in held]),
        numbers("relative", [each.relative for each in held]),
        numbers("max |a-b|", [each.max_abs for each in held]),
        numbers("mean |a-b|", [each.mean_abs for each in held]),
        numbers("cosine", [each.cosine for each in held]),
        counts("changed values", [each.changed for each in held]),
        shares("of all", [each.changed / each.numel if each.numel else None for each in held]),
        *([counts("NaN", nan)] if any(nan) else []),
        *([counts("infinite", inf)] if any(inf) else []),
        texts("dtypes", [" → ".join(dict.fromkeys(each.dtypes)) for each in held]),
        texts("shape", [shape_text(each.shape) for each in held]),
    ]
    note = "relative is ||a - b|| / ||a||."
    if any((*nan, *inf)):
        note += " NaN and infinite values are counted; the other figures leave them out."
    return Table("Changed tensors", columns, note)


def _others(found: Difference) -> Table:
    rows: list[tuple[str, str, str, str]] = []
    rows += ((name, "removed", str(layout), "") for name, layout in found.removed.items())
    rows += ((name, "added", "", str(layout)) for name, layout in found.added.items())
    rows += ((name, "reshaped", str(a), str(b)) for name, (a, b) in found.reshaped.items())
    rows += ((name, "recast", a, b) for name, (a, b) in found.recast.items())
    heads = ("tensor", "what", "in A", "in B")
    columns = [texts(head, [row[at] for row in rows]) for at, head in enumerate(heads)]
    return Table("Added, removed, reshaped and recast tensors", columns)
