"""Owns how long requests of stores are repeated: one number for the process, set by ``--timeout``."""

from __future__ import annotations

_seconds = 1800.0


def be_patient(seconds: float) -> None:
    """Set how long requests of stores that are opened from now on are repeated."""
    global _seconds
    _seconds = seconds


def patience_seconds() -> float:
    """How long requests are repeated."""
    return _seconds
