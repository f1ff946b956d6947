"""A checkpoint as a table of its tensors, for notebooks."""

from __future__ import annotations

from html import escape
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckpt_tools.tensors.checkpoint import Checkpoint

_ROWS = 60


def html_table(checkpoint: Checkpoint) -> str:
    """The facts of the checkpoint and its first tensors, as HTML; names are escaped."""
    facts = [checkpoint.title, f"{len(checkpoint):,} tensors"]
    if checkpoint.step is not None:
        facts.append(f"step {checkpoint.step:,}")
    if checkpoint.world_size is not None:
        facts.append(f"{checkpoint.world_size:,} ranks")
    heads = ("tensor", "kind", "shape", "trained in", "stored in")
    rows = [
        (
            name,
            weight.kind,
            str(list(weight.shape)),
            weight.dtype.name,
            ", ".join(copy.dtype.name for copy in (weight.master, weight.model) if copy),
        )
        for name, weight in islice(checkpoint.weights.items(), _ROWS)
    ]
    more = len(checkpoint.weights) - len(rows)
    lines = [
        f"<p><b>{escape(str(checkpoint.location.directory))}</b><br>{escape(', '.join(facts))}</p>",
        f"<table><thead>{_row('th', heads)}</thead><tbody>",
        *(_row("td", row) for row in rows),
        "</tbody></table>",
    ]
    if more > 0:
        lines.append(f"<p>and {more:,} more</p>")
    return "\n".join(lines)


def _row(tag: str, cells: tuple[str, ...]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"
