"""Owns the reading of a small file as a whole: a config, an index, a template.

A pipe or a device in its place has no end, or waits for another process. So only regular files are read.
"""

from __future__ import annotations

import errno
from pathlib import Path


def content_of(path: Path) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.read_bytes()
