"""The answer to how often to checkpoint: what is in it, what is remarked, what is refused."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext

import pytest
from hypothesis import assume, given

import ckpt_tools
from ckpt_tools import CheckpointInterval, checkpoint_interval
from ckpt_tools.analysis.interval import Cost, TrainingRun, expected_cost
from ckpt_tools.errors import UsageError
from tests.analysis.interval.test_expectation import RUN, RUNS


def advised(**changes: object) -> CheckpointInterval:
    """The answer for RUN."""
    given = {"steps": 20_000, "step_time": "12s", "save_time": "90s", "mtbf": "9h"}
    return checkpoint_interval(**{**given, **changes})  # type: ignore[arg-type]


def test_the_estimates_stand_beside_the_best() -> None:
    found = advised()

    assert (found.run, found.exact) == (RUN, expected_cost(RUN, 200))
    assert found.young.seconds == pytest.approx(2414.95, abs=0.01)
    assert found.young.cost == expected_cost(RUN, 201)
    assert found.daly.seconds == pytest.approx(2355.33, abs=0.01)
    assert found.daly.cost == expected_cost(RUN, 196)


def test_half_and_twice_the_best() -> None:
    found = advised()

    assert [c.interval for c in (found.half, found.exact, found.double)] == [100, 200, 400]
    assert found.extra_seconds(found.exact) == 0
    assert found.extra_seconds(found.half) == pytest.approx(
        expected_cost(RUN, 100).total_seconds - expected_cost(RUN, 200).total_seconds
    )


def test_a_restart_moves_no_interval() -> None:
    restarts = [advised(restart_time=time) for time in (0, "1m", "10h")]

    assert {found.exact.interval for found in restarts} == {200}
    costs = [found.exact.cost_seconds for found in restarts]
    assert costs == sorted(set(costs))


def test_the_curve_goes_through_all_that_is_marked() -> None:
    found = advised(every=777)

    costs = {cost.interval: cost for cost in found.curve}
    for marked in (found.exact, found.young.cost, found.daly.cost, found.every):
        assert marked is not None
        assert costs[marked.interval] == marked
    assert len(costs) > 50
    assert min(costs) < 20
    assert max(costs) > 10_000


def test_half_and_twice_stay_within_the_run() -> None:
    found = advised(steps=1)
    assert (found.half.interval, found.double.interval) == (1, 1)

    found = advised(steps=255)
    assert (found.exact.interval, found.half.interval, found.double.interval) == (255, 128, 255)


def test_disk_is_that_of_all_saves_or_of_those_that_are_kept() -> None:
    size = 140 * 10**9
    everything = advised(checkpoint_size="140GB")
    disk = everything.disk(everything.exact)
    assert disk is not None
    assert (disk.all, disk.kept, disk.peak) == (100 * size, None, None)

    some = advised(checkpoint_size=size, keep=3)
    disk = some.disk(some.exact)
    assert disk is not None
    assert (disk.all, disk.kept, disk.peak) == (100 * size, 3 * size, 4 * size)

    more = advised(checkpoint_size=size, keep=500)
    disk = more.disk(more.exact)
    assert disk is not None
    assert (disk.kept, disk.peak) == (100 * size, 100 * size)

    unknown = advised()
    assert unknown.disk(unknown.exact) is None


def test_json_is_what_the_value_says() -> None:
    found = advised(checkpoint_size="140GB", keep=3, every=500)

    told = found.to_json()

    assert told["run"]["work_seconds"] == 240_000
    assert told["checkpoint"] == {"bytes": 140 * 10**9, "path": None, "files": None}
    assert told["exact"]["interval"] == 200
    assert told["exact"]["disk_peak_bytes"] == 560 * 10**9
    assert told["exact"]["total_seconds"] == found.exact.total_seconds
    assert told["every"]["extra_seconds"] == found.extra_seconds(expected_cost(RUN, 500))
    assert told["every"]["cost_percent"] == pytest.approx(
        100 * expected_cost(RUN, 500).cost_seconds / 240_000
    )
    assert told["daly"]["formula_seconds"] == found.daly.seconds
    assert [cost["interval"] for cost in told["curve"]] == [c.interval for c in found.curve]


# -- at the ends of what a float holds -------------------------------------------------------------


def test_an_interval_without_an_end_has_no_number() -> None:
    found = advised(mtbf="5m", every=20_000)

    assert isinstance(found.every, Cost)
    assert found.every.cost_seconds == math.inf
    assert found.every.loss_per_failure_seconds == 300
    told = found.to_json()
    assert told["every"]["cost_seconds"] is None
    assert told["every"]["extra_percent"] is None
    json.dumps(told, allow_nan=False)


@pytest.mark.parametrize("times", [("12s", "2h", "9s", 0), ("12s", "9s", "9s", "2h")])
def test_a_run_that_never_ends_is_refused(times: tuple[str, str, str, str]) -> None:
    step_time, save_time, mtbf, restart_time = times
    with pytest.raises(UsageError, match="--mtbf: the run never ends"):
        checkpoint_interval(
            steps=9,
            step_time=step_time,
            save_time=save_time,
            mtbf=mtbf,
            restart_time=restart_time,
        )


@pytest.mark.slow
@pytest.mark.parametrize("step_time", [1e-9, 1e15])
@pytest.mark.parametrize("save_time", [1e-9, 1e15])
@pytest.mark.parametrize("mtbf", [1e-9, 1e15])
@pytest.mark.parametrize("restart_time", [0, 1e15])
def test_extremes_are_answered_or_refused(
    step_time: float, save_time: float, mtbf: float, restart_time: float
) -> None:
    never_ends = max(step_time, save_time, restart_time) > mtbf
    with pytest.raises(UsageError, match="--mtbf") if never_ends else nullcontext():
        found = checkpoint_interval(
            steps=10**10,
            step_time=step_time,
            save_time=save_time,
            mtbf=mtbf,
            restart_time=restart_time,
            checkpoint_size=10**18,
            keep=2,
        )
        json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("changes", "remark"),
    [
        (
            {"save_time": "10h"},
            "one save takes 10h, and there is a failure every 9h: the run hardly",
        ),
        ({"step_time": "9h", "steps": 5}, "one step takes 9h, and there is a failure every 9h"),
        (
            {"restart_time": "12h"},
            "a restart takes 12h, and there is a failure every 9h: most rest",
        ),
        ({"save_time": "4h"}, "% of the wall time is work"),
        (
            {"steps": 100, "step_time": "3m", "save_time": "6h", "mtbf": "3h"},
            "Young's interval, 6h, is longer than the run: one save at the end",
        ),
        ({"steps": 120}, "a single save at the end costs least"),
        ({"step_time": "4h", "save_time": "1s"}, "Young's interval, 4m15s, is much shorter than a"),
    ],
)
def test_what_is_odd_is_remarked(changes: dict[str, object], remark: str) -> None:
    assert any(remark in found for found in advised(**changes).remarks)


def test_what_is_not_odd_is_not_remarked() -> None:
    assert advised().remarks == ()


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"steps": 0}, "--steps"),
        ({"steps": 10**10 + 1}, "--steps"),
        ({"steps": 1.5}, "--steps"),
        ({"step_time": 0}, "--step-time"),
        ({"save_time": -1.0}, "--save-time"),
        ({"save_time": math.nan}, "--save-time"),
        ({"mtbf": math.inf}, "--mtbf"),
        ({"mtbf": "9 hours or so"}, "--mtbf"),
        ({"restart_time": -1}, "--restart-time"),
        ({"every": 20_001}, "--every"),
        ({"every": 0}, "--every"),
        ({"keep": 0, "checkpoint_size": 1}, "--keep"),
        ({"keep": 3}, "--keep"),
        ({"checkpoint_size": 0}, "--checkpoint-size"),
        ({"checkpoint_size": "140 G"}, "--checkpoint-size"),
        ({"checkpoint_size": 1, "checkpoint": "run"}, "--from"),
        ({"tag": "global_step2"}, "--tag"),
    ],
    ids=str,
)
def test_a_wrong_number_is_refused_by_its_name(changes: dict[str, object], option: str) -> None:
    with pytest.raises(UsageError) as raised:
        advised(**changes)
    assert option in raised.value.fact


def test_the_sources_are_named() -> None:
    for text in (ckpt_tools.analysis.interval.__doc__, checkpoint_interval.__doc__):
        assert "Young" in (text or "")
        assert "1974" in (text or "")
        assert "Daly" in (text or "")
        assert "2006" in (text or "")


@pytest.mark.slow
@given(RUNS)
def test_the_least_cost_is_the_least_of_all_that_are_told(run: TrainingRun) -> None:
    assume(math.isfinite(expected_cost(run, 1).total_seconds))
    found = checkpoint_interval(
        steps=run.steps,
        step_time=run.step_time,
        save_time=run.save_time,
        mtbf=run.mtbf,
        restart_time=run.restart_time,
        every=max(run.steps // 3, 1),
    )

    least = found.exact.cost_seconds
    assert found.every is not None
    told = [found.half, found.double, found.young.cost, found.daly.cost, found.every, *found.curve]
    assert all(found.extra_seconds(cost) >= -1e-12 * least for cost in told)
    intervals = [cost.interval for cost in found.curve]
    assert intervals == sorted(set(intervals))
    assert {cost.interval for cost in (found.exact, found.young.cost, found.every)} <= {*intervals}
    for cost in told:
        assert cost.saves == math.ceil(run.steps / cost.interval)
        assert 0 < cost.loss_per_failure_seconds <= run.mtbf * (1 + 1e-12)
    json.dumps(found.to_json(), allow_nan=False)


def test_in_other_units_the_answer_is_the_same() -> None:
    hours = checkpoint_interval(steps=5_000, step_time="1m", save_time="5m", mtbf="20h")
    seconds = checkpoint_interval(steps=5_000, step_time=60, save_time=300.0, mtbf="72e3")

    assert hours == seconds
