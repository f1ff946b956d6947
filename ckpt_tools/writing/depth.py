"""Owns the threads of a write, and how many requests for source bytes they have under way.

A thread reads a block, casts and digests it, and writes it. Where a place answers slowly, such as a network
file system, the threads wait for bytes most of the time, and more requests at a time make the write faster.
Where a disk is busy, they do not. So the depth is measured while bytes move: it grows in steps while threads
wait, and a step that does not raise the rate is taken back. Where threads wait for almost all of their time,
a step takes two levels, until one was of no use.

The buffers of all threads together stay below :data:`MEMORY_BYTES` on every level above the first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import NamedTuple, TypeVar

from ckpt_tools.storage.places import Requests
from ckpt_tools.tensors.threads import MAX_WORKERS, casting_on_one_core, pool

T = TypeVar("T")

MEMORY_BYTES = 96 << 20
# The source of a block has twice its bytes where elements are cast to half their size.
_SOURCE = 2
# A step is tried where threads wait for so much of their time, and kept if the rate grows by this factor.
_WAITING, _GAIN = 0.4, 1.15
_WAITING_MOST = 0.75
# Blocks of each thread that are measured, after one that may have begun on another level, and seconds.
_ROUNDS, _SECONDS = 2, 0.05
# Seconds until a step is tried again; twice as many each time that it was of no use.
_PAUSE = 1.0


class Level(NamedTuple):
    """A depth.

    Attributes:
        threads: the number of threads that read, cast and write.
        at_once: the number of requests that each has under way.
    """

    threads: int
    at_once: int


def levels(threads: int, block_bytes: int, requests: Requests) -> tuple[Level, ...]:
    """The depths to choose from, the smallest first.

    A place that states a number of threads is read with that. Otherwise the requests of one block are made at
    a time first, and then there are more threads than processors.

    Args:
        threads: the number of threads where nothing waits.
        block_bytes: bytes of the largest block.
        requests: how the sources are read best.
    """
    stated = requests.threads_for(block_bytes)
    if stated is not None:
        return (Level(stated, requests.at_once),)
    found = [Level(threads, requests.at_once)]
    # A block begins and ends within a run, so it has one request more than its bytes need.
    of_a_block = -(-_SOURCE * block_bytes // requests.nbytes) + 1
    while True:
        threads, at_once = found[-1]
        if at_once < of_a_block:
            at_once = 2 * at_once if 4 * at_once <= of_a_block else of_a_block
        else:
            most = MEMORY_BYTES // (block_bytes + at_once * requests.nbytes)
            threads = min(2 * threads, MAX_WORKERS, max(most, threads))
        level = Level(threads, at_once)
        if level <= found[-1] or threads * (block_bytes + at_once * requests.nbytes) > MEMORY_BYTES:
            return tuple(found)
        found.append(level)


class Depth:
    """The depth of one write. All its threads use it.

    Args:
        choice: the levels, the smallest first.
        clock: seconds from any start.
    """

    def __init__(
        self, choice: Sequence[Level], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._choice, self._clock = choice, clock
        self._lock = threading.Lock()
        self._at = self._from = 0
        self._before: float | None = None
        self._next, self._pause = clock(), _PAUSE
        self._longest = 2
        self._begin()
        # No block began on another level.
        self._skipped = self.level.threads

    @property
    def level(self) -> Level:
        """The level that is used now."""
        return self._choice[self._at]

    @property
    def most_threads(self) -> int:
        """The number of threads of the largest level."""
        return self._choice[-1].threads

    def moved(self, nbytes: int, waited: float, took: float) -> None:
        """Take note of a block.

        Args:
            nbytes: its bytes.
            waited: seconds of its thread that passed without work while bytes were read.
            took: seconds in all.
        """
        with self._lock:
            if self._skipped < self.level.threads:
                self._skipped += 1
                self._began = self._clock()
                return
            self._blocks += 1
            self._nbytes += nbytes
            self._waited += waited
            self._took += took
            seconds = self._clock() - self._began
            if self._blocks >= _ROUNDS * self.level.threads and seconds >= _SECONDS:
                self._judge(self._nbytes / seconds)
                self._begin()

    def _begin(self) -> None:
        self._skipped = self._blocks = self._nbytes = 0
        self._waited = self._took = 0.0
        self._began = self._clock()

    def _judge(self, rate: float) -> None:
        before, self._before = self._before, None
        if before is not None and rate < _GAIN * before:
            self._at, self._longest = self._from, 1
            self._next, self._pause = self._clock() + self._pause, 2 * self._pause
            return
        waits = self._waited > _WAITING * self._took and self._clock() >= self._next
        step = self._longest if self._waited > _WAITING_MOST * self._took else 1
        if waits and self._at + 1 < len(self._choice):
            self._from, self._at = self._at, min(self._at + step, len(self._choice) - 1)
            self._before = rate


def side_by_side(work: Callable[[Callable[[], bool]], T], depth: Depth) -> list[T]:
    """Let as many threads work as the depth says, more or fewer when it changes.

    Args:
        work: what each thread does. It asks before each block whether its thread stays, and returns when the
            answer is no, or when no block is left.
        depth: the depth.

    Returns:
        The result of each thread.
    """
    stop, done, lock = threading.Event(), threading.Event(), threading.Lock()
    jobs: list[Future[T]] = []
    at_work: set[int] = set()

    def begin() -> None:
        with lock:
            for number in range(depth.level.threads):
                if number not in at_work and not done.is_set():
                    at_work.add(number)
                    jobs.append(threads.submit(run, number))

    def run(number: int) -> T:
        leaves = False

        def stays() -> bool:
            nonlocal leaves
            if len(at_work) < depth.level.threads:
                begin()
            leaves = number >= depth.level.threads
            return not leaves and not stop.is_set()

        try:
            return work(stays)
        except BaseException:
            stop.set()
            raise
        finally:
            with lock:
                at_work.discard(number)
                if not leaves:
                    done.set()

    with casting_on_one_core(), pool(depth.most_threads) as threads:
        try:
            begin()
            count = 0
            # A job that begins others ends after they were added.
            while count < len(jobs) and not stop.is_set():
                count = len(jobs)
                wait(jobs[:count], return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
        return [job.result() for job in jobs]
