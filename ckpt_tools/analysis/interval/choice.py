"""Owns the public function: the best interval of a run, the estimates of Young and Daly, disk, and remarks.

The arithmetic is in ``expectation``.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from ckpt_tools.analysis.interval.expectation import (
    Cost,
    TrainingRun,
    best_interval,
    check_count,
    daly_seconds,
    expected_cost,
    whole_steps,
    young_seconds,
)
from ckpt_tools.analysis.interval.quantities import duration_text, nbytes, seconds
from ckpt_tools.analysis.interval.saved_size import SavedSize, saved_size
from ckpt_tools.errors import UsageError

_CURVE_REACH = 16
_CURVE_POINTS_A_DOUBLING = 8


@dataclass(frozen=True, slots=True)
class Estimate:
    """An interval by a formula.

    Attributes:
        seconds: the work between two saves, from the formula.
        cost: the cost of the nearest whole number of steps, at least one and at most the run.
    """

    seconds: float
    cost: Cost


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes of the checkpoints of a run.

    Attributes:
        all: all of them.
        kept: those that remain with ``keep``; None without it.
        peak: those and one more, until the oldest is removed; None without ``keep``.
    """

    all: int
    kept: int | None
    peak: int | None


@dataclass(frozen=True)
class CheckpointInterval:
    """How often to checkpoint a run.

    Attributes:
        run: the run.
        exact: the interval of the least expected cost.
        half: half of it, rounded up.
        double: twice it, at most the whole run.
        young: by Young's formula.
        daly: by Daly's formula.
        every: an interval to compare, or None.
        curve: costs of intervals around those, for a picture, by rising interval.
        checkpoint_bytes: size of one checkpoint; None if it is not known.
        measured: the checkpoint that was measured, or None.
        keep: number of checkpoints that are kept; None for all.
        remarks: unusual facts.
    """

    run: TrainingRun
    exact: Cost
    half: Cost
    double: Cost
    young: Estimate
    daly: Estimate
    every: Cost | None
    curve: tuple[Cost, ...]
    checkpoint_bytes: int | None
    measured: SavedSize | None
    keep: int | None
    remarks: tuple[str, ...]

    def disk(self, cost: Cost) -> Disk | None:
        """Disk of the run with this interval; None if the size of a checkpoint is not known."""
        size, keep = self.checkpoint_bytes, self.keep
        if size is None:
            return None
        if keep is None:
            return Disk(cost.saves * size, None, None)
        kept, peak = min(cost.saves, keep), min(cost.saves, keep + 1)
        return Disk(cost.saves * size, kept * size, peak * size)

    def extra_seconds(self, cost: Cost) -> float:
        """Extra wall time compared with the best interval."""
        return cost.cost_seconds - self.exact.cost_seconds

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; a number that no float can hold is None."""
        run, measured = self.run, self.measured
        return {
            "run": {
                "steps": run.steps,
                "step_seconds": run.step_time,
                "save_seconds": run.save_time,
                "mtbf_seconds": run.mtbf,
                "restart_seconds": run.restart_time,
                "work_seconds": run.work_seconds,
            },
            "checkpoint": {
                "bytes": self.checkpoint_bytes,
                "path": None if measured is None else str(measured.path),
                "files": None if measured is None else measured.files,
            },
            "keep": self.keep,
            "exact": self._as_json(self.exact),
            "half": self._as_json(self.half),
            "double": self._as_json(self.double),
            "young": {"formula_seconds": self.young.seconds, **self._as_json(self.young.cost)},
            "daly": {"formula_seconds": self.daly.seconds, **self._as_json(self.daly.cost)},
            "every": None if self.every is None else self._as_json(self.every),
            "curve": [self._as_json(cost) for cost in self.curve],
            "remarks": list(self.remarks),
        }

    def _as_json(self, cost: Cost) -> dict[str, Any]:
        disk, extra = self.disk(cost), self.extra_seconds(cost)
        return {
            "interval": cost.interval,
            "interval_seconds": cost.interval_seconds,
            "saves": cost.saves,
            "save_seconds": cost.save_seconds,
            "lost_seconds": _finite(cost.lost_seconds),
            "restart_seconds": _finite(cost.restart_seconds),
            "cost_seconds": _finite(cost.cost_seconds),
            "cost_percent": _finite(100 * cost.cost_seconds / cost.work_seconds),
            "total_seconds": _finite(cost.total_seconds),
            "extra_seconds": _finite(extra),
            "extra_percent": _finite(100 * extra / self.exact.total_seconds),
            "failures": _finite(cost.failures),
            "loss_per_failure_seconds": cost.loss_per_failure_seconds,
            "disk_bytes": None if disk is None else disk.all,
            "disk_kept_bytes": None if disk is None else disk.kept,
            "disk_peak_bytes": None if disk is None else disk.peak,
        }


def checkpoint_interval(
    *,
    steps: int,
    step_time: float | str,
    save_time: float | str,
    mtbf: float | str,
    restart_time: float | str = 0.0,
    checkpoint_size: int | str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    tag: str | None = None,
    keep: int | None = None,
    every: int | None = None,
) -> CheckpointInterval:
    """Find the checkpoint interval of the least expected cost, and the cost of others.

    The cost of saving every N steps is the time of the saves, ``ceil(steps / N)`` of them with the final
    one, and the expected time of lost work and of restarts, for failures that come at random at a constant
    rate. The model is stated in ``ckpt_tools.analysis.interval.expectation``. Sources:
    Young 1974 (CACM 17(9):530), Daly 2006 (FGCS 22(3):303).

    Args:
        steps: optimizer steps of the run.
        step_time: duration of one, in seconds or as text (``12s``, ``250ms``).
        save_time: how long training waits for one save.
        mtbf: mean time between failures of the whole job: that of one node, divided by the number of nodes.
        restart_time: time from a failure to the next step. It changes the cost of every interval by the
            same factor, so the best interval does not depend on it.
        checkpoint_size: bytes of one checkpoint, or text (``140GB``, ``130GiB``).
        checkpoint: a checkpoint to measure instead.
        tag: the name of the checkpoint, if ``checkpoint`` holds several.
        keep: number of checkpoints that are kept. The oldest is removed when a new one is complete.
        every: an interval to compare, in steps.

    Raises:
        UsageError: a number is invalid. The message names its option.
        CkptError: ``checkpoint`` is not a checkpoint, or is damaged.
    """
    run = TrainingRun(
        steps=steps,
        step_time=seconds("--step-time", step_time),
        save_time=seconds("--save-time", save_time),
        mtbf=seconds("--mtbf", mtbf),
        restart_time=seconds("--restart-time", restart_time, zero=True),
    )
    if every is not None:
        check_count("--every", every, steps, "the steps of the run")
    if keep is not None:
        check_count("--keep", keep)
    size, measured = _size(checkpoint_size, checkpoint, tag)
    if keep is not None and size is None:
        raise UsageError(
            "--keep needs the size of a checkpoint, which is not given",
            hint="Pass --checkpoint-size 140GB, or --from with a checkpoint of the run.",
        )
    best = best_interval(run)
    young, daly = (Estimate(s, expected_cost(run, whole_steps(run, s))) for s in _formulas(run))
    exact = expected_cost(run, best)
    return CheckpointInterval(
        run=run,
        exact=exact,
        half=expected_cost(run, -(-best // 2)),
        double=expected_cost(run, min(2 * best, steps)),
        young=young,
        daly=daly,
        every=None if every is None else expected_cost(run, every),
        curve=_curve(run, {best, young.cost.interval, daly.cost.interval, every or best}),
        checkpoint_bytes=size,
        measured=measured,
        keep=keep,
        remarks=_remarks(run, exact),
    )


def _size(
    given: int | str | None, checkpoint: str | os.PathLike[str] | None, tag: str | None
) -> tuple[int | None, SavedSize | None]:
    if given is not None and checkpoint is not None:
        raise UsageError(
            "--checkpoint-size and --from both give the size of a checkpoint",
            hint="Pass one of them.",
        )
    if checkpoint is not None:
        measured = saved_size(checkpoint, tag=tag)
        return measured.nbytes, measured
    if tag is not None:
        raise UsageError(
            "--tag needs --from with a directory of checkpoints",
            hint="Add --from DIR, or leave out --tag.",
        )
    return None if given is None else nbytes("--checkpoint-size", given), None


def _formulas(run: TrainingRun) -> tuple[float, float]:
    return young_seconds(run), daly_seconds(run)


def _curve(run: TrainingRun, marked: set[int]) -> tuple[Cost, ...]:
    """Costs of the marked intervals and of those around them, evenly spaced by ratio."""
    low = max(min(marked) / _CURVE_REACH, 1)
    high = min(max(marked) * _CURVE_REACH, run.steps)
    points = math.ceil(math.log2(high / low) * _CURVE_POINTS_A_DOUBLING)
    between = {round(low * (high / low) ** (i / points)) for i in range(points + 1) if points}
    return tuple(expected_cost(run, interval) for interval in sorted(between | marked))


def _remarks(run: TrainingRun, exact: Cost) -> tuple[str, ...]:
    remarks = []
    mtbf = duration_text(run.mtbf)
    for what, value in (("step", run.step_time), ("save", run.save_time)):
        if value >= run.mtbf:
            remarks.append(
                f"one {what} takes {duration_text(value)}, and there is a failure every {mtbf}: the run "
                "hardly progresses"
            )
    if run.restart_time >= run.mtbf:
        remarks.append(
            f"a restart takes {duration_text(run.restart_time)}, and there is a failure every {mtbf}: most "
            "restarts fail"
        )
    if not remarks and exact.total_seconds > 2 * run.work_seconds:
        share = 100 * run.work_seconds / exact.total_seconds
        remarks.append(f"at best {share:.2g}% of the wall time is work")
    if exact.saves == 1:
        remarks.append(
            "a single save at the end costs least: a second save would cost more than it saves"
        )
    for name, value in zip(("Young", "Daly"), _formulas(run), strict=True):
        text = duration_text(value)
        if value > run.work_seconds and exact.saves > 1:
            remarks.append(
                f"{name}'s interval, {text}, is longer than the run: one save at the end"
            )
        elif value < run.step_time / 2:
            remarks.append(
                f"{name}'s interval, {text}, is much shorter than a step: a save after each step"
            )
    return tuple(remarks)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
