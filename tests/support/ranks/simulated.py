"""A clock for ranks in threads that moves only while all of them wait, and then to what comes first.

Minutes of silence pass in no time, and a machine that is slow makes none of them pass: as long as one
thread works, the time stands still. Every wait of a thread that takes part must be a wait for this clock.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent import futures
from typing import TypeVar

from ckpt_tools.ranks.clock import Clock

T = TypeVar("T")

# How often, by the real clock, a wait looks for what a thread did that went on working.
LOOK_SECONDS = 0.001


class SimulatedClock(Clock):
    """Time that takes no time.

    Attributes:
        stopped_for: seconds that passed while the whole process stood still.
        unanswered: set where no answer to a question will ever come.
    """

    def __init__(self) -> None:
        self.stopped_for = 0.0
        self.unanswered = threading.Event()
        self._now = 0.0
        self._threads: set[threading.Thread] = set()
        self._waits: dict[threading.Thread, tuple[float, Callable[[], bool]]] = {}
        self._idle: Counter[threading.Thread] = Counter()
        self._changed = threading.Condition()

    def take_part(self, thread: threading.Thread) -> None:
        """No time passes while this thread works, until it ends."""
        with self._changed:
            self._threads.add(thread)

    def join(self, thread: threading.Thread) -> None:
        """Wait for the end of a thread."""
        self._until(lambda: not thread.is_alive(), 1e9)

    def sleep_for(self, thread: threading.Thread, seconds: float) -> None:
        """Let time pass, on behalf of a thread that waits for the calling one."""
        with self._changed:
            self._idle[thread] += 1
        self.sleep(seconds)
        with self._changed:
            self._idle[thread] -= 1

    def now(self) -> float:
        return self._now + self.stopped_for

    def sleep(self, seconds: float) -> None:
        self._until(lambda: False, seconds)

    def wait(self, event: threading.Event, seconds: float) -> bool:
        return self._until(event.is_set, seconds)

    def result(self, answer: futures.Future[T], seconds: float) -> T:
        # Who answers is no thread of ours: it works as long as it is asked, and the time stands still.
        while not self.unanswered.is_set():
            if futures.wait([answer], 10 * LOOK_SECONDS).done:
                return answer.result()
        if not self._until(answer.done, seconds):
            raise futures.TimeoutError
        return answer.result()

    def _until(self, true: Callable[[], bool], seconds: float) -> bool:
        me = threading.current_thread()
        with self._changed:
            end = self._now + seconds
            self._waits[me] = (end, true)
            try:
                while not true():
                    if self._now >= end:
                        return False
                    if self._all_wait():
                        self._now = min(end for end, _ in self._waits.values())
                        self._changed.notify_all()
                    else:
                        self._changed.wait(LOOK_SECONDS)
                return True
            finally:
                del self._waits[me]

    def _all_wait(self) -> bool:
        """Whether nobody works, nor has anything to do now."""
        idle = {thread for thread, times in self._idle.items() if times}
        working = self._threads - self._waits.keys() - idle
        # One that was not started yet has work to do.
        ended = all(thread.ident and not thread.is_alive() for thread in working)
        return ended and not any(true() or end <= self._now for end, true in self._waits.values())
