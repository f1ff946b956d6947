"""Several ranks in threads of one process, over a store that can be made to fail."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore

from ckpt_tools.ranks import Ranks, pulse, session

HANG_SECONDS = 60


class Store:
    """A store in memory; ``gone`` as after its host was killed, ``silent`` as after a cable was pulled."""

    def __init__(self) -> None:
        self._store = HashStore()
        self.gone = False
        self.silent = threading.Event()

    def __getattr__(self, name: str) -> Any:
        if self.gone:
            raise RuntimeError("Connection reset by peer")
        if self.silent.is_set():
            threading.Event().wait()
        return getattr(self._store, name)


def made(size: int, *, timeout: float = 20, store: Any = None) -> list[Ranks]:
    """Ranks of machines of two."""
    store = store or Store()
    return [Ranks(store, rank, size, f"machine-{rank // 2}", timeout) for rank in range(size)]


def each(ranks: list[Ranks], call: Callable[[Ranks], Any]) -> list[Any]:
    """What a call returns or raises on each rank; all of them must end."""
    outcomes: list[Any] = [None] * len(ranks)

    def run(own: Ranks) -> None:
        try:
            outcomes[own.rank] = call(own)
        except BaseException as error:
            outcomes[own.rank] = error

    threads = [threading.Thread(target=run, args=(own,), daemon=True) for own in ranks]
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
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that lose patience in a second where others take twenty."""
    monkeypatch.setattr(pulse, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(session, "DEAD_SECONDS", 1.0)
    monkeypatch.setattr(session, "_GONE_SECONDS", 0.5)
    monkeypatch.setattr(session, "_LAST_WORDS_SECONDS", 0.05)
