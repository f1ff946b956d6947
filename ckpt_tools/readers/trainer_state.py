"""What the Transformers Trainer records beside a checkpoint of any kind: its state, and random states.

Only facts for the report are taken from it, so a file that cannot be read is none. Knows no weights.

Source: ``transformers/trainer_callback.py`` (``TrainerState``), ``trainer.py`` (``_save_rng_state``).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

_FILE = "trainer_state.json"
# Each rank writes one; of a single process it has no number.
_RANDOM = re.compile(r"rng_state(?:_(\d+))?\.pth")


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


def trainer_world_size(directory: Path) -> int | None:
    """Number of ranks, where the Trainer left their random states."""
    if not is_trainer_directory(directory):
        return None
    matches = [_RANDOM.fullmatch(path.name) for path in directory.iterdir()]
    return max((int(match[1] or 0) + 1 for match in matches if match), default=None)
