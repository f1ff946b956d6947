"""Owns the choice of a checkpoint interval: the expected cost of each interval, the best one, and a plot.

Sources: J. W. Young, "A first order approximation to the optimum checkpoint interval", Communications of
the ACM 17(9):530-531, 1974. J. T. Daly, "A higher order estimate of the optimum checkpoint interval for
restart dumps", Future Generation Computer Systems 22(3):303-312, 2006.
"""

from __future__ import annotations

from ckpt_tools.analysis.interval.choice import (
    CheckpointInterval,
    Disk,
    Estimate,
    checkpoint_interval,
)
from ckpt_tools.analysis.interval.expectation import Cost, TrainingRun, expected_cost
from ckpt_tools.analysis.interval.picture import draw
from ckpt_tools.analysis.interval.saved_size import SavedSize, saved_size

__all__ = [
    "CheckpointInterval",
    "Cost",
    "Disk",
    "Estimate",
    "SavedSize",
    "TrainingRun",
    "checkpoint_interval",
    "draw",
    "expected_cost",
    "saved_size",
]
