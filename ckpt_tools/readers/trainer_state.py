"""Owns the Transformers Trainer's files beside a checkpoint of any format: its state and random states.

They give facts for the report only, so a file that cannot be read counts as absent.

Source: ``transformers/trainer_callback.py`` (``TrainerState``), ``trainer.py`` (``_save_rng_state``).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from ckpt_tools.storage.regular import content_of

_FILE = "trainer_state.json"
# Each rank writes one. The file of a single process has no number.
_RANDOM = re.compile(r"rng_state(?:_(\d+))?\.pth")


def is_trainer_directory(directory: Path) -> bool:
    """Whether the Trainer wrote a checkpoint to ``directory``."""
    return (directory / _FILE).is_file()


def trainer_step(directory: Path) -> int | None:
    """Number of optimizer steps, if the Trainer recorded it."""
    try:
        step = json.loads(content_of(directory / _FILE).decode())["global_step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def trainer_world_size(directory: Path) -> int | None:
    """Number of ranks, if the Trainer wrote their random states."""
    if not is_trainer_directory(directory):
        return None
    matches = [_RANDOM.fullmatch(path.name) for path in directory.iterdir()]
    return max((int(match[1] or 0) + 1 for match in matches if match), default=None)
