"""Owns the traces of a run that was killed while it replaced an output.

A file system that cannot exchange two directories needs two renames: the old output gets another name, then
the new one gets its name. A kill between them leaves neither under its name, and both whole.
"""

from __future__ import annotations

from pathlib import Path

# Between the name of the output and some random digits.
OLD, PARTIAL, NEW = ".replaced-", ".partial-", "complete-"


def how_to_restore(output: Path) -> str | None:
    """How to go on where an output is absent because a run was killed; None where no run left it so.

    Args:
        output: the path that does not exist.
    """
    final = output.resolve()
    if final.exists() or not final.parent.is_dir():
        return None
    beside = sorted(final.parent.iterdir())
    old = [path for path in beside if path.name.startswith(f"{final.name}{OLD}")]
    if not old:
        return None
    new = [
        inner
        for path in beside
        if path.name.startswith(f"{final.name}{PARTIAL}") and path.is_dir()
        for inner in sorted(path.iterdir())
        if inner.name.startswith(NEW)
    ]
    text = f"A run was stopped while it replaced this output. The old output is whole: mv {old[-1]} {final}"
    if new:
        text += f". The new output is whole, too: mv {new[-1]} {final}"
    return f"{text}. Delete what you do not keep."
