"""Owns how text from a checkpoint is shown: names of files and tensors, messages of libraries; and sizes.

Such text may hold characters that a terminal, a log, a workflow or Markdown interprets. Everything that is
printed or written for people goes through :func:`printable`, and :func:`neutral` or :func:`markdown`.
"""

from __future__ import annotations

import re

# GitHub's and Azure's runners carry out what follows, anywhere in a line.
_COMMANDS = re.compile(r"##(?=\[|vso\[)")
_MARKDOWN = re.compile(r"([\\`*\[\]<>&|!~$#])")


def printable(text: str) -> str:
    """Text with the characters that a terminal, a log or XML interprets or refuses as escapes."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return _COMMANDS.sub("# #", text) if "##" in text else text


def neutral(line: str) -> str:
    """A line that is not a workflow command of GitHub, which begins with two colons, also behind spaces."""
    return line.replace("::", ": :", 1) if line.lstrip().startswith("::") else line


def markdown(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no links by brackets, no HTML, on one line."""
    return _MARKDOWN.sub(r"\\\1", printable(text))


def markdown_code(text: str) -> str:
    """A name as code in Markdown, or as text where it holds what ends code or a table's cell."""
    return (
        markdown(text) if re.search(r"[`|\\]", text) or not text.strip() else f"`{printable(text)}`"
    )


def nbytes_text(nbytes: float) -> str:
    """Bytes for a person, in decimal units as ``--max-shard-size`` takes them."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"
