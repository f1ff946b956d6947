"""Owns the one warning of torch about memory that must not be written.

torch warns once in a process, when elements in such memory become a tensor. Here they are only read.
"""

from __future__ import annotations

import threading
import warnings

_lock = threading.Lock()
_was_given = False


def hide_warning() -> None:
    """Let torch give the warning where nobody sees it."""
    global _was_given
    with _lock:
        if not _was_given:
            import torch

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.frombuffer(b"\0", dtype=torch.uint8)
            _was_given = True
