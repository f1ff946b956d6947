"""Bytes that only one process can reach, sent to those that write them.

Each rank offers a :class:`~ckpt_tools.places.Place`: a directory of its machine, its own memory. To the
others it is a place like any, whose files are read by asking that rank: a request of a fixed size, an
answer of as many bytes as were asked for, at most :data:`REQUEST_BYTES`. Both travel through
torch.distributed with gloo, because the bytes are in host memory. A thread of each rank answers while the
rank writes its own share. Knows paths, offsets and ranks; knows nothing of what the files are.
"""

from __future__ import annotations

import errno
import itertools
import json
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

from ckpt_tools.errors import RankFailed
from ckpt_tools.places import FileFacts, Place, Readable, read_fully
from ckpt_tools.ranks.session import Ranks

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

REQUEST_BYTES = 4 << 20
_HEADER_BYTES = 4 << 10
_REQUEST_TAG = 1
_FIRST_ANSWER_TAG = 16
_ANSWERS_AT_ONCE = 4
# A request may come at any time until the session ends, which has limits of its own.
_FOREVER = timedelta(days=365)


class Exchange:
    """What this rank offers, and what the others do. All ranks make and leave it together.

    Args:
        ranks: the ranks, in a session.
        offered: what this rank lets the others read.

    Attributes:
        listings: of each rank, what it offers.
    """

    def __init__(self, ranks: Ranks, offered: Place) -> None:
        self._ranks = ranks
        self._offered = offered
        self.listings: list[Mapping[str, FileFacts]] = ranks.all_gather("offered", _listed(offered))
        self._group, self._owned = _gloo_group(ranks)
        self._tags = itertools.count(_FIRST_ANSWER_TAG)
        self._server = threading.Thread(target=self._serve, name="exchange", daemon=True)
        self._server.start()

    def __enter__(self) -> Exchange:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._close()

    def place(self, label: str, sources: tuple[int, ...]) -> Place:
        """What ranks offer that all see the same files, as a place of this process.

        Args:
            label: what it is called in messages.
            sources: those ranks; one of them is asked, another by another rank.
        """
        source = sources[self._ranks.rank % len(sources)]
        return _Elsewhere(self, label, source)

    def ask(self, source: int, relative: str, view: memoryview, offset: int, tag: int) -> int:
        """Fill ``view`` from a file that rank ``source`` offers; bytes read, 0 at the end.

        Raises:
            OSError: that rank cannot read it.
            RankFailed: that rank is gone.
        """
        import torch
        import torch.distributed as dist

        count = torch.zeros(1, dtype=torch.int64)
        try:
            dist.send(_packed(relative, offset, len(view), tag), source, self._group, _REQUEST_TAG)
            dist.recv(count, source, self._group, tag)
            found = int(count)
            if found > 0:
                into = torch.frombuffer(view, dtype=torch.uint8, count=found)
                dist.recv(into, source, self._group, tag)
        except RuntimeError as error:
            self._ranks.check()
            raise RankFailed(
                f"rank {self._ranks.rank} asked rank {source} for {relative} and got no answer",
                hint="See what that rank or its machine says, and start again with --resume.",
            ) from error
        if found < 0:
            raise OSError(-found, "the rank that has it cannot read it", relative)
        return found

    def next_tag(self) -> int:
        """A tag for the answers to one open file."""
        return next(self._tags)

    def _serve(self) -> None:
        import torch
        import torch.distributed as dist

        request = torch.empty(_HEADER_BYTES, dtype=torch.uint8)
        with ThreadPoolExecutor(_ANSWERS_AT_ONCE) as pool:
            # The peer is gone, or the group: whoever waits for this rank finds out.
            with suppress(RuntimeError):
                while True:
                    asker = dist.recv(request, None, self._group, _REQUEST_TAG)
                    message = json.loads(bytes(request.numpy()).rstrip(b"\0"))
                    if message is None:
                        return
                    pool.submit(self._answer, asker, *message)

    def _answer(self, asker: int, relative: str, offset: int, nbytes: int, tag: int) -> None:
        import torch
        import torch.distributed as dist

        buffer = bytearray(nbytes)
        try:
            with closing(self._offered.open(relative)) as file:
                count = read_fully(file, memoryview(buffer), offset)
        except OSError as error:
            count = -(error.errno or errno.EIO)
        with suppress(RuntimeError):
            dist.send(torch.tensor([count]), asker, self._group, tag)
            if count > 0:
                data = torch.frombuffer(buffer, dtype=torch.uint8, count=count)
                dist.send(data, asker, self._group, tag)
        self._ranks.active()

    def _close(self) -> None:
        import torch.distributed as dist

        # Nobody asks any longer once all are here.
        self._ranks.all_gather("asked", None)
        neighbour = (self._ranks.rank + 1) % self._ranks.size
        dist.send(_packed_message(None), neighbour, self._group, _REQUEST_TAG)
        self._server.join(self._ranks.timeout)
        self._ranks.all_gather("served", None)
        if self._owned:
            dist.destroy_process_group(self._group)


@dataclass(frozen=True)
class _Elsewhere:
    """What another rank offers.

    Attributes:
        exchange: how it is asked.
        label: what it is called in messages.
        source: the rank.
    """

    exchange: Exchange
    label: str
    source: int

    def listing(self) -> Mapping[str, FileFacts]:
        """See :meth:`ckpt_tools.places.Place.listing`."""
        return self.exchange.listings[self.source]

    def open(self, relative: str) -> Readable:
        """See :meth:`ckpt_tools.places.Place.open`."""
        return _Asked(self.exchange, self.source, relative)


class _Asked:
    """A file of another rank, open for reading."""

    def __init__(self, exchange: Exchange, source: int, relative: str) -> None:
        self._exchange, self._source, self._relative = exchange, source, relative
        self._tag = exchange.next_tag()
        self._lock = threading.Lock()

    def read_into(self, view: memoryview, offset: int) -> int:
        """See :meth:`ckpt_tools.places.Readable.read_into`."""
        with self._lock:  # answers to two requests of one tag could not be told apart
            part = view[:REQUEST_BYTES]
            return self._exchange.ask(self._source, self._relative, part, offset, self._tag)

    def close(self) -> None:
        """Nothing is held."""


def _listed(place: Place) -> dict[str, FileFacts]:
    try:
        return dict(place.listing().items())
    except OSError:
        return {}  # this rank has nothing: what is missing is for the reader to say


def _gloo_group(ranks: Ranks) -> tuple[ProcessGroup | None, bool]:
    """A gloo group of all ranks, None for the default one; and whether it is this module's to destroy."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    try:
        if not dist.is_initialized():
            dist.init_process_group(
                "gloo",
                store=PrefixStore("ckpt-tools-gloo", ranks.store),
                rank=ranks.rank,
                world_size=ranks.size,
                timeout=_FOREVER,
            )
            return None, False
        return dist.new_group(backend="gloo", timeout=_FOREVER), True
    except (RuntimeError, ValueError) as error:
        raise RankFailed(
            f"rank {ranks.rank} cannot connect to the others through gloo ({error})",
            hint="GLOO_SOCKET_IFNAME names the network interface that they share.",
        ) from error


def _packed(relative: str, offset: int, nbytes: int, tag: int) -> torch.Tensor:
    return _packed_message([relative, offset, nbytes, tag])


def _packed_message(message: object) -> torch.Tensor:
    import torch

    text = json.dumps(message).encode()
    if len(text) > _HEADER_BYTES:
        raise OSError(errno.ENAMETOOLONG, "the path is too long for a request")
    return torch.frombuffer(bytearray(text.ljust(_HEADER_BYTES, b"\0")), dtype=torch.uint8)
