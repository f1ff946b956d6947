"""``ckpt-tools diff``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckpt_tools.cli import options, reporting, shapes
from ckpt_tools.cli.outcome import reports_errors
from ckpt_tools.cli.progress import shown_progress
from ckpt_tools.cli.text import counted, print_json, say

if TYPE_CHECKING:
    from ckpt_tools.analysis.difference import Difference, TensorDifference

_DIFFERENT = 1
_TROUBLE = 2

SUMMARY = "What is different between two checkpoints."


@click.command("diff", cls=options.Command)
@click.argument("a", type=options.PATH)
@click.argument("b", type=options.PATH)
@shapes.tag_of("A", "--tag-a")
@shapes.tag_of("B", "--tag-b")
@shapes.one_of(
    "--weights",
    among=("auto", "master", "model"),
    group=options.READ,
    help="For a training checkpoint: the optimizer's masters, or the 16-bit weights. auto: for "
    "each tensor the copy that the other side holds too.",
)
@options.option(
    "--rtol",
    group=options.CHECK,
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="X",
    help="An element counts as changed where |a - b| > atol + rtol |b|. Default: any bit.",
)
@options.option(
    "--atol",
    group=options.CHECK,
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="X",
    help="See --rtol.",
)
@options.option(
    "--top",
    group=options.WRITE,
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    metavar="N",
    help="How many tensors of each kind to list.",
)
@shapes.one_of(
    "--format", "form", among=("text", "json"), group=options.WRITE, help="json: as --json."
)
@reporting.page
@options.json
@options.workers
@options.option(
    "-q", "--quiet", is_flag=True, help="Print nothing but errors. The exit status is the result."
)
@options.debug
# Status 1 means that the two differ.
@partial(reports_errors, trouble=_TROUBLE)
def command(
    a: Path,
    b: Path,
    top: int,
    form: str,
    report: Path | None,
    as_json: bool,
    quiet: bool,
    **asked: Any,
) -> None:
    """Show the differences between the checkpoints A and B.

    Both may be of any format: training checkpoints, model or adapter directories, single files. Lists
    the tensors that were added, removed, reshaped, recast or changed, the largest change first:
    ||a - b|| / ||a||, largest and mean |a - b|, cosine, number of elements.

    \b
    Exit status:
      0  nothing is different
      1  something is
      2  or more: trouble, as for every command

    \b
    Examples:
      ckpt-tools diff run/global_step400 run/global_step500
      ckpt-tools diff run/global_step500 model --json
    """
    from ckpt_tools.analysis.difference import diff

    as_json = as_json or form == "json"
    with shown_progress(quiet or as_json, "comparing") as progress:
        found = diff(a, b, progress=progress, **asked)
    if as_json:
        print_json(found.to_json())
    elif not quiet:
        for line in _lines(found, top):
            say(line)
    if report is not None:
        # The pages import the checks of verify, and those import NumPy.
        from ckpt_tools.cli.page.difference import page_of_difference

        reporting.write_page(report, page_of_difference(found, reporting.command_line()))
    sys.exit(0 if found.is_empty else _DIFFERENT)


def _lines(found: Difference, top: int) -> Iterator[str]:
    for label, side in (("A", found.a), ("B", found.b)):
        step = "" if side["step"] is None else f", step {side['step']:,}"
        yield f"{label}: {side['path']} ({side['title']}{step})"
    for note in found.notes:
        yield f"note: {note}"
    yield _summary(found)
    yield from _changed(found.changed[:top])
    yield from _rest(found.changed, top, "changed")
    lists: tuple[tuple[str, Mapping[str, object]], ...] = (
        ("removed", found.removed),
        ("added", found.added),
        ("reshaped", {name: f"{a} -> {b}" for name, (a, b) in found.reshaped.items()}),
        ("recast", {name: f"{a} -> {b}" for name, (a, b) in found.recast.items()}),
    )
    for word, tensors in lists:
        for name, what in list(tensors.items())[:top]:
            yield f"{word}: {name} {what}"
        yield from _rest(tensors, top, word)


def _summary(found: Difference) -> str:
    compared = f"{counted(found.compared, 'tensor')} compared, {found.elements:,} elements: "
    counts = {
        "changed": found.changed,
        "recast": found.recast,
        "reshaped": found.reshaped,
        "added": found.added,
        "removed": found.removed,
    }
    if not found.is_empty:
        return compared + ", ".join(f"{len(held)} {word}" for word, held in counts.items() if held)
    exact = not (found.rtol or found.atol)
    same = "the same, bit for bit" if exact else f"within rtol {found.rtol:g}, atol {found.atol:g}"
    return compared + same


def _changed(tensors: Sequence[TensorDifference]) -> Iterator[str]:
    """A table with the name in the last column, so that long names move no column."""
    if not tensors:
        return
    heads = ("relative", "max |a-b|", "mean |a-b|", "cosine", "elements")
    rows = [heads, *map(_row, tensors)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    names = ["tensor", *(_name(tensor) for tensor in tensors)]
    for row, name in zip(rows, names, strict=True):
        yield "  ".join([*(c.rjust(w) for c, w in zip(row, widths, strict=True)), name])


def _row(tensor: TensorDifference) -> tuple[str, ...]:
    return (
        "-" if tensor.relative is None else f"{tensor.relative:.3g}",
        f"{tensor.max_abs:.3g}",
        f"{tensor.mean_abs:.3g}",
        "-" if tensor.cosine is None else f"{tensor.cosine:.6f}",
        f"{tensor.changed:,} of {tensor.numel:,}",
    )


def _name(tensor: TensorDifference) -> str:
    odd = [
        f"{count:,} {word} in {side}"
        for word, counts in (("NaN", tensor.nan), ("Inf", tensor.inf))
        for side, count in zip("AB", counts, strict=True)
        if count
    ]
    return f"{tensor.name}  ({', '.join(odd)})" if odd else tensor.name


def _rest(tensors: Sequence[object] | Mapping[str, object], top: int, word: str) -> Iterator[str]:
    if len(tensors) > top:
        yield f"and {len(tensors) - top:,} more {word}; --top lists them"
