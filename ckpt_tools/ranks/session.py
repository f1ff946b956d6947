"""Owns the messages between ranks, the store's keys, and how a failure of one rank ends all.

A wait ends when the value has come, when a rank has failed, when the other rank sends no heartbeat, or when
it has made no progress for :attr:`Ranks.timeout` seconds. The reason is sent to all ranks. The user reads it
once: from the leader, or, if the leader is lost, from the rank that noticed.

Source: ``torch/csrc/distributed/c10d/TCPStore.cpp`` (values of at most 8 MB).
"""

from __future__ import annotations

import os
import pickle
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ckpt_tools._version import __version__
from ckpt_tools.errors import RankFailed
from ckpt_tools.ranks.clock import Clock
from ckpt_tools.ranks.line import Line
from ckpt_tools.ranks.pulse import DEAD_SECONDS, SEE_THERE, Pulse, as_error, described

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

# Ranks that a launcher starts at the same time have started by then, even from a cold file system.
START_SECONDS = 300.0
# Time for the blocks that are being written when a rank fails, and for the leader's cleaning up.
_STOP_SECONDS = 10.0
_OVER_SECONDS = 20.0
# When a command ends, the others do not wait for a rank that is silent for so long.
_GONE_SECONDS = 3.0
_LAST_WORDS_SECONDS = 1.0
_LONGEST_NAP = 0.2
_CHUNK_BYTES = 4 << 20
LEADER = 0


class Ranks:
    """This process among those that carry out one command.

    Args:
        store: the store of all ranks.
        rank: number of this process; rank 0 leads.
        size: number of processes.
        machine: name of this machine.
        timeout: seconds that any wait may last without progress.
        clock: by which all limits are measured.

    Attributes:
        failed: is set when any rank has failed.
        names: name of the machine of each rank, known in a session.
        machines: the same as numbers from 0.
        session_number: the number of sessions so far, including this one.
        told_elsewhere: after a failure, whether another rank tells the user of it; None before.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        machine: str,
        timeout: float,
        clock: Clock,
    ) -> None:
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self.machine, self.clock = machine, clock
        self.failed = threading.Event()
        self.session_number = 0
        self.names: tuple[str, ...] = ()
        self.machines: tuple[int, ...] = ()
        self.told_elsewhere: bool | None = None
        self._stored: set[str] = set()
        self._line: Line
        self._pulse: Pulse
        self._told: bool

    @property
    def leads(self) -> bool:
        """Whether this is the rank that plans, reports and publishes."""
        return self.rank == LEADER

    def await_all(self) -> None:
        """Wait until every rank has started. A rank that could not start sends no heartbeat to miss.

        Raises:
            RankFailed: a rank has not started in time.
        """
        line = Line(self.store, self.rank, DEAD_SECONDS, self.clock)
        came = line(lambda store: store.add("came", 1))
        line(lambda store: store.set(f"came/{self.rank}", "1"))
        everybody = range(self.size)
        deadline = self.clock.now() + START_SECONDS
        while came < self.size:
            if self.clock.now() > deadline:
                present = line(lambda store: [r for r in everybody if store.check([f"came/{r}"])])
                first = next(r for r in everybody if r not in present)
                self.told_elsewhere = self.rank != present[0]
                self.clock.sleep(_LAST_WORDS_SECONDS if self.told_elsewhere else 0)
                raise RankFailed(
                    f"rank {first} did not start within {START_SECONDS:.0f} s",
                    hint="See the output of its machine: is ckpt-tools installed there, and was torchrun "
                    "started?",
                )
            self.clock.sleep(_LONGEST_NAP)
            came = line(lambda store: store.add("came", 0))
        line.close()

    @contextmanager
    def session(self, what: str = "") -> Iterator[None]:
        """One command. All ranks enter and leave it together; a failure in one is raised in all.

        Args:
            what: options that must be the same on all ranks.

        Raises:
            RankFailed: another rank failed, was lost, made no progress, or does something else.
        """
        before = self._stored
        self.session_number += 1
        self.failed.clear()
        self.told_elsewhere = None
        self._told = False
        self._stored = {self._key(f"beat/{self.rank}"), self._key("failed")}
        patience = min(DEAD_SECONDS, self.timeout)
        line = self._line = Line(self.store, self.rank, patience, self.clock)
        watched = range(self.size) if self.leads else [LEADER]
        self._pulse = Pulse(line, self._key, self.rank, watched, patience, self.failed, self.clock)
        try:
            with self.ending_all():
                self._pulse.start()
                self._meet(what)
                self._forget(before)
                yield
                self.all_gather("end", None)
        except BaseException:
            self.told_elsewhere = self._part()
            raise
        finally:
            self._pulse.stop()
            line.close()

    def _meet(self, what: str) -> None:
        """Exchange machines, versions and options, and refuse if they do not fit."""
        met = self.all_gather("met", (self.machine, f"ckpt-tools {__version__}", what))
        self.names = tuple(machine for machine, _, _ in met)
        order = list(dict.fromkeys(self.names))
        self.machines = tuple(order.index(name) for name in self.names)
        for rank, (_, *own) in enumerate(met if self.leads else ()):
            for mine, theirs in zip(met[LEADER][1:], own, strict=True):
                if mine != theirs:
                    raise RankFailed(
                        f"rank {rank} was started with {theirs}, and rank {LEADER} with {mine}",
                        hint="Start the same command, of the same version, on every machine.",
                    )

    def put(self, key: str, value: object) -> None:
        """Put a value under ``key``, for any rank to get."""
        data = zlib.compress(pickle.dumps(value), 1)
        count = -(-len(data) // _CHUNK_BYTES)
        for index in range(count):
            self._set(f"{key}/{index}", data[index * _CHUNK_BYTES :][:_CHUNK_BYTES])
        self._set(key, str(count))
        self.active()

    def _set(self, key: str, value: str | bytes) -> None:
        name = self._key(key)
        self._stored.add(name)
        self._line(lambda store: store.set(name, value))  # type: ignore[arg-type]  # bytes are

    def _get(self, key: str) -> bytes:
        return self._line(lambda store: store.get(self._key(key)))

    def _forget(self, names: set[str]) -> None:
        """Remove the keys of the session before. All ranks have left it, and a training has many sessions."""

        def forget(store: Store) -> None:
            with suppress(Exception):  # not every store can delete
                for name in names:
                    store.delete_key(name)

        self._line(forget)

    def get(self, key: str, source: int = LEADER) -> Any:
        """The value that rank ``source`` put under ``key``; waits for it.

        Raises:
            RankFailed: it will not come.
        """
        self.first((key,), source)
        data = b"".join(self._get(f"{key}/{index}") for index in range(int(self._get(key))))
        # This module put it there, in a process of the same command; torch's object collectives do the same.
        return pickle.loads(zlib.decompress(data))  # noqa: S301

    def first(self, keys: Sequence[str], source: int = LEADER) -> str:
        """Which of ``keys`` rank ``source`` put there; waits for one.

        Raises:
            RankFailed: none will come.
        """
        pulse = self._pulse
        pulse.watch(source)
        moved = pulse.clock
        nap = 0.002

        def found(store: Store) -> str | None:
            return next((key for key in keys if store.check([self._key(key)])), None)

        while (key := self._line(found)) is None:
            self.check()
            progress = pulse.active_at(source)
            if progress > moved:
                moved = progress
                if self.leads and source != self.rank:
                    # A rank that waits for the leader also waits for this rank.
                    self.active()
            if pulse.clock - moved > self.timeout:
                what = "has made no progress" if progress else "has sent no heartbeat"
                waited = f"{pulse.clock - moved:.0f} s (--timeout)"
                raise RankFailed(f"rank {source} {what} for {waited}", hint=SEE_THERE)
            self.clock.sleep(nap)
            nap = min(nap * 1.5, _LONGEST_NAP)
        return key

    def gather(self, key: str, value: object) -> list[Any] | None:
        """The leader gets every rank's value, by rank; the others put theirs and go on."""
        if not self.leads:
            self.put(f"{key}/{self.rank}", value)
            return None
        others = (self.get(f"{key}/{rank}", rank) for rank in range(1, self.size))
        return [value, *others]

    def all_gather(self, key: str, value: object) -> list[Any]:
        """Every rank gets every rank's value, by rank."""
        values = self.gather(key, value)
        if values is not None:
            self.put(f"{key}/all", values)
            return values
        return list(self.get(f"{key}/all"))

    def active(self, nbytes: int = 0) -> None:
        """Note that this rank made progress, and how many bytes it finished."""
        self._pulse.active(nbytes)

    def nbytes(self) -> int:
        """Bytes that all ranks have reported as finished; for the leader."""
        return self._pulse.nbytes()

    def check(self) -> None:
        """Raise RankFailed if a rank has failed."""
        if self.failed.is_set():
            raise self._first() or self._line.failure()

    def fail(self, error: BaseException) -> BaseException:
        """Report to all ranks that this one failed, unless one did before. The leader waits until they stop.

        Returns:
            The error, or the first failure if the error only follows from it.
        """
        if not self._told:
            self._told = True
            with suppress(RankFailed):  # the store is lost, and the others notice
                self._pulse.report(described(self.rank, error))
                self._set(f"stopped/{self.rank}", "1")
                if self.leads:
                    self._until(self._others_stopped, _STOP_SECONDS)
            self.failed.set()
        first = self._first()
        follows = isinstance(error, RankFailed) and first is not None and first.fact != error.fact
        return first if follows and first is not None else error

    @contextmanager
    def ending_all(self) -> Iterator[None]:
        """End every rank if the block raises, before the caller cleans up.

        Raises:
            RankFailed: the first failure, in place of an error that only follows from it.
        """
        try:
            yield
        except BaseException as error:
            failure = self.fail(error)
            if failure is error:
                raise
            raise failure from error

    def _first(self) -> RankFailed | None:
        failure = self._pulse.failure
        return None if failure is None else as_error(failure, self.rank)

    def _part(self) -> bool:
        """Leave after a failure; returns whether another rank tells the user of it.

        The leader leaves first, because a launcher ends all ranks when one has left.
        """
        if self.leads:
            with suppress(RankFailed):
                self._set("over", "1")
            return False
        try:
            self._until(lambda: self._is_over() or self._is_gone(LEADER), _OVER_SECONDS)
            told = self._is_over() or not self._pulse.reported
        except RankFailed:
            if self._pulse.failure is None:
                # The store is lost, so one rank of each machine tells it.
                told = os.environ.get("LOCAL_RANK", "0") != "0"
            else:
                told = not self._pulse.reported
        if told:
            self.clock.sleep(_LAST_WORDS_SECONDS)
        return told

    def _is_over(self) -> bool:
        return self._line(lambda store: store.check([self._key("over")]))

    def _is_gone(self, rank: int) -> bool:
        return self._pulse.silence(rank) > _GONE_SECONDS

    def _others_stopped(self) -> bool:
        alive = [rank for rank in range(self.size) if rank != self.rank and not self._is_gone(rank)]
        keys = [self._key(f"stopped/{rank}") for rank in alive]
        return not keys or self._line(lambda store: store.check(keys))

    def _until(self, true: Callable[[], bool], seconds: float) -> None:
        deadline = self.clock.now() + seconds
        while not true() and self.clock.now() < deadline:
            self.clock.sleep(0.02)

    def _key(self, key: str) -> str:
        return f"ckpt-tools/{self.session_number}/{key}"
