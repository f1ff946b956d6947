"""Owns the exchange of bytes that only one process can read, and that other ranks write.

Each rank offers places (``Place``): directories of its machine, its own memory. The other ranks use them as
places whose files are read by a request to that rank. A request has a fixed size; the answer has as many
bytes as were requested, at most :data:`REQUEST_BYTES`. Both use torch.distributed with gloo, because the
bytes are in host memory. The process group is this module's own, so that it does not disturb a training that
runs. Threads of each rank answer while the rank writes its own share.

gloo sends a message only after the receiver has said that it waits for it. On a busy link this takes tens of
milliseconds, because it stands in line behind data. So several requests can be received at a time, and who
asks waits for the whole answer before it sends the request.

gloo cannot cancel a wait. When a connection closes, gloo ends the waits for messages that have not begun, but
never the wait for one that has come in part, or that has left in part. So other threads wait, and who needs
the result leaves them behind when a rank fails.

Source: ``gloo/transport/tcp/pair.cc`` (``signalException`` does not look at the operation under way, and
``context.cc`` not at the requests from any rank).
"""

from __future__ import annotations

import errno
import itertools
import json
import threading
from collections.abc import Iterator, Mapping
from concurrent import futures
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar
from weakref import WeakKeyDictionary

from ckpt_tools.errors import RankFailed
from ckpt_tools.ranks.aside import Aside
from ckpt_tools.ranks.line import first_line
from ckpt_tools.ranks.pulse import SEE_THERE
from ckpt_tools.ranks.session import Ranks
from ckpt_tools.storage.places import FileFacts, Place, Readable, Requests, read_fully

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

REQUEST_BYTES = 4 << 20
_HEADER_BYTES = 4 << 10
_REQUEST_TAG = 1
_BREAK_TAG = 2
_FIRST_ANSWER_TAG = 16
_ANSWERS_AT_ONCE = 4
# Two keep a link busy. This rank's own requests stand in line behind what is sent.
_SENDS_AT_ONCE = 2
_REQUESTS_AT_ONCE = 16
# A link of 1 Gb/s carries 5 MB in the time of a request, when both directions are busy.
_REMOTE = Requests(at_once=4, threads=8, buffer_bytes=48 << 20)
# A request may come at any time until the session ends. The session has its own limits.
_FOREVER = timedelta(days=365)
_LOOK_SECONDS = 0.2
# Ranks that can connect have connected by then.
_CONNECT_SECONDS = 120.0
# The rank where a connection broke reports the reason within this time.
_HEAR_SECONDS = 2.0

# The group of the ranks' last exchange, and the session that made it: a training has many sessions.
_kept: WeakKeyDictionary[Ranks, tuple[int, Any]] = WeakKeyDictionary()


class Exchange:
    """The places that all ranks offer. All ranks make and leave it together.

    Args:
        ranks: the ranks, in a session.
        offered: places that this rank lets the others read; each rank offers the same number.

    Attributes:
        listings: for each rank, the files of each place that it offers.
    """

    def __init__(self, ranks: Ranks, *offered: Place) -> None:
        self._ranks = ranks
        self._offered = offered
        kept = _kept.get(ranks)
        told = ranks.all_gather("offered", ([*map(_listed, offered)], kept and kept[0]))
        self.listings: list[list[Mapping[str, FileFacts]]] = [listings for listings, _ in told]
        # After a failure some ranks have a group that others have lost.
        if kept is None or any(made != kept[0] for _, made in told):
            kept = _kept[ranks] = (ranks.session_number, _gloo_group(ranks))
        self._group = kept[1]
        self._tags = itertools.count(_FIRST_ANSWER_TAG)
        self._ended = threading.Event()
        self._waits = Aside("wait")
        self._answers = Aside("answer", _ANSWERS_AT_ONCE)
        self._sends = threading.Semaphore(_SENDS_AT_ONCE)
        self._servers = [
            threading.Thread(target=self._serve, name="exchange", daemon=True)
            for _ in range(_REQUESTS_AT_ONCE)
        ]
        for server in self._servers:
            server.start()
        self._watch = threading.Thread(target=self._break_on_failure, name="watch", daemon=True)
        self._watch.start()

    def __enter__(self) -> Exchange:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        whole = False
        try:
            if error is None:
                self._close()
                whole = True
                return
            # Report the failure before breaking the group: a rank that waits then knows the reason.
            failure = self._ranks.fail(error)
            if failure is not error:
                raise failure from error
        finally:
            if not whole:
                self._break()
            self._ended.set()
            self._watch.join()
            self._answers.close()
            self._waits.close()
            # After a failure the servers wait for ever. They must not hold what a place has in memory.
            self._offered = ()

    def place(self, label: str, sources: tuple[int, ...], number: int = 0) -> Place:
        """A place that several ranks offer with the same files, as a place of this process.

        Args:
            label: its name in messages.
            sources: those ranks. This rank asks one of them; other ranks may ask another one.
            number: index among the places that a rank offers.
        """
        source = sources[self._ranks.rank % len(sources)]
        return _Elsewhere(self, label, source, number)

    def ask(
        self, source: int, number: int, relative: str, view: memoryview, offset: int, tag: int
    ) -> int:
        """Fill ``view`` from a file that rank ``source`` offers; returns the bytes read, 0 at the end.

        Raises:
            OSError: that rank cannot read the file.
            RankFailed: that rank is lost.
        """
        import torch

        count = torch.zeros(1, dtype=torch.int64)
        into = torch.frombuffer(view, dtype=torch.uint8)
        request = _packed([number, relative, offset, len(view), tag])
        with self._lost(f"asked rank {source} for {relative} and got no answer"):
            answer = [self._group.recv([part], source, tag) for part in (count, into)]
            self._wait(self._group.send([request], source, _REQUEST_TAG), *answer)
        found = int(count)
        self._ranks.active()
        if found < 0:
            raise OSError(-found, "the rank that holds the file cannot read it", relative)
        return found

    def _wait(self, *works: Any) -> None:
        limit = timedelta(seconds=self._ranks.timeout)

        def finish() -> None:
            for work in works:
                work.wait(limit)

        _result(self._waits(finish), self._ranks)

    @contextmanager
    def _lost(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo's errors are of this class
            self._ranks.failed.wait(_HEAR_SECONDS)
            self._ranks.check()
            raise RankFailed(f"rank {self._ranks.rank} {what}", hint=SEE_THERE) from error

    def next_tag(self) -> int:
        """A tag for the answer to one request: several are under way at a time."""
        return next(self._tags)

    def _serve(self) -> None:
        import torch

        request = torch.empty(_HEADER_BYTES, dtype=torch.uint8)
        # A group that was lost before the call ends the loop. A rank that waits for this one notices.
        with suppress(RuntimeError):
            while True:
                asked = self._group.recv_anysource([request], _REQUEST_TAG)
                asked.wait(_FOREVER)
                message = json.loads(bytes(request.numpy()).rstrip(b"\0"))
                if message is None:
                    return
                answer = partial(self._answer, asked._source_rank(), *message)
                self._answers(answer)

    def _answer(
        self, asker: int, number: int, relative: str, offset: int, nbytes: int, tag: int
    ) -> None:
        import torch

        buffer = bytearray(nbytes)
        try:
            with closing(self._offered[number].open(relative)) as file:
                count = read_fully(file, memoryview(buffer), offset)
        except Exception as error:  # of any kind: a rank waits for an answer
            count = -(getattr(error, "errno", None) or errno.EIO)
        # All of the buffer: the receiver waits for that many bytes, also where the file ends before.
        answer = (torch.tensor([count]), torch.frombuffer(buffer, dtype=torch.uint8))
        with suppress(RuntimeError, RankFailed), self._sends:
            self._wait(*[self._group.send([part], asker, tag) for part in answer])
        self._ranks.active()

    def _close(self) -> None:
        # After this no rank sends a request.
        self._ranks.all_gather("asked", None)
        with self._lost("could not send the end of requests to its neighbour"):
            for _ in self._servers:
                self._wait(self._group.send([_packed(None)], self._neighbour, _REQUEST_TAG))
        for server in self._servers:
            while server.is_alive():
                server.join(_LOOK_SECONDS)
                self._ranks.check()
        self._ranks.all_gather("served", None)

    @property
    def _neighbour(self) -> int:
        return (self._ranks.rank + 1) % self._ranks.size

    def _break_on_failure(self) -> None:
        while not self._ended.wait(_LOOK_SECONDS):
            if self._ranks.failed.is_set():
                self._break()
                return

    def _break(self) -> None:
        """Close the connections to all ranks: a wait that times out does so.

        This ends their waits for messages that have not begun. For the others see :func:`_result`.
        """
        import torch

        _kept.pop(self._ranks, None)
        with suppress(RuntimeError):
            never = self._group.recv([torch.empty(1)], self._neighbour, _BREAK_TAG)
            never.wait(timedelta(milliseconds=1))


@dataclass(frozen=True)
class _Elsewhere:
    """A place of another rank.

    Attributes:
        exchange: sends the requests.
        label: its name in messages.
        source: the rank.
        number: index among the places that the rank offers.
    """

    exchange: Exchange
    label: str
    source: int
    number: int
    requests: ClassVar[Requests] = _REMOTE

    def listing(self) -> Mapping[str, FileFacts]:
        """See :meth:`ckpt_tools.storage.places.Place.listing`."""
        return self.exchange.listings[self.source][self.number]

    def open(self, relative: str) -> Readable:
        """See :meth:`ckpt_tools.storage.places.Place.open`."""
        facts = self.listing().get(relative)
        size = None if facts is None else facts.size
        return _Asked(self.exchange, self.source, self.number, relative, size)


class _Asked:
    """A file of another rank, open for reading."""

    def __init__(
        self, exchange: Exchange, source: int, number: int, relative: str, size: int | None
    ) -> None:
        self._exchange, self._source = exchange, source
        self._number, self._relative, self._size = number, relative, size

    def read_into(self, view: memoryview, offset: int) -> int:
        """See :meth:`ckpt_tools.storage.places.Readable.read_into`."""
        # An answer is as long as its request, so none is asked for beyond the end.
        left = REQUEST_BYTES if self._size is None else max(self._size - offset, 0)
        part = view[: min(left, REQUEST_BYTES)]
        if not part:
            return 0
        tag = self._exchange.next_tag()
        return self._exchange.ask(self._source, self._number, self._relative, part, offset, tag)

    def close(self) -> None:
        """Nothing is held."""


def _listed(place: Place) -> dict[str, FileFacts]:
    try:
        return dict(place.listing().items())
    except OSError:
        return {}  # this rank has no files; the reader reports the missing ones


def _gloo_group(ranks: Ranks) -> Any:
    """A gloo group of all ranks. Each rank waits in C++ until the last has connected."""
    from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo

    limit = timedelta(seconds=min(ranks.timeout, _CONNECT_SECONDS))

    def make() -> Any:
        # A separate connection to the store: a wait of gloo must not delay the heartbeats.
        store = ranks.store.clone() if hasattr(ranks.store, "clone") else ranks.store
        store = PrefixStore(f"ckpt-tools/{ranks.session_number}/gloo", store)
        return ProcessGroupGloo(store, ranks.rank, ranks.size, limit)

    connect = Aside("connect")
    try:
        return _result(connect(make), ranks)
    except (RuntimeError, ValueError) as error:
        raise RankFailed(
            f"rank {ranks.rank} cannot connect to the others through gloo ({first_line(error)})",
            hint="Set GLOO_SOCKET_IFNAME to the network interface that the ranks share.",
        ) from error
    finally:
        connect.close()


def _result(done: Future[T], ranks: Ranks) -> T:
    """The result of a call that waits in C++; such a call is left behind when a rank fails.

    Raises:
        RankFailed: a rank has failed.
    """
    while not done.done():
        with suppress(futures.TimeoutError):
            done.exception(_LOOK_SECONDS)
        ranks.check()
    return done.result()


def _packed(message: object) -> torch.Tensor:
    import torch

    text = json.dumps(message).encode()
    if len(text) > _HEADER_BYTES:
        raise OSError(errno.ENAMETOOLONG, "the path is too long for a request")
    return torch.frombuffer(bytearray(text.ljust(_HEADER_BYTES, b"\0")), dtype=torch.uint8)
