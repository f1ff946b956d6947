"""``ckpt-tools inspect``."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckpt_tools.cli import options
from ckpt_tools.cli.outcome import reports_errors
from ckpt_tools.cli.text import (
    count_text,
    counted,
    drawn,
    folded,
    nbytes_text,
    print_json,
    printable,
)
from ckpt_tools.errors import listed

if TYPE_CHECKING:
    from rich.console import Console

    from ckpt_tools.analysis.inspection import Group, Inspection

SUMMARY = "What a checkpoint is, from metadata alone."


@click.command("inspect", cls=options.Command)
@click.argument("ckpt", type=options.PATH)
@options.tag
@options.model
@options.source_format
@options.also
@options.json
@options.debug
@reports_errors
def command(
    ckpt: Path,
    tag: str | None,
    model: int | str | None,
    source_format: str | None,
    also: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Show what the checkpoint CKPT is, from metadata alone.

    Shows format, ranks, step, parameters, sizes, frozen, tied and adapter tensors, and problems. If there
    are problems, the exit status is 4.

    \b
    Example:
      ckpt-tools inspect run/global_step500
    """
    from ckpt_tools.analysis.inspection import inspect
    from ckpt_tools.tensors.threads import garbage_kept

    # Metadata that was read is kept for the next step of a command. Here it ends, so nobody collects it.
    with garbage_kept():
        found = inspect(ckpt, tag=tag, model=model, source_format=source_format, also=also)
        if as_json:
            print_json(found.to_json())
        else:
            _show(found)
        gc.freeze()
    if found.problems:
        sys.exit(4)


def _show(found: Inspection) -> None:
    from rich.table import Table
    from rich.text import Text

    rows = list(_rows(found))
    styles = {"problem": "red", "remark": "yellow", "suspicious": "yellow"}
    labels = max(len(label) for label, _ in rows)

    def draw(console: Console) -> None:
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for label, value in rows:
            style = styles.get(label, "")
            # A problem has its next step on a line of its own. Names may hold line ends, too.
            lines = map(printable, value.split("\n") if label == "problem" else [value])
            text = "\n".join(folded(line, console.width - labels - 2) for line in lines)
            table.add_row(label, Text(text, style=style))
        console.print(table)

    click.echo(drawn(draw), nl=False)


def _rows(found: Inspection) -> Iterator[tuple[str, str]]:
    yield "checkpoint", str(found.path)
    yield "format", found.title + (f", {found.framework}" if found.framework else "")
    if found.world_size is not None:
        yield "ranks", str(found.world_size)
    if found.step is not None:
        yield "step", f"{found.step:,}"
    if found.trained is not None:
        yield "parameters", count_text(found.parameters)
        yield "trained in", _dtypes(found)
    weights = f", {nbytes_text(found.weight_bytes)} of them weights" if found.weight_bytes else ""
    yield (
        "on disk",
        f"{nbytes_text(found.bytes_on_disk)} in {counted(found.files, 'file')}{weights}",
    )
    for label, group in (
        ("trained", found.trained),
        ("frozen", found.frozen),
        ("buffers", found.buffers),
    ):
        if group is not None and group.tensors:
            yield label, _group(group)
    if found.tied:
        ties = [f"{alias} = {kept}" for alias, kept in found.tied.items()]
        yield "tied", listed(ties, 8)
    for name, group in (found.adapters or {}).items():
        yield "adapter", f"{name}: {_group(group)}"
    for name, group in (found.attributes or {}).items():
        yield "attribute", f"{name}: {_group(group)}"
    for name in found.numbered:
        yield "name", name
    for prefix, count in (found.wrappers or {}).items():
        yield "wrapper", f"{prefix} in {counted(count, 'name')}, stripped by a conversion"
    if found.output_bytes:
        sizes = [f"{nbytes_text(size)} ({choice})" for choice, size in found.output_bytes.items()]
        yield "output", ", ".join(sizes)
    for remark in found.remarks:
        yield "remark", remark
    for file, named in (found.suspicious or {}).items():
        yield "suspicious", f"{file} names {listed(named, 20)}; nothing of it was run"
    for problem in found.problems:
        yield "problem", problem
    if not found.problems:
        yield "problems", "none seen in the metadata"


def _dtypes(found: Inspection) -> str:
    total = sum((found.dtypes or {}).values()) or 1
    return ", ".join(
        name if count == total else f"{name} {count / total:.1%}"
        for name, count in (found.dtypes or {}).items()
    )


def _group(group: Group) -> str:
    elements = "element" if group.parameters == 1 else "elements"
    return f"{counted(group.tensors, 'tensor')}, {count_text(group.parameters)} {elements}"
