"""Bytes that only one process can reach, sent to those that write them.

Each rank offers places (``Place``): directories of its machine, its own memory. To
the others each is a place like any, whose files are read by asking that rank: a request of a fixed size, an
answer of as many bytes as were asked for, at most :data:`REQUEST_BYTES`. Both travel through
torch.distributed with gloo, because the bytes are in host memory, in a group of this module's own, so that a
training that runs is not disturbed. A thread of each rank answers while the rank writes its own share. Knows
paths, offsets and ranks; knows nothing of what the files are.
"""

from __future__ import annotations

import errno
import itertools
import json
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

from ckpt_tools.errors import RankFailed
from ckpt_tools.ranks.line import first_line
from ckpt_tools.ranks.pulse import SEE_THERE
from ckpt_tools.ranks.session import Ranks
from ckpt_tools.storage.places import LOCAL, FileFacts, Place, Readable, Requests, read_fully

if TYPE_CHECKING:
    import torch

REQUEST_BYTES = 4 << 20
_HEADER_BYTES = 4 << 10
_REQUEST_TAG = 1
_BREAK_TAG = 2
_FIRST_ANSWER_TAG = 16
_ANSWERS_AT_ONCE = 4
# A request may come at any time until the session ends, which has limits of its own.
_FOREVER = timedelta(days=365)
_LOOK_SECONDS = 0.2
# Ranks that can reach each other have done so by then.
_CONNECT_SECONDS = 120.0
# What made a connection break is told by the rank that it happened to.
_HEAR_SECONDS = 2.0

# The group of the ranks' last exchange, and the session that it was made in: a training has many.
_kept: WeakKeyDictionary[Ranks, tuple[int, Any]] = WeakKeyDictionary()


class Exchange:
    """What this rank offers, and what the others do. All ranks make and leave it together.

    Args:
        ranks: the ranks, in a session.
        offered: places that this rank lets the others read; each rank offers as many.

    Attributes:
        listings: of each rank, the files of each place that it offers.
    """

    def __init__(self, ranks: Ranks, *offered: Place) -> None:
        self._ranks = ranks
        self._offered = offered
        kept = _kept.get(ranks)
        told = ranks.all_gather("offered", ([*map(_listed, offered)], kept and kept[0]))
        self.listings: list[list[Mapping[str, FileFacts]]] = [listings for listings, _ in told]
        # After a failure some have a group that others have lost.
        if kept is None or any(made != kept[0] for _, made in told):
            kept = _kept[ranks] = (ranks.session_number, _gloo_group(ranks))
        self._group = kept[1]
        self._tags = itertools.count(_FIRST_ANSWER_TAG)
        self._ended = threading.Event()
        self._server = threading.Thread(target=self._serve, name="exchange", daemon=True)
        self._server.start()
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
            # Told before it is felt: whoever waits for an answer then knows why it does not come.
            failure = self._ranks.fail(error)
            if failure is not error:
                raise failure from error
        finally:
            if not whole:
                self._break()
            self._ended.set()
            self._watch.join()

    def place(self, label: str, sources: tuple[int, ...], number: int = 0) -> Place:
        """What ranks offer that all see the same files, as a place of this process.

        Args:
            label: what it is called in messages.
            sources: those ranks; one of them is asked, another by another rank.
            number: which of the places that they offer.
        """
        source = sources[self._ranks.rank % len(sources)]
        return _Elsewhere(self, label, source, number)

    def ask(
        self, source: int, number: int, relative: str, view: memoryview, offset: int, tag: int
    ) -> int:
        """Fill ``view`` from a file of a place that rank ``source`` offers; bytes read, 0 at the end.

        Raises:
            OSError: that rank cannot read it.
            RankFailed: that rank is gone.
        """
        import torch

        count = torch.zeros(1, dtype=torch.int64)
        with self._lost(f"asked rank {source} for {relative} and got no answer"):
            request = _packed([number, relative, offset, len(view), tag])
            self._wait(self._group.send([request], source, _REQUEST_TAG))
            self._wait(self._group.recv([count], source, tag))
            found = int(count)
            if found > 0:
                into = torch.frombuffer(view, dtype=torch.uint8, count=found)
                self._wait(self._group.recv([into], source, tag))
        self._ranks.active()
        if found < 0:
            raise OSError(-found, "the rank that has it cannot read it", relative)
        return found

    def _wait(self, work: Any) -> None:
        work.wait(timedelta(seconds=self._ranks.timeout))

    @contextmanager
    def _lost(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo's errors are of this class
            self._ranks.failed.wait(_HEAR_SECONDS)
            self._ranks.check()
            raise RankFailed(f"rank {self._ranks.rank} {what}", hint=SEE_THERE) from error

    def next_tag(self) -> int:
        """A tag for the answers to one open file."""
        return next(self._tags)

    def _serve(self) -> None:
        import torch

        request = torch.empty(_HEADER_BYTES, dtype=torch.uint8)
        # A group that is gone ends it: whoever waits for this rank finds out.
        with suppress(RuntimeError), ThreadPoolExecutor(_ANSWERS_AT_ONCE) as pool:
            while True:
                asked = self._group.recv_anysource([request], _REQUEST_TAG)
                asked.wait(_FOREVER)
                message = json.loads(bytes(request.numpy()).rstrip(b"\0"))
                if message is None:
                    return
                pool.submit(self._answer, asked._source_rank(), *message)

    def _answer(
        self, asker: int, number: int, relative: str, offset: int, nbytes: int, tag: int
    ) -> None:
        import torch

        buffer = bytearray(nbytes)
        try:
            with closing(self._offered[number].open(relative)) as file:
                count = read_fully(file, memoryview(buffer), offset)
        except Exception as error:  # whatever it is, somebody waits for an answer
            count = -(getattr(error, "errno", None) or errno.EIO)
        with suppress(RuntimeError):
            self._wait(self._group.send([torch.tensor([count])], asker, tag))
            if count > 0:
                data = torch.frombuffer(buffer, dtype=torch.uint8, count=count)
                self._wait(self._group.send([data], asker, tag))
        self._ranks.active()

    def _close(self) -> None:
        # Nobody asks any longer once all are here.
        self._ranks.all_gather("asked", None)
        with self._lost("could not tell its neighbour that nothing more is asked"):
            self._wait(self._group.send([_packed(None)], self._neighbour, _REQUEST_TAG))
        while self._server.is_alive():
            self._server.join(_LOOK_SECONDS)
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
        """End every wait for an answer, here and at the others.

        gloo has no way to call off a wait, but one that takes too long closes all connections of its group.
        """
        import torch

        _kept.pop(self._ranks, None)
        with suppress(RuntimeError):
            never = self._group.recv([torch.empty(1)], self._neighbour, _BREAK_TAG)
            never.wait(timedelta(milliseconds=1))


@dataclass(frozen=True)
class _Elsewhere:
    """What another rank offers.

    Attributes:
        exchange: how it is asked.
        label: what it is called in messages.
        source: the rank.
        number: which of the places that it offers.
    """

    exchange: Exchange
    label: str
    source: int
    number: int
    requests: ClassVar[Requests] = LOCAL

    def listing(self) -> Mapping[str, FileFacts]:
        """See :meth:`ckpt_tools.storage.places.Place.listing`."""
        return self.exchange.listings[self.source][self.number]

    def open(self, relative: str) -> Readable:
        """See :meth:`ckpt_tools.storage.places.Place.open`."""
        return _Asked(self.exchange, self.source, self.number, relative)


class _Asked:
    """A file of another rank, open for reading."""

    def __init__(self, exchange: Exchange, source: int, number: int, relative: str) -> None:
        self._exchange, self._source = exchange, source
        self._number, self._relative = number, relative
        self._tag = exchange.next_tag()
        self._lock = threading.Lock()

    def read_into(self, view: memoryview, offset: int) -> int:
        """See :meth:`ckpt_tools.storage.places.Readable.read_into`."""
        with self._lock:  # answers to two requests of one tag could not be told apart
            part = view[:REQUEST_BYTES]
            return self._exchange.ask(
                self._source, self._number, self._relative, part, offset, self._tag
            )

    def close(self) -> None:
        """Nothing is held."""


def _listed(place: Place) -> dict[str, FileFacts]:
    try:
        return dict(place.listing().items())
    except OSError:
        return {}  # this rank has nothing: what is missing is for the reader to say


def _gloo_group(ranks: Ranks) -> Any:
    """A gloo group of all ranks. Until the last has connected, each waits in C++."""
    from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo

    made: Future[Any] = Future()
    limit = timedelta(seconds=min(ranks.timeout, _CONNECT_SECONDS))

    def make() -> None:
        try:
            # A store of its own: a wait of gloo's must not hold up the signs of life.
            store = ranks.store.clone() if hasattr(ranks.store, "clone") else ranks.store
            store = PrefixStore(f"ckpt-tools/{ranks.session_number}/gloo", store)
            made.set_result(ProcessGroupGloo(store, ranks.rank, ranks.size, limit))
        except BaseException as error:
            made.set_exception(error)

    threading.Thread(target=make, name="gloo", daemon=True).start()
    while not made.done():
        wait([made], _LOOK_SECONDS)
        ranks.check()
    try:
        return made.result()
    except (RuntimeError, ValueError) as error:
        raise RankFailed(
            f"rank {ranks.rank} cannot connect to the others through gloo ({first_line(error)})",
            hint="GLOO_SOCKET_IFNAME names the network interface that they share.",
        ) from error


def _packed(message: object) -> torch.Tensor:
    import torch

    text = json.dumps(message).encode()
    if len(text) > _HEADER_BYTES:
        raise OSError(errno.ENAMETOOLONG, "the path is too long for a request")
    return torch.frombuffer(bytearray(text.ljust(_HEADER_BYTES, b"\0")), dtype=torch.uint8)
