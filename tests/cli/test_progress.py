"""What plain lines say of a long command, by a clock that the test moves."""

from __future__ import annotations

import pytest

from ckpt_tools.cli import progress
from ckpt_tools.storage import wire


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_the_rate_and_the_time_left_are_those_of_this_run(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an earlier run had written took this one no time."""
    update = progress._lines()
    update(600_000_000, 1_000_000_000)
    clock.now += 20
    update(700_000_000, 1_000_000_000)

    assert capsys.readouterr().err == "70%: 700 MB of 1 GB, 5 MB/s, 1:00 left\n"


def test_a_line_comes_every_ten_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    update = progress._lines()
    for second in range(35):
        clock.now = 1000.0 + second
        update(second, 100)

    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["10%", "20%", "30%"]


def test_a_second_task_of_a_command_begins_anew(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    update = progress._lines()
    update(0, 100)
    clock.now += 100
    update(100, 100)
    update(0, 2000)
    clock.now += 10
    update(1000, 2000)

    assert capsys.readouterr().err.splitlines() == [
        "100%: 100 B of 100 B, 1 B/s, 0.0 s left",
        "50%: 1 kB of 2 kB, 100 B/s, 10.0 s left",
    ]


def test_the_bytes_over_the_network_are_shown_where_a_store_is_used(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "_carried", 0)
    update = progress._lines()
    update(0, 100_000_000)
    wire.carry(30_000_000)
    wire.carry(7_000_000)
    clock.now += 10
    update(50_000_000, 100_000_000)

    assert capsys.readouterr().err == (
        "50%: 50 MB of 100 MB, 5 MB/s, 10.0 s left, 37 MB over the network\n"
    )


def test_a_bar_says_planning_until_bytes_move(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress._bar("writing") as update:
        before = capsys.readouterr().err
        update(1, 2)
    after = capsys.readouterr().err

    assert "planning" in before
    assert "writing" not in before
    assert "writing" in after
