"""Owns command lines that a person can copy into a shell, whatever is in their words."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from ckpt_tools.text import printable


def shell_line(words: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """A command line for a POSIX shell; characters that are not printable are written as bash's escapes.

    Args:
        words: the program and its arguments.
        environment: variables that are set for it.
    """
    settings = [f"{name}={_word(value)}" for name, value in (environment or {}).items()]
    return " ".join([*settings, *map(_word, words)])


def _word(text: str) -> str:
    if printable(text) == text:
        return shlex.quote(text)
    escaped = (
        f"\\{c}" if c in "\\'" else c if c.isprintable() and c != "#" else _escapes(c) for c in text
    )
    return f"$'{''.join(escaped)}'"


def _escapes(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))
