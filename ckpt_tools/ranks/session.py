"""Messages between ranks, signs of life, and how a failure of one becomes the end of all.

Owns the store's keys. Every rank has a thread that gives a sign of life and looks for the failure of
another; every wait ends when the value is there, when a rank has failed, when the rank that is waited for
gives no sign of life, or when it has made no progress for as long as :attr:`Ranks.timeout`.

Sources: ``torch/distributed/rendezvous.py`` (the store that torchrun's agents share),
``torch/csrc/distributed/c10d/TCPStore.cpp`` (values of at most 8 MB).
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ckpt_tools.errors import CkptError, RankFailed

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_BEAT_SECONDS = 0.5
# A thread beats this often even in a busy process; a machine that is silent for so long is gone.
_DEAD_SECONDS = 20.0
_HEARD_SECONDS = 2.0
_LAST_WORDS_SECONDS = 0.3
_LONGEST_NAP = 0.2
_CHUNK_BYTES = 4 << 20
_FAILED = "failed"
LEADER = 0


def from_environment(timeout: float) -> Ranks | None:
    """The ranks of the torchrun that started this process; None where none did, or only one rank.

    Args:
        timeout: seconds that any wait may last without progress.

    Raises:
        RankFailed: the others do not answer.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if "TORCHELASTIC_RUN_ID" not in os.environ or size < 2:
        return None
    from torch.distributed.rendezvous import rendezvous

    rank = int(os.environ["RANK"])
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
    except Exception as error:  # whatever the store's backend raises
        raise RankFailed(
            f"rank {rank} cannot reach the others ({_first_line(error)})",
            hint="MASTER_ADDR and MASTER_PORT must be reachable from every machine.",
        ) from error
    machine = os.environ.get("GROUP_RANK", socket.gethostname())
    return Ranks(store, rank, size, machine, timeout)


class Ranks:
    """This process among those that carry out one command.

    Args:
        store: what all of them share.
        rank: number of this process; the one of rank 0 leads.
        size: number of processes.
        machine: what the processes of one machine have in common.
        timeout: seconds that any wait may last without progress.

    Attributes:
        failed: set once any rank has failed.
        names: name of the machine of each rank, known in a session.
        machines: the same as numbers from 0.
        session_number: how many sessions there have been, this one included.
    """

    def __init__(self, store: Store, rank: int, size: int, machine: str, timeout: float) -> None:
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self.failed = threading.Event()
        self.session_number = 0
        self._activity = 0
        self._nbytes = 0
        self._beats = 0
        self._seen: dict[int, tuple[tuple[int, int], float, float]] = {}
        self._answered = False
        self._reported = False
        self.machine = machine
        self.names: tuple[str, ...] = ()
        self.machines: tuple[int, ...] = ()

    @property
    def leads(self) -> bool:
        """Whether this is the rank that plans, reports and publishes."""
        return self.rank == LEADER

    @contextmanager
    def session(self) -> Iterator[None]:
        """One command. All ranks enter and leave it together; a failure in one is raised in all.

        Raises:
            RankFailed: another rank failed, was lost, or made no progress.
        """
        self.session_number += 1
        self.failed.clear()
        self._seen.clear()
        self._answered = self._reported = False
        ended = threading.Event()
        pulse = threading.Thread(target=self._pulse, args=(ended,), name="pulse", daemon=True)
        self._beat()
        pulse.start()
        try:
            self.names = tuple(self.all_gather("machine", self.machine))
            order = list(dict.fromkeys(self.names))
            self.machines = tuple(order.index(name) for name in self.names)
            yield
            self.all_gather("end", None)
        except BaseException as error:
            self.fail(error)
            raise
        finally:
            ended.set()
            pulse.join()
            if self.failed.is_set():
                self._part()

    def put(self, key: str, value: object) -> None:
        """Give a value to whoever asks for ``key``."""
        data = zlib.compress(pickle.dumps(value), 1)
        chunks = [data[i : i + _CHUNK_BYTES] for i in range(0, len(data), _CHUNK_BYTES)]
        with self._lost():
            for index, chunk in enumerate(chunks):
                self.store.set(self._key(f"{key}/{index}"), chunk)  # type: ignore[arg-type]  # bytes are
            self.store.set(self._key(key), str(len(chunks)))
        self.active()

    def get(self, key: str, source: int = LEADER) -> Any:
        """The value that rank ``source`` put under ``key``; waits for it.

        Raises:
            RankFailed: it will not come.
        """
        self.first((key,), source)
        with self._lost():
            count = int(self.store.get(self._key(key)))
            data = b"".join(self.store.get(self._key(f"{key}/{i}")) for i in range(count))
        # Put there by this module in a process of the same command, as torch's own collectives of objects do.
        return pickle.loads(zlib.decompress(data))  # noqa: S301

    def first(self, keys: Sequence[str], source: int = LEADER) -> str:
        """Which of ``keys`` rank ``source`` put there; waits for one.

        Raises:
            RankFailed: none will come.
        """
        nap = 0.002
        self._seen.pop(source, None)
        while True:
            with self._lost():
                for key in keys:
                    if self.store.check([self._key(key)]):
                        return key
            self.check()
            silent = self._silent(source)
            if silent is not None:
                raise RankFailed(
                    f"rank {source} {silent}",
                    hint="See what it or its machine says, and start again with --resume.",
                )
            time.sleep(nap)
            nap = min(nap * 1.5, _LONGEST_NAP)

    def gather(self, key: str, value: object) -> list[Any] | None:
        """The leader gets every rank's value, by rank; the others give theirs and go on."""
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
        self._activity += 1
        self._nbytes += nbytes

    def nbytes(self) -> int:
        """Bytes that all ranks have finished, as far as they have said."""
        total = 0
        with self._lost():
            for rank in range(self.size):
                key = self._key(f"beat/{rank}")
                if self.store.check([key]):
                    total += json.loads(self.store.get(key))[2]
        return total

    def check(self) -> None:
        """Raise RankFailed if another rank has failed."""
        if not self.failed.is_set():
            return
        with self._lost():
            failure = json.loads(self.store.get(self._key(_FAILED)))
        if self.leads:
            with suppress(Exception):
                self.store.set(self._key("heard"), "1")
        error = RankFailed(
            f"rank {failure['rank']}: {failure['fact']}",
            path=failure["path"],
            tensor=failure["tensor"],
            hint=failure["hint"],
        )
        error.exit_code = failure["exit_code"]
        error.told_elsewhere = not self.leads
        raise error

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank failed, unless one of them has; and wait until they stopped.

        Marks ``error`` as told where the leader prints it.
        """
        if self._reported:
            return
        self._reported = True
        own = json.dumps({"rank": self.rank, **_described(error)})
        with suppress(Exception):
            first = self.store.compare_set(self._key(_FAILED), "", own)
            self.store.set(self._key(f"stopped/{self.rank}"), "1")
            if self.leads:
                self._until(lambda: all(map(self._stopped, range(1, self.size))))
            elif first == own.encode():
                heard = self._until(lambda: self.store.check([self._key("heard")]))
                if heard and isinstance(error, CkptError):
                    error.told_elsewhere = True
        self.failed.set()

    def _part(self) -> None:
        """After a failure the leader leaves first: a launcher ends all as soon as one has left."""
        with suppress(Exception):
            if self.leads:
                self.store.set(self._key("over"), "1")
            elif self._until(lambda: self.store.check([self._key("over")])):
                time.sleep(_LAST_WORDS_SECONDS)

    def _stopped(self, rank: int) -> bool:
        return self.store.check([self._key(f"stopped/{rank}")]) or self._silent(rank) is not None

    def _until(self, true: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + _HEARD_SECONDS
        while time.monotonic() < deadline:
            if true():
                return True
            time.sleep(0.02)
        return False

    def _key(self, key: str) -> str:
        return f"ckpt-tools/{self.session_number}/{key}"

    def _silent(self, rank: int) -> str | None:
        """Why a rank is not waited for any longer; None while it lives and makes progress."""
        now = time.monotonic()
        key = self._key(f"beat/{rank}")
        with self._lost():
            beat, activity = 0, 0
            if self.store.check([key]):
                beat, activity, _ = json.loads(self.store.get(key))
        (last_beat, last_activity), beat_at, active_at = self._seen.get(
            rank, ((beat, activity), now, now)
        )
        beat_at = now if beat != last_beat else beat_at
        active_at = now if activity != last_activity else active_at
        self._seen[rank] = ((beat, activity), beat_at, active_at)
        patience = min(_DEAD_SECONDS, self.timeout) if beat else self.timeout
        if now - beat_at > patience:
            return f"gives no sign of life for {now - beat_at:.0f} s"
        if now - active_at > self.timeout:
            return f"has made no progress for {now - active_at:.0f} s (--timeout)"
        return None

    def _beat(self) -> None:
        self._beats += 1
        sign = json.dumps([self._beats, self._activity, self._nbytes])
        self.store.set(self._key(f"beat/{self.rank}"), sign)

    def _pulse(self, ended: threading.Event) -> None:
        while not ended.wait(_BEAT_SECONDS):
            try:
                self._beat()
                if self.store.check([self._key(_FAILED)]):
                    self.failed.set()
            except Exception:  # the store is gone: whoever waits finds out, and says so
                self.failed.set()
                return

    @contextmanager
    def _lost(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch.distributed's errors are of this class
            raise RankFailed(
                f"rank {self.rank} lost the others ({_first_line(error)})",
                hint="The launcher or its machine is gone; start again with --resume.",
            ) from error


def _described(error: BaseException) -> dict[str, Any]:
    if isinstance(error, CkptError):
        return {
            "fact": error.fact,
            "path": None if error.path is None else str(error.path),
            "tensor": error.tensor,
            "hint": error.hint,
            "exit_code": error.exit_code,
        }
    ended = isinstance(error, (KeyboardInterrupt, SystemExit))
    fact = "was ended by a signal" if ended else f"{type(error).__name__}: {_first_line(error)}"
    code = RankFailed.exit_code
    return {"fact": fact, "path": None, "tensor": None, "hint": None, "exit_code": code}


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
