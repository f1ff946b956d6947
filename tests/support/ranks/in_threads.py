"""Several ranks in threads of one process, over a store that can be made to fail."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore

from ckpt_tools.ranks import Ranks, pulse, session
from ckpt_tools.ranks.clock import Clock
from tests.support.ranks.simulated import SimulatedClock

HANG_SECONDS = 300


class Store:
    """A store in memory; ``gone`` as after its host was killed, silent as after a cable was pulled."""

    def __init__(self, silent: threading.Event | None = None) -> None:
        self._store = HashStore()
        self.gone = False
        self.silent = silent or threading.Event()

    def __getattr__(self, name: str) -> Any:
        if self.gone:
            raise RuntimeError("Connection reset by peer")
        if self.silent.is_set():
            threading.Event().wait()
        return getattr(self._store, name)


def made(clock: Clock, size: int, *, timeout: float = 20, store: Any = None) -> list[Ranks]:
    """Ranks of machines of two."""
    store = store or Store()
    return [
        Ranks(store, rank, size, f"machine-{rank // 2}", timeout, clock) for rank in range(size)
    ]


def each(ranks: list[Ranks], call: Callable[[Ranks], Any]) -> list[Any]:
    """What a call returns or raises on each rank; all of them must end."""
    return at_once([functools.partial(call, own) for own in ranks], ranks[0].clock)


def at_once(calls: list[Callable[[], Any]], clock: Clock) -> list[Any]:
    """What each call returns or raises, in a thread of its own."""
    outcomes: list[Any] = [None] * len(calls)

    def run(number: int) -> None:
        try:
            outcomes[number] = calls[number]()
        except BaseException as error:
            outcomes[number] = error

    numbers = range(len(calls))
    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in numbers]
    if isinstance(clock, SimulatedClock):
        for thread in threads:
            clock.take_part(thread)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_SECONDS)
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return outcomes


def together(
    ranks: list[Ranks], body: Callable[[Ranks], Any], what: Callable[[Ranks], str] | None = None
) -> list[Any]:
    """The same of a body within one session."""

    def call(own: Ranks) -> Any:
        with own.session(what(own) if what else ""):
            return body(own)

    return each(ranks, call)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimulatedClock:
    """Time in which the threads that send heartbeats take part."""
    made = SimulatedClock()
    start, stop = pulse.Pulse.start, pulse.Pulse.stop

    def started(own: pulse.Pulse) -> None:
        start(own)
        made.take_part(own._thread)

    def stopped(own: pulse.Pulse) -> None:
        own._ended.set()
        made.join(own._thread)
        stop(own)

    monkeypatch.setattr(pulse.Pulse, "start", started)
    monkeypatch.setattr(pulse.Pulse, "stop", stopped)
    return made


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that hear of each other twenty times a second. What their patience is stays as it is."""
    monkeypatch.setattr(pulse, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(session, "_LAST_WORDS_SECONDS", 0.05)
