"""One torch file a rank: the checkpoints of verl, and of Accelerate and torch without DCP."""

from __future__ import annotations

from ckpt_tools.readers.rank_files.reader import NAME, find, read

__all__ = ["NAME", "find", "read"]
