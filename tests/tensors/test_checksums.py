"""CRC-32 of runs that arrive in any order is that of zlib over the whole."""

from __future__ import annotations

import itertools
import random
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tools.tensors.checksums import ReadLog, joined

FILE = Path("file")


@given(st.binary(max_size=2000), st.binary(max_size=2000))
def test_two_runs_are_joined(first: bytes, second: bytes) -> None:
    crcs = zlib.crc32(first), zlib.crc32(second)
    assert joined(*crcs, len(second)) == zlib.crc32(first + second)


@pytest.mark.parametrize("length", [0, 1, 3, 1 << 20, (1 << 20) + 1])
def test_a_long_run_is_joined(length: int) -> None:
    first, second = b"start", random.Random(1).randbytes(length)
    assert joined(zlib.crc32(first), zlib.crc32(second), length) == zlib.crc32(first + second)


@given(st.binary(min_size=1, max_size=300), st.randoms(use_true_random=False))
def test_runs_in_any_order_and_any_log_become_one(data: bytes, chance: random.Random) -> None:
    cuts = sorted({0, len(data), *(chance.randrange(len(data)) for _ in range(8))})
    runs = list(itertools.pairwise(cuts))
    chance.shuffle(runs)
    logs = ReadLog(), ReadLog()
    for start, stop in runs:
        chance.choice(logs).note(FILE, 100 + start, data[start:stop])

    whole = ReadLog()
    for log in logs:
        whole.include(log)

    assert list(whole.runs(FILE)) == [(100, 100 + len(data), zlib.crc32(data))]


def test_runs_with_a_hole_stay_apart_and_a_run_that_was_read_twice_counts_once() -> None:
    log = ReadLog()
    log.note(FILE, 0, b"abc")
    log.note(FILE, 0, b"abc")
    log.note(FILE, 0, b"a")
    log.note(FILE, 5, b"fg")

    assert list(log.runs(FILE)) == [(0, 3, zlib.crc32(b"abc")), (5, 7, zlib.crc32(b"fg"))]
    assert log.files == [FILE]
    assert list(log.runs(Path("other"))) == []
