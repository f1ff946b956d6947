"""Owns the count of what this process received from stores and sent to them.

It counts contents of files. Listings, headers, and answers that ended early are not counted.
"""

from __future__ import annotations

import threading

_lock = threading.Lock()
_carried = 0


def carry(nbytes: int) -> None:
    """Add the bytes of a request that has ended well."""
    global _carried
    with _lock:
        _carried += nbytes


def carried() -> int:
    """The bytes until now; 0 in a process that uses no store."""
    return _carried
