"""The store that the ranks share, spoken to by one thread, so that no wait for it is without a limit.

A store's own calls wait for its host as long as TCP does: a quarter of an hour where a machine vanished, in C
code that no signal interrupts. Owns that thread, and what it means that the store does not answer. Knows no
keys and no messages.

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
    """A rank's way to the store. Close it after use.

    Args:
        store: what all ranks share.
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
        """What ``ask`` gives when it is called with the store; from any thread.

        Raises:
            RankFailed: the store is gone, and stays so.
        """
        answer: futures.Future[T] = futures.Future()
        if self._lost is None:
            self._asked.put((ask, answer))
            try:
                return self._clock.result(answer, self._limit)
            except futures.TimeoutError:
                self._lost = self._lost or f"their store has not answered for {self._limit:.0f} s"
            except RuntimeError as error:  # torch.distributed's errors are of this class
                self._lost = self._lost or first_line(error)
        raise self.failure()

    def failure(self) -> RankFailed:
        """What it means that the store is gone."""
        return RankFailed(
            f"rank {self._rank} lost the others ({self._lost})",
            hint="The launcher or its machine is gone; see what it says, and start again with --resume.",
        )

    def close(self) -> None:
        """End the thread, once the store has answered what was asked."""
        self._asked.put(None)

    def _speak(self) -> None:
        while (asked := self._asked.get()) is not None:
            ask, answer = asked
            try:
                answer.set_result(ask(self._store))
            except BaseException as error:
                answer.set_exception(error)


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a line."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
