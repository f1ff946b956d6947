"""Owns threads for calls that may never end: who needs a result can stop waiting, and so can the process.

The threads of ``concurrent.futures`` do not fit, because Python joins them before it exits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class Aside:
    """Makes calls in threads of its own. Close it after use.

    Args:
        name: name of the threads.
        threads: the largest number of threads, None for one for each call under way.
    """

    def __init__(self, name: str, threads: int | None = None) -> None:
        self._name, self._most = name, threads
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._count = 0
        self._is_closed = False

    def __call__(self, call: Callable[[], T]) -> Future[T]:
        """Begin a call, from any thread; calls begin in the order in which they are made.

        Raises:
            RuntimeError: it is closed.
        """
        done: Future[T] = Future()
        with self._lock:
            if self._is_closed:
                raise RuntimeError(f"the threads named {self._name} are closed")
            self._calls.put((call, done))
            new = not self._idle.acquire(blocking=False) and self._count != self._most
            self._count += new
        if new:
            threading.Thread(target=self._work, name=self._name, daemon=True).start()
        return done

    def close(self) -> None:
        """End each thread after the calls that were made before, if they end."""
        with self._lock:
            self._is_closed = True
            for _ in range(self._count):
                self._calls.put(None)

    def _work(self) -> None:
        while (asked := self._calls.get()) is not None:
            call, done = asked
            try:
                done.set_result(call())
            except BaseException as error:
                done.set_exception(error)
            # An idle thread must not hold what it did last.
            del asked, call, done
            self._idle.release()
