"""Owns how the process of a command that reads from a store gets memory from the C library."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from contextlib import suppress

from ckpt_tools.storage.addresses import is_address

# The number of this parameter of mallopt(3).
_M_ARENA_MAX = -8


def share_one_arena(words: Iterable[str]) -> None:
    """Let all threads share one arena of the C library, if any word of the command line has an address.

    Where threads have arenas of their own, each keeps the memory of answers that it freed: here 40 MB in all,
    and more with more processors. Other C libraries than glibc have no such parameter.

    Args:
        words: the words of the command line; an option may be joined with its value.
    """
    if any(is_address(part) for word in words for part in (word, word.partition("=")[2])):
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
