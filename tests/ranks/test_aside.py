"""A call that never ends holds up neither other calls nor the process."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from ckpt_tools.ranks.aside import Aside
from tests.support.waiting import LONGEST_SECONDS, wait_until


def test_a_call_that_waits_holds_no_other_call_up() -> None:
    aside, ended = Aside("test"), threading.Event()

    waits = aside(lambda: ended.wait(LONGEST_SECONDS))
    other = aside(lambda: 7)

    assert other.result(LONGEST_SECONDS) == 7
    assert not waits.done()
    ended.set()
    assert waits.result(LONGEST_SECONDS)


def test_one_thread_makes_the_calls_in_their_order() -> None:
    aside, may, made = Aside("test", 1), threading.Event(), list[int]()

    def call(number: int) -> None:
        assert may.wait(LONGEST_SECONDS)
        made.append(number)

    calls = [aside(lambda number=number: call(number)) for number in range(20)]
    may.set()
    for done in calls:
        done.result(LONGEST_SECONDS)

    assert made == [*range(20)]


def test_what_a_call_raises_is_raised_to_who_asked() -> None:
    done = Aside("test")(lambda: 1 // 0)

    with pytest.raises(ZeroDivisionError):
        done.result(LONGEST_SECONDS)


def test_closed_threads_end_after_the_calls_that_were_made_before() -> None:
    aside, may = Aside("closed"), threading.Event()
    calls = [aside(lambda: may.wait(LONGEST_SECONDS)) for _ in range(3)]

    aside.close()
    may.set()

    assert all(done.result(LONGEST_SECONDS) for done in calls)
    with pytest.raises(RuntimeError, match="closed"):
        aside(lambda: None)
    wait_until(lambda: "closed" not in [thread.name for thread in threading.enumerate()])


def test_a_process_ends_while_a_call_waits() -> None:
    program = """
import threading
from ckpt_tools.ranks.aside import Aside
begun = threading.Event()
Aside("test")(lambda: (begun.set(), threading.Event().wait()))
begun.wait()
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=LONGEST_SECONDS)

    assert done.returncode == 0
