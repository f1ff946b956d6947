"""The reader of torch Distributed Checkpoint: ``.metadata`` and ``__R_N.distcp`` files."""

from __future__ import annotations

from ckpt_tools.readers.dcp.reader import NAME, find, is_own_file, read

__all__ = ["NAME", "find", "is_own_file", "read"]
