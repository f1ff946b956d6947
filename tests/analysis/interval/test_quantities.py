"""Durations and sizes as people type them."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tools.analysis.interval.quantities import LONGEST, duration_text, nbytes, seconds
from ckpt_tools.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12s", 12),
        ("90", 90),
        ("1.5h", 5400),
        ("9h30m", 34_200),
        ("2d", 172_800),
        ("250ms", 0.25),
        ("1w", 604_800),
        ("10min", 600),
        ("1h 2m 3s 4ms", 3723.004),
        (" 12 S ", 12),
        (".5s", 0.5),
        ("1e3s", 1000),
        ("2.h", 7200),
    ],
)
def test_a_duration(text: str, expected: float) -> None:
    assert seconds("--mtbf", text) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "s",
        "h9",
        "9x",
        "9h30",
        "30m9h",
        "9h9h",
        "9m3min",
        "1,5h",
        "nan",
        "inf",
        "1:30",
        "9hs",
        "٣s",
        math.nan,
    ],
)
def test_what_is_no_duration_is_refused(text: float | str) -> None:
    with pytest.raises(UsageError, match=r"--mtbf: .* is not a duration") as raised:
        seconds("--mtbf", text)
    assert "9h30m" in (raised.value.hint or "")


@pytest.mark.parametrize("value", ["0", "0s", "-5s", 0, -1.5, -math.inf])
def test_a_duration_is_longer_than_zero(value: float | str) -> None:
    said = f"--mtbf: a duration here must be longer than zero, not {value!r}"
    with pytest.raises(UsageError, match=re.escape(said)):
        seconds("--mtbf", value)


@pytest.mark.parametrize("value", [math.inf, "1e400", "1e16", 1e-10])
def test_a_duration_is_one_that_somebody_could_mean(value: float | str) -> None:
    with pytest.raises(UsageError, match=r"--mtbf: .* is not between a nanosecond and"):
        seconds("--mtbf", value)


def test_zero_is_a_duration_where_it_may_be() -> None:
    assert seconds("--restart-time", "0s", zero=True) == 0
    with pytest.raises(UsageError, match="--restart-time: a duration here must not be negative"):
        seconds("--restart-time", "-1s", zero=True)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("140GB", 140 * 10**9),
        ("1.3TB", 1_300_000_000_000),
        ("130GiB", 130 * 2**30),
        ("1PiB", 2**50),
        ("5 kB", 5000),
        ("12b", 12),
        ("12", 12),
        (12, 12),
    ],
)
def test_a_size(value: int | str, expected: int) -> None:
    assert nbytes("--checkpoint-size", value) == expected


@pytest.mark.parametrize("value", ["", "GB", "140G", "-1GB", "1,3TB", "nan", "0", 0, -1, "2000PB"])
def test_what_is_no_size_is_refused(value: int | str) -> None:
    with pytest.raises(UsageError, match="--checkpoint-size: ") as raised:
        nbytes("--checkpoint-size", value)
    assert "130GiB" in (raised.value.hint or "")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0s"),
        (0.25, "250ms"),
        (12, "12s"),
        (59.99, "60s"),
        (60, "1m"),
        (2414.95, "40m15s"),
        (3599.6, "1h"),
        (34_200, "9h30m"),
        (86_399, "1d"),
        (187_200, "2d4h"),
        (1e12, "11574074d"),
    ],
)
def test_a_duration_for_a_person(value: float, text: str) -> None:
    assert duration_text(value) == text


@given(st.floats(1e-6, LONGEST))
def test_a_duration_that_is_shown_can_be_typed(value: float) -> None:
    assert seconds("--mtbf", duration_text(value)) == pytest.approx(value, rel=0.02)
