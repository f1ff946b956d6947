"""The expected cost of an interval: by hand, by simulation, by trying every interval, at the limits."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ckpt_tools.analysis.interval import TrainingRun, expectation, expected_cost
from ckpt_tools.analysis.interval.expectation import (
    best_interval,
    daly_seconds,
    whole_steps,
    young_seconds,
)
from ckpt_tools.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Steps of 12 s, saves of 90 s, a failure every 9 h.
RUN = TrainingRun(20_000, 12.0, 90.0, 32_400.0)


# -- by hand: the figures of docs/interval.md ------------------------------------------------------


def test_young_by_hand() -> None:
    """Sqrt(2 x 90 x 32,400) = sqrt(5,832,000) = 2,414.95 s; / 12 = 201.2."""
    assert young_seconds(RUN) == pytest.approx(2414.95, abs=0.01)
    assert whole_steps(RUN, young_seconds(RUN)) == 201


def test_daly_by_hand() -> None:
    """With 90 / 64,800 = 1 / 720: its root is 0.0372678.

    2,414.953 x (1 + 0.0124226 + 0.0001543) - 90 = 2,445.326 - 90 = 2,355.33 s; / 12 = 196.3.
    """
    assert daly_seconds(RUN) == pytest.approx(2355.33, abs=0.01)
    assert whole_steps(RUN, daly_seconds(RUN)) == 196


def test_the_expectation_by_hand() -> None:
    """Every 200 steps: 100 segments of 2,400 + 90 s; x = 2,490 / 32,400 = 0.07685185.

    x^2 / 2 + x^3 / 6 + x^4 / 24 + x^5 / 120 = 0.00295310 + 0.00007565 + 0.00000145 + 0.00000002
    = 0.00303023: of 32,400 s, 98.18 s a segment are lost, 9,818 s in all. 240,000 s of work + 9,000 s of
    saves + 9,818 s = 258,818 s; / 32,400 = 7.988 failures. Each undoes 9,818 s / (100 x (0.07685185 +
    0.00303023)) = 1,229 s.
    """
    found = expected_cost(RUN, 200)

    assert found.saves == 100
    assert (found.work_seconds, found.save_seconds) == (240_000, 9_000)
    assert found.lost_seconds == pytest.approx(9_818, abs=0.5)
    assert found.restart_seconds == 0
    assert found.total_seconds == pytest.approx(258_818, abs=0.5)
    assert found.failures == pytest.approx(7.988, abs=0.001)
    assert found.loss_per_failure_seconds == pytest.approx(1229, abs=0.5)


def test_restarts_by_hand() -> None:
    """Two segments of 6 + 4 s, failures every 10 s, restarts of 10 s: x = 1 for either.

    A segment fails e - 1 = 1.71828 times before it succeeds, and a restart takes 10 (e - 1) = 17.1828 s:
    2 x 1.71828 x 17.1828 = 59.0498 s of restarts. Lost are 2 x 10 x (e - 2) = 14.3656 s. In all
    2 x 10 x e x (e - 1) = 93.4155 s.
    """
    found = expected_cost(TrainingRun(12, 1.0, 4.0, 10.0, 10.0), 6)

    assert found.restart_seconds == pytest.approx(59.0498, abs=1e-4)
    assert found.lost_seconds == pytest.approx(14.3656, abs=1e-4)
    assert found.total_seconds == pytest.approx(93.4155, abs=1e-4)
    assert found.failures == pytest.approx(9.34155, abs=1e-5)


def test_the_last_segment_is_as_long_as_it_is() -> None:
    """Every 7 of 20 steps: segments of 7, 7 and 6 steps, three saves."""
    run = TrainingRun(20, 1.0, 2.0, 10.0)

    found = expected_cost(run, 7)

    assert found.saves == 3
    by_hand = 2 * 10 * math.expm1(0.9) + 10 * math.expm1(0.8)
    assert found.total_seconds == pytest.approx(by_hand, rel=1e-14)


# -- by simulation ---------------------------------------------------------------------------------


class Simulated(NamedTuple):
    """What many runs took, in seconds, and how often each failed."""

    total: NDArray[np.float64]
    restarts: NDArray[np.float64]
    failures: NDArray[np.int64]


def simulate(run: TrainingRun, interval: int, seed: int, runs: int = 40_000) -> Simulated:
    """Many runs at once, step by step, by a clock and the instants of failures alone."""
    random = np.random.default_rng(seed)
    clock, restarts = np.zeros(runs), np.zeros(runs)
    next_failure = random.exponential(run.mtbf, runs)
    failures, done, saved = (np.zeros(runs, np.int64) for _ in range(3))
    restarting = np.zeros(runs, bool)
    while (live := np.flatnonzero(saved < run.steps)).size:
        at_rest = restarting[live]
        full = (done[live] == run.steps) | (done[live] - saved[live] == interval)
        saving = full & ~at_rest
        lasting = np.where(at_rest, run.restart_time, np.where(full, run.save_time, run.step_time))
        start = clock[live]
        fails = next_failure[live] < start + lasting
        clock[live] = np.where(fails, next_failure[live], start + lasting)
        restarts[live] += np.where(at_rest, clock[live] - start, 0)
        saved[live] = np.where(saving & ~fails, done[live], saved[live])
        done[live] = np.where(fails, saved[live], done[live] + ~(at_rest | full))
        restarting[live] = fails
        hit = live[fails]
        failures[hit] += 1
        next_failure[hit] += random.exponential(run.mtbf, hit.size)
    return Simulated(clock, restarts, failures)


SIMULATIONS = {
    "even": (TrainingRun(24, 1, 2, 15), 6),
    "the last segment is shorter": (TrainingRun(25, 1, 0.5, 12), 7),
    "a save after each step": (TrainingRun(12, 3, 1, 20), 1),
    "one save": (TrainingRun(14, 1, 1, 9), 14),
    "a save takes longer than the time between failures": (TrainingRun(6, 1, 8, 7), 3),
    "restarts": (TrainingRun(20, 1, 3, 10, 4), 5),
    "restarts that fail, and a shorter last segment": (TrainingRun(23, 1, 2, 8, 9), 10),
    "rare failures": (TrainingRun(30, 2, 1, 400, 30), 8),
}


@pytest.mark.parametrize("case", SIMULATIONS)
def test_a_simulation_agrees_with_the_expectation(case: str) -> None:
    run, interval = SIMULATIONS[case]
    found = expected_cost(run, interval)
    simulated = simulate(run, interval, seed=list(SIMULATIONS).index(case))

    saves = -(-run.steps // interval) * run.save_time
    lost = simulated.total - simulated.restarts - run.steps * run.step_time - saves
    for sample, expected in (
        (simulated.total, found.total_seconds),
        (simulated.restarts, found.restart_seconds),
        (lost, found.lost_seconds),
        (simulated.failures, found.failures),
    ):
        error = sample.std(ddof=1) / math.sqrt(sample.size)
        assert error < 0.02 * expected or expected == 0
        assert abs(sample.mean() - expected) <= 3.5 * error


def test_the_simulation_prefers_the_best_interval_to_half_and_twice() -> None:
    run = TrainingRun(60, 1, 3, 40, 5)
    best = best_interval(run)

    at_best, at_half, at_double = (
        simulate(run, interval, seed=9).total for interval in (best, best // 2, 2 * best)
    )

    assert at_best.mean() < at_half.mean()
    assert at_best.mean() < at_double.mean()


# -- every interval tried --------------------------------------------------------------------------


def exact(run: TrainingRun, interval: int) -> Decimal:
    """Expected wall time to 60 digits, by Daly's formula summed over the segments one after the other."""
    with localcontext() as context:
        context.prec = 60
        mtbf, left, total = Decimal(run.mtbf), run.steps, Decimal(0)
        while left:
            steps = min(interval, left)
            segment = steps * Decimal(run.step_time) + Decimal(run.save_time)
            total += (segment / mtbf).exp() - 1
            left -= steps
        return mtbf * (Decimal(run.restart_time) / mtbf).exp() * total


def durations(least: float, most: float) -> st.SearchStrategy[float]:
    return st.floats(math.log(least), math.log(most)).map(math.exp)


RUNS = st.builds(
    TrainingRun,
    steps=st.integers(1, 60),
    step_time=durations(0.1, 50),
    save_time=durations(0.1, 200),
    mtbf=durations(5, 1e7),
    restart_time=st.just(0.0) | durations(0.1, 200),
)


@given(RUNS, st.data())
def test_an_expectation_is_exact(run: TrainingRun, data: st.DataObject) -> None:
    interval = data.draw(st.integers(1, run.steps))
    found, truth = expected_cost(run, interval), exact(run, interval)

    if truth > Decimal("1e300"):
        return
    assert found.total_seconds == pytest.approx(float(truth), rel=1e-12)
    surplus = float(truth - run.steps * Decimal(run.step_time))
    assert found.cost_seconds == pytest.approx(surplus, rel=1e-12)


@given(RUNS)
def test_no_interval_costs_less_than_the_best(run: TrainingRun) -> None:
    costs = {interval: exact(run, interval) for interval in range(1, run.steps + 1)}
    least = min(costs.values())
    assume(least < Decimal("1e300"))

    best = best_interval(run)

    # What a float cannot tell apart may be either.
    work = run.steps * Decimal(run.step_time)
    assert costs[best] - least <= (least - work) * Decimal("1e-14")


@pytest.mark.parametrize(
    ("run", "best"),
    [
        (RUN, 200),
        (TrainingRun(20_011, 12, 90, 32_400), None),
        (TrainingRun(1_000_000, 0.25, 30, 7_200, 600), None),
        (TrainingRun(999_983, 1, 500, 900), None),
        (TrainingRun(300_000, 1, 60, 1e9), None),
        (TrainingRun(1, 1, 1, 1), 1),
        (TrainingRun(2, 1, 1, 1e6), 2),
    ],
    ids=lambda value: f"{value.steps}-steps" if isinstance(value, TrainingRun) else "",
)
def test_the_best_of_every_interval_is_found(run: TrainingRun, best: int | None) -> None:
    every = np.arange(1, run.steps + 1)
    whole, rest = np.divmod(run.steps, every)
    with np.errstate(over="ignore"):
        full = np.expm1((every * run.step_time + run.save_time) / run.mtbf)
        last = np.where(rest, np.expm1((rest * run.step_time + run.save_time) / run.mtbf), 0)
        totals = whole * full + last

    found = best_interval(run)

    assert totals[found - 1] <= totals.min() * (1 + 1e-13)
    assert best in (None, found)


def test_of_ten_million_steps_a_few_thousand_intervals_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[int] = []
    parts = expectation._parts

    def counted(run: TrainingRun, interval: int) -> tuple[float, float, float, float]:
        tried.append(interval)
        return parts(run, interval)

    monkeypatch.setattr(expectation, "_parts", counted)
    found = best_interval(TrainingRun(10_000_000, 1.3, 45, 14_400))
    assert len(tried) < 2 * math.sqrt(10_000_000)

    assert 800 < found < 900  # Young: sqrt(2 x 45 x 14,400) / 1.3 = 875.7


# -- the formulas ----------------------------------------------------------------------------------


def continuous_optimum(save: float, mtbf: float) -> float:
    """Work between saves that minimises (e^((w + d) / M) - 1) / w, by bisection of its derivative."""
    low, high = 0.0, mtbf
    for _ in range(200):
        middle = (low + high) / 2
        exponent = (middle + save) / mtbf
        if middle / mtbf < -math.expm1(-exponent):
            low = middle
        else:
            high = middle
    return low


def test_daly_is_young_with_two_more_orders() -> None:
    """Each tenth of sqrt(d / 2M) takes Young's error down tenfold and Daly's a thousandfold."""
    errors = []
    for save in (200.0, 2.0):
        run = TrainingRun(1, 1.0, save, 10_000.0)
        truth = continuous_optimum(save, run.mtbf)
        errors.append([abs(f(run) / truth - 1) for f in (young_seconds, daly_seconds)])

    (young, daly), (young_after, daly_after) = errors
    assert 8 < young / young_after < 12
    assert 700 < daly / daly_after < 1300
    assert daly < young / 300


@pytest.mark.parametrize("save", [2_000.0, 5_000.0, 1e9])
def test_daly_is_the_mtbf_where_saves_are_at_least_twice_as_long(save: float) -> None:
    assert daly_seconds(TrainingRun(1, 1.0, save, 1_000.0)) == 1_000.0


def test_an_estimate_is_the_nearest_number_of_steps_that_the_run_has() -> None:
    run = TrainingRun(100, 10.0, 1.0, 1.0)

    assert [whole_steps(run, s) for s in (0.1, 14.9, 15.1, 996.0, 1e9)] == [1, 1, 2, 100, 100]


# -- what must hold of any run ---------------------------------------------------------------------


@given(RUNS, st.data())
def test_what_is_worse_costs_more(run: TrainingRun, data: st.DataObject) -> None:
    interval = data.draw(st.integers(1, run.steps))
    cost = expected_cost(run, interval).cost_seconds
    assume(cost < 1e300)

    def changed(**changes: float) -> float:
        fields = {name: getattr(run, name) for name in run.__dataclass_fields__}
        return expected_cost(TrainingRun(**{**fields, **changes}), interval).cost_seconds

    assert changed(save_time=run.save_time * 1.5) > cost
    assert changed(mtbf=run.mtbf / 1.5) > cost
    assert changed(restart_time=run.restart_time + 1) > cost
    assert changed(step_time=run.step_time * 1.5) > cost


@given(st.integers(1, 1000), durations(1e-3, 1e3), durations(1e-3, 1e3), st.data())
def test_without_failures_the_cost_is_that_of_the_saves(
    steps: int, step_time: float, save_time: float, data: st.DataObject
) -> None:
    run = TrainingRun(steps, step_time, save_time, 1e15)
    interval = data.draw(st.integers(1, steps))

    found = expected_cost(run, interval)

    assert found.save_seconds == math.ceil(steps / interval) * save_time
    assert found.cost_seconds == found.save_seconds + found.lost_seconds
    assert 0 < found.lost_seconds < 0.01
    assert found.failures < 1e-8
    assert best_interval(run) == steps


def test_a_tiny_loss_keeps_its_digits() -> None:
    """To first order a segment a loses a^2 / 2M; the terms that cancel are 10^24 times as large."""
    found = expected_cost(TrainingRun(1, 1e-9, 1e-9, 1e15), 1)

    assert found.lost_seconds == pytest.approx((2e-9) ** 2 / 2e15, rel=1e-12)


@pytest.mark.parametrize("interval", [0, 20_001])
def test_an_interval_that_the_run_does_not_have_has_no_cost(interval: int) -> None:
    with pytest.raises(UsageError, match="the interval"):
        expected_cost(RUN, interval)


def test_a_run_is_valid_once_built() -> None:
    with pytest.raises(UsageError, match="--mtbf"):
        TrainingRun(1, 1.0, 1.0, math.nan)
    with pytest.raises(UsageError, match="--save-time"):
        TrainingRun(1, 1.0, 0.0, 1.0)
