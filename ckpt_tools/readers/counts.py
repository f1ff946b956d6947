"""Owns the limit on counts that a checkpoint states: ranks, experts, parts.

Readers enumerate what is counted, so a count beyond any training run must stop before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ckpt_tools.errors import DamagedCheckpoint

MOST = 1 << 20


def counted(count: object, of: str, path: Path) -> int:
    """A count, after a check of its type and range.

    Args:
        count: the count.
        of: what is counted, such as ``ranks``.
        path: the file or directory that states it.

    Raises:
        DamagedCheckpoint: it is no whole number, negative, or beyond any training run.
    """
    if type(count) is int and 0 <= count <= MOST:
        return count
    shown = repr(count) if isinstance(count, int | float) and abs(count) < 1e30 else type(count)
    raise DamagedCheckpoint(
        f"it states {shown} {of}, which no training run has",
        path=path,
        hint="The file is damaged or was edited. Copy it anew from where it was written.",
    )


def counted_all(counts: Sequence[object], of: str, path: Path) -> list[int]:
    """Several counts, after a check of each and of their sum; see :func:`counted`."""
    checked = [counted(count, of, path) for count in counts]
    counted(sum(checked), of, path)
    return checked
