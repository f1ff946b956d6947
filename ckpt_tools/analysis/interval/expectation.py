"""Owns the expected cost of saving every N steps, computed exactly, and the estimates of Young and Daly.

The model. A run is ``steps`` steps of equal length, cut into segments of N steps; the last is shorter where
N does not divide the run. Each segment ends with a save, also the last one: its save is the result of the
run. So there are ``ceil(steps / N)`` saves, and training waits for each. Failures are a Poisson process with
the constant rate 1/M: in work, in saves and in restarts. A failure loses everything since the end of the last
save, including an unfinished save. Then a restart of length R follows. A failed restart is repeated. Then the
segment starts again. The run starts without a restart.

A segment of work w and save d, a = w + d, then takes an expected ``M e^(R/M) (e^(a/M) - 1)``: Daly's
complete model (2006, section 3), but with whole segments and the true length of the last. It is the sum of

    a                               the work and the save
    M (e^(a/M) - 1 - a/M)           lost: work and saves that failures destroy
    M (e^(R/M) - 1)(e^(a/M) - 1)    restarts: e^(a/M) - 1 failures of the segment, each followed by one

and the expected number of failures is the expected wall time divided by M (Wald's identity).

Sources: Young 1974; Daly 2006. Durations are in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ckpt_tools.analysis.interval.quantities import seconds
from ckpt_tools.errors import UsageError

_MOST_STEPS = 10**10


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """A training run. The constructor checks its values.

    Attributes:
        steps: optimizer steps, at least 1 and at most 10^10.
        step_time: seconds of one step.
        save_time: seconds that training waits for one save.
        mtbf: mean seconds between two failures of the whole job.
        restart_time: seconds from a failure to the next step: detection, a new machine, loading.
    """

    steps: int
    step_time: float
    save_time: float
    mtbf: float
    restart_time: float = 0.0

    def __post_init__(self) -> None:
        check_count("--steps", self.steps, _MOST_STEPS)
        seconds("--step-time", self.step_time)
        seconds("--save-time", self.save_time)
        seconds("--mtbf", self.mtbf)
        seconds("--restart-time", self.restart_time, zero=True)

    @property
    def work_seconds(self) -> float:
        """Time of the run without saves and failures."""
        return self.steps * self.step_time

    def saves(self, interval: int) -> int:
        """Number of saves, the final one included."""
        return -(-self.steps // interval)


@dataclass(frozen=True, slots=True)
class Cost:
    """The expected cost of saving every ``interval`` steps. Durations are in seconds.

    A value that is too large for a float is ``math.inf``: such a run would never end.

    Attributes:
        interval: steps between saves.
        interval_seconds: their work.
        saves: number of saves, the final one included.
        work_seconds: the run without saves and failures.
        save_seconds: all saves.
        lost_seconds: work and saves that failures destroy.
        restart_seconds: restarts, including failed ones.
        failures: number of failures.
        loss_per_failure_seconds: the part of ``lost_seconds`` of one failure in a segment.
    """

    interval: int
    interval_seconds: float
    saves: int
    work_seconds: float
    save_seconds: float
    lost_seconds: float
    restart_seconds: float
    failures: float
    loss_per_failure_seconds: float

    @property
    def cost_seconds(self) -> float:
        """Saves, lost time and restarts."""
        return self.save_seconds + self.lost_seconds + self.restart_seconds

    @property
    def total_seconds(self) -> float:
        """Wall time of the run."""
        return self.work_seconds + self.cost_seconds


def expected_cost(run: TrainingRun, interval: int) -> Cost:
    """The expected cost of saving every ``interval`` steps, exact in the model above.

    Args:
        run: the run.
        interval: steps between saves, from 1 to ``run.steps``.

    Raises:
        UsageError: the interval is less than a step or longer than the run.
    """
    check_count("the interval", interval, run.steps, "the steps of the run")
    saving, failed, lost, restarts = _parts(run, interval)
    share = lost / failed if math.isfinite(failed) else run.mtbf
    return Cost(
        interval=interval,
        interval_seconds=interval * run.step_time,
        saves=run.saves(interval),
        work_seconds=run.work_seconds,
        save_seconds=saving,
        lost_seconds=lost,
        restart_seconds=restarts,
        failures=(run.work_seconds + saving + lost + restarts) / run.mtbf,
        loss_per_failure_seconds=share,
    )


def _parts(run: TrainingRun, interval: int) -> tuple[float, float, float, float]:
    """Seconds of saves, failures during segments, seconds lost, seconds of restarts."""
    whole, rest = divmod(run.steps, interval)
    failed = excess = 0.0
    for count, steps in ((whole, interval), (1, rest)):
        if steps:
            exposure = (steps * run.step_time + run.save_time) / run.mtbf
            failed += count * _expm1(exposure)
            excess += count * _excess(exposure)
    saving = run.saves(interval) * run.save_time
    # Zero times an infinite number of failures is NaN.
    a_restart = run.mtbf * _expm1(run.restart_time / run.mtbf)
    return saving, failed, run.mtbf * excess, failed * a_restart if a_restart else 0.0


def _expm1(x: float) -> float:
    """``e^x - 1``; infinite if a float cannot hold it."""
    try:
        return math.expm1(x)
    except OverflowError:
        return math.inf


def _excess(x: float) -> float:
    """``e^x - 1 - x`` for ``x > 0``, with full precision also for small ``x``."""
    if x > 0.5:
        return _expm1(x) - x if x < 1e300 else math.inf
    term, total, order = x * x / 2, 0.0, 2
    while total + term != total:
        total += term
        order += 1
        term *= x / order
    return total


def best_interval(run: TrainingRun) -> int:
    """The interval of the least expected cost, in whole steps.

    With a given number of saves n the cost is a sum of one convex function over n segments of a given
    total, so the most even division is the cheapest: ``N = ceil(steps / n)``, the smallest interval with
    n saves. There are fewer than ``2 sqrt(steps)`` such N, and all of them are tried.

    Raises:
        UsageError: one step and its save are much longer than the time between failures, so the run
            never ends.
    """
    best, least = 0, math.inf
    for interval in _evenest(run.steps):
        saving, _, lost, restarts = _parts(run, interval)
        if saving + lost + restarts < least:
            best, least = interval, saving + lost + restarts
    if not best:
        raise UsageError(
            "--mtbf: the run never ends: one step, its save and a restart are hundreds of times as long "
            "as the mean time between failures",
            hint="Check the units of --mtbf, --step-time, --save-time and --restart-time.",
        )
    return best


def _evenest(steps: int) -> Iterator[int]:
    """The distinct values of ``ceil(steps / n)``, falling from ``steps`` to 1."""
    interval = steps
    yield interval
    while interval > 1:
        saves = -(-steps // (interval - 1))
        interval = -(-steps // saves)
        yield interval


def young_seconds(run: TrainingRun) -> float:
    """Young's first-order optimum of the work between two saves: ``sqrt(2 d M)``, in seconds."""
    return math.sqrt(2 * run.save_time * run.mtbf)


def daly_seconds(run: TrainingRun) -> float:
    """Daly's higher-order optimum of the work between two saves, in seconds.

    ``sqrt(2 d M) [1 + sqrt(d / 2M) / 3 + (d / 2M) / 9] - d`` for ``d < 2M``, else ``M``.
    """
    share = run.save_time / (2 * run.mtbf)
    if share >= 1:
        return run.mtbf
    return young_seconds(run) * (1 + math.sqrt(share) / 3 + share / 9) - run.save_time


def whole_steps(run: TrainingRun, seconds: float) -> int:
    """The nearest whole number of steps, at least one and at most the whole run."""
    return min(max(math.floor(seconds / run.step_time + 0.5), 1), run.steps)


def check_count(option: str, value: int, most: int | None = None, limit: str = "") -> None:
    """Raise UsageError unless ``value`` is a whole number from 1 to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{option}: must be a whole number above zero, not {value!r}")
    if most is not None and value > most:
        raise UsageError(f"{option}: {value:,} is more than {limit or 'can be'} ({most:,})")
