"""Owns the heartbeats: each rank sends its own, and watches those of the ranks that it depends on.

One thread does both. It also passes on the first failure of any rank. It counts time in its own looks at the
store: a process that was stopped for a minute has seen no heartbeats meanwhile, and it reports no other rank.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckpt_tools.errors import CkptError, RankFailed
from ckpt_tools.ranks.clock import Clock
from ckpt_tools.ranks.line import Line, first_line

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

BEAT_SECONDS = 0.5
# A thread beats even in a busy process; a machine without a heartbeat for so long is lost.
DEAD_SECONDS = 20.0

SEE_THERE = "See the output of that rank and its machine, and start again with --resume."

Failure = dict[str, Any]


@dataclass
class _Sign:
    """The last heartbeat of a rank, and the times of its changes by the watching rank's clock."""

    beat: int
    activity: int
    nbytes: int
    beat_at: float
    active_at: float


class Pulse:
    """This rank's heartbeats, and its view of those of others. Stop it after use.

    Args:
        line: calls the store.
        key: makes the store's key of a name.
        rank: number of this process.
        watched: ranks whose silence ends the command.
        patience: seconds of silence that end it.
        failed: is set when any rank has failed, or the store is lost.
        time: by which the thread sleeps between two looks.

    Attributes:
        clock: seconds for which this rank has been watching.
        failure: the first failure of any rank, as it was given to :meth:`report`.
        reported: whether this rank reported it.
    """

    def __init__(
        self,
        line: Line,
        key: Callable[[str], str],
        rank: int,
        watched: Iterable[int],
        patience: float,
        failed: threading.Event,
        time: Clock,
    ) -> None:
        self._line, self._key, self._rank, self._patience = line, key, rank, patience
        self._watched = {other for other in watched if other != rank}
        self._failed, self._time = failed, time
        self.failure: Failure | None = None
        self.reported = False
        self.clock = 0.0
        self._signs: dict[int, _Sign] = {}
        self._lock = threading.Lock()
        self._beats = self._activity = self._nbytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def start(self) -> None:
        """Send the first heartbeat, and start the thread.

        Raises:
            RankFailed: the store is lost.
        """
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        """Send no more heartbeats."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def active(self, nbytes: int = 0) -> None:
        """Note that this rank made progress, and how many bytes it finished."""
        with self._lock:
            self._activity += 1
            self._nbytes += nbytes

    def nbytes(self) -> int:
        """Bytes that this rank and the watched ranks have reported as finished."""
        return self._nbytes + sum(sign.nbytes for sign in list(self._signs.values()))

    def watch(self, rank: int) -> None:
        """Watch one more rank."""
        self._watched.add(rank)

    def silence(self, rank: int) -> float:
        """Seconds since a rank's last heartbeat."""
        sign = self._signs.get(rank)
        return self.clock - (sign.beat_at if sign else 0.0)

    def active_at(self, rank: int) -> float:
        """The time of a rank's last progress by :attr:`clock`; 0 before the first."""
        sign = self._signs.get(rank)
        return sign.active_at if sign else 0.0

    def report(self, failure: Failure) -> None:
        """Report a failure to all ranks, unless another was reported before.

        Raises:
            RankFailed: the store is lost.
        """
        text = json.dumps(failure)

        def first(store: Store) -> bytes:
            return store.compare_set(self._key("failed"), "", text)

        found = self._line(first)
        self.reported = self.reported or found == text.encode()
        self.failure = json.loads(found)
        self._failed.set()

    def _run(self) -> None:
        last = self._time.now()
        try:
            with suppress(RankFailed):
                while not self._time.wait(self._ended, BEAT_SECONDS):
                    self._beat()
                    now = self._time.now()
                    self.clock += min(now - last, 2 * BEAT_SECONDS)
                    last = now
                    self._look()
        finally:
            if not self._ended.is_set():
                # Without this thread no lost rank is noticed, and no wait ends.
                self._failed.set()

    def _beat(self) -> None:
        self._beats += 1
        with self._lock:
            sign = json.dumps([self._beats, self._activity, self._nbytes])
        self._line(lambda store: store.set(self._key(f"beat/{self._rank}"), sign))

    def _look(self) -> None:
        known = list(self._signs)
        unknown = sorted(self._watched.copy().difference(known))

        def look(store: Store) -> tuple[list[int], list[bytes], bytes | None]:
            came = [rank for rank in unknown if store.check([self._key(f"beat/{rank}")])]
            seen = [*known, *came]
            signs = store.multi_get([self._key(f"beat/{rank}") for rank in seen]) if seen else []
            failed = self._key("failed")
            return seen, signs, store.get(failed) if store.check([failed]) else None

        seen, texts, failure = self._line(look)
        for rank, text in zip(seen, texts, strict=True):
            self._note(rank, *json.loads(text))
        if failure is not None:
            self.failure = json.loads(failure)
            self._failed.set()
        elif self.failure is None:
            self._accuse()

    def _note(self, rank: int, beat: int, activity: int, nbytes: int) -> None:
        old = self._signs.get(rank)
        self._signs[rank] = _Sign(
            beat,
            activity,
            nbytes,
            old.beat_at if old and old.beat == beat else self.clock,
            old.active_at if old and old.activity == activity else self.clock,
        )

    def _accuse(self) -> None:
        """Report a silent rank. A rank that has not started yet is not silent."""
        for rank in self._signs:
            if self.silence(rank) > self._patience:
                fact = f"rank {rank} has sent no heartbeat for {self.silence(rank):.0f} s"
                self.report(described(self._rank, RankFailed(fact, hint=SEE_THERE)))
                return


def described(rank: int, error: BaseException) -> Failure:
    """An error as a failure of this rank, for the other ranks."""
    told: Failure = {"rank": rank, "exit_code": RankFailed.exit_code}
    if isinstance(error, CkptError):
        path = error.where
        own = {"fact": error.fact, "path": path, "tensor": error.tensor, "hint": error.hint}
        return told | own | {"exit_code": error.exit_code}
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return told | {"fact": "ended by a signal"}
    return told | {"fact": f"{type(error).__name__}: {first_line(error)}"}


def as_error(failure: Failure, rank: int) -> RankFailed:
    """A failure as an error of this rank."""
    where = "" if failure["rank"] == rank else f"rank {failure['rank']}: "
    more = {name: failure.get(name) for name in ("path", "tensor", "hint")}
    error = RankFailed(where + failure["fact"], **more)
    error.exit_code = failure["exit_code"]
    return error
