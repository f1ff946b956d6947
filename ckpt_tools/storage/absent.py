"""Owns the next step for a path that does not exist: the name that was meant, or what is there."""

from __future__ import annotations

import difflib
from pathlib import Path

from ckpt_tools.errors import listed
from ckpt_tools.storage.folders import entries_of


def what_is_there(path: Path) -> str:
    """The closest path that exists, or the content of the folder above the first missing name.

    Args:
        path: a path that does not exist.
    """
    missing = [*path.parts]
    above = next((parent for parent in path.parents if parent.exists()), None)
    if above is None:
        return "Check the path."
    missing = missing[len(above.parts) :]
    if not above.is_dir():
        return f"{above} is a file. Check the path."
    names = [entry.name for entry in entries_of(above) if not entry.name.startswith(".")]
    where = "The current directory" if above == Path() else f"{above}"
    if not names:
        return f"{where} is empty. Check the path."
    holds = f"{where} holds: {listed(names, 8)}."
    close = _close(missing[0], names)
    if close is None:
        return holds
    meant = above.joinpath(close, *missing[1:])
    return f"Did you mean {meant if meant.exists() else above / close}? {holds}"


def _close(name: str, names: list[str]) -> str | None:
    by_case = {each.lower(): each for each in names}
    found = difflib.get_close_matches(name.lower(), by_case, 1, cutoff=0.6)
    return by_case[found[0]] if found else None
