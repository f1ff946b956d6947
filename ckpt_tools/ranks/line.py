"""Owns the thread that calls the ranks' store, so that every call has a time limit.

A store's own calls wait for its host as long as TCP does: a quarter of an hour after a machine vanished, in C
code that no signal interrupts.

Source: ``torch/csrc/distributed/c10d/TCPStore.cpp`` (one connection, one request at a time, no time limit but
that of waiting for a key).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent import futures
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from ckpt_tools.errors import RankFailed
from ckpt_tools.ranks.clock import Clock

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")
_Asked = tuple[Callable[["Store"], Any], "futures.Future[Any]"]


class Line:
    """Calls the store for one rank. Close it after use.

    Args:
        store: the store of all ranks.
        rank: number of this process.
        limit: seconds in which the store must answer.
        clock: by which they are counted.
    """

    def __init__(self, store: Store, rank: int, limit: float, clock: Clock) -> None:
        self._store, self._rank, self._limit, self._clock = store, rank, limit, clock
        self._lost: str | None = None
        self._asked: SimpleQueue[_Asked | None] = SimpleQueue()
        threading.Thread(target=self._speak, name="store", daemon=True).start()

    def __call__(self, ask: Callable[[Store], T]) -> T:
        """Call ``ask`` with the store, and return its result; from any thread.

        Raises:
            RankFailed: the store is lost. Every later call fails too.
        """
        answer: futures.Future[T] = futures.Future()
        if self._lost is None:
            self._asked.put((ask, answer))
            try:
                return self._clock.result(answer, self._limit)
            except futures.TimeoutError:
                self._lost = self._lost or f"the store has not answered for {self._limit:.0f} s"
            except RuntimeError as error:  # torch.distributed's errors are of this class
                self._lost = self._lost or first_line(error)
        raise self.failure()

    def failure(self) -> RankFailed:
        """The error for a lost store."""
        return RankFailed(
            f"rank {self._rank} lost the others ({self._lost})",
            hint="The launcher or its machine has ended. See its output, and start again with --resume.",
        )

    def close(self) -> None:
        """End the thread after the calls that were made before."""
        self._asked.put(None)

    def _speak(self) -> None:
        while (asked := self._asked.get()) is not None:
            ask, answer = asked
            try:
                answer.set_result(ask(self._store))
            except BaseException as error:
                answer.set_exception(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
