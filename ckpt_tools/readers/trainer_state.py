"""What the Transformers Trainer records beside a checkpoint of any kind: ``trainer_state.json``.

Only facts for the report are taken from it, so a file that cannot be read is none. Knows no weights.

Source: ``transformers/trainer_callback.py`` (``TrainerState``).
"""

from __future__ import annotations

import json
from pathlib import Path

_FILE = "trainer_state.json"


def is_trainer_directory(directory: Path) -> bool:
    """Whether the Trainer wrote a checkpoint here."""
    return (directory / _FILE).is_file()


def trainer_step(directory: Path) -> int | None:
    """Optimizer steps taken, where the Trainer recorded them."""
    try:
        step = json.loads((directory / _FILE).read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) and not isinstance(step, bool) else None
