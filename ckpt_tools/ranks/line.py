"""Owns the calls to the ranks' store, so that each has a time limit.

A store's own calls wait for its host as long as TCP does: a quarter of an hour after a machine vanished, in C
code that no signal interrupts.

Source: ``torch/csrc/distributed/c10d/TCPStore.cpp`` (one connection, one request at a time, no time limit but
that of waiting for a key).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent import futures
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from ckpt_tools.errors import RankFailed
from ckpt_tools.ranks.aside import Aside
from ckpt_tools.ranks.clock import Clock

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")


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
        self._calls = Aside("store", 1)

    def __call__(self, ask: Callable[[Store], T]) -> T:
        """Call ``ask`` with the store, and return its result; from any thread.

        Raises:
            RankFailed: the store is lost. Every later call fails too.
        """
        if self._lost is None:
            try:
                answer = self._calls(partial(ask, self._store))
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
        self._calls.close()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
