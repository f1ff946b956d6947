"""The clock by which a rank measures silence and ends its waits. Owns nothing but these four calls.

They are here so that a test of limits can decide when time passes; every process uses the system's clock.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class Clock:
    """The system's clock."""

    def now(self) -> float:
        """Seconds since some moment in the past."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Do nothing for a while."""
        time.sleep(seconds)

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Wait for an event; whether it was set in time."""
        return event.wait(seconds)

    def result(self, answer: Future[T], seconds: float) -> T:
        """Wait for an answer.

        Raises:
            concurrent.futures.TimeoutError: it did not come in time.
        """
        return answer.result(seconds)
