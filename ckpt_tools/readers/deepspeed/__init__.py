"""The reader of DeepSpeed: ``global_stepN`` directories of every ZeRO stage."""

from __future__ import annotations

from ckpt_tools.readers.deepspeed.reader import NAME, find, read

__all__ = ["NAME", "find", "read"]
