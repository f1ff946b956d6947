"""A process that reads from a store shares one arena of the C library; no other does."""

from __future__ import annotations

import ctypes

import pytest

from ckpt_tools.cli.memory import share_one_arena


@pytest.mark.parametrize(
    ("words", "is_shared"),
    [
        (["consolidate", "s3://bucket/run", "out"], True),
        (["consolidate", "run", "out", "--config=hf://org/model"], True),
        (["consolidate", "run", "out", "--config", "s3/bucket"], False),
    ],
)
def test_an_address_on_the_command_line_decides(
    words: list[str], is_shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    class Library:
        def mallopt(self, parameter: int, value: int) -> None:
            asked.append((parameter, value))

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library())
    share_one_arena(words)
    # M_ARENA_MAX of <malloc.h>.
    assert asked == [(-8, 1)] * is_shared


def test_a_library_without_arenas_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    share_one_arena(["inspect", "s3://bucket/run"])
