"""Owns the reading of ranges of a store's files: how large requests are, and what is kept of metadata.

Data is read in the ranges that are asked for. Metadata is read in small pieces from the ends of files; a
request for one fetches what lies near, and keeps it. At most :data:`AT_ONCE` requests with
:data:`BYTES_AT_ONCE` bytes are under way for a store, whatever the number of processors.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from ckpt_tools.storage.places import FileFacts, Requests
from ckpt_tools.storage.remote.failures import Patience
from ckpt_tools.storage.remote.stores import Store
from ckpt_tools.storage.wire import carry

T = TypeVar("T")

# Requests under way in a process, and their bytes. With torch, that is less than 500 MB in all. While some
# threads cast and write, others wait for the store. So there are many, with small blocks.
AT_ONCE = 64
BYTES_AT_ONCE = 112 << 20
REMOTE = Requests(
    nbytes=8 << 20,
    gap_bytes=128 << 10,
    at_once=AT_ONCE,
    threads=12,
    block_bytes=2 << 20,
    fetched=True,
    buffer_bytes=120 << 20,
)

# A file of this size is read at once, as fast as two parts of it.
_SMALL_BYTES = 1 << 20
# A pickle lies at the start of a torch file, the directory of a zip at the end.
_HEAD_BYTES = 128 << 10
_TAIL_BYTES = 64 << 10
# The header of a record is shorter.
_MIDDLE_BYTES = 4 << 10
_LONGEST_BYTES = 8 << 20
# What is longer is no metadata, or a pickle that is read once.
_LONG_BYTES = 1 << 20
_KEPT_BYTES = 64 << 20


@dataclass(slots=True)
class Traffic:
    """What was asked of a store.

    Attributes:
        requests: for ranges of files.
        nbytes: bytes of these ranges.
    """

    requests: int = 0
    nbytes: int = 0


class _Turns:
    """The limits of what is under way."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._count = self._nbytes = 0

    @contextmanager
    def taken(self, nbytes: int) -> Iterator[None]:
        """Wait until a request of so many bytes may begin; it ends with the block."""
        with self._free:
            self._free.wait_for(lambda: self._may_begin(nbytes))
            self._count += 1
            self._nbytes += nbytes
        try:
            yield
        finally:
            with self._free:
                self._count -= 1
                self._nbytes -= nbytes
                self._free.notify_all()

    def _may_begin(self, nbytes: int) -> bool:
        fits = self._nbytes + nbytes <= BYTES_AT_ONCE or not self._count
        return fits and self._count < AT_ONCE


class Ranges:
    """The ranges of the files of one store.

    Args:
        store: the store.
        patience: repeats requests.
        address: gives the address of a path, for messages.
    """

    def __init__(self, store: Store, patience: Patience, address: Callable[[str], str]) -> None:
        self._store, self._patience, self._address = store, patience, address
        self._turns = _Turns()
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._starts: dict[str, list[int]] = {}
        self._kept_bytes = 0
        self.traffic = Traffic()

    def read(self, path: str, view: memoryview, offset: int, facts: FileFacts) -> None:
        """Fill ``view`` from byte ``offset`` on; raises as :meth:`Patience.call`."""
        held = self._held(path, offset, len(view))
        if held is not None:
            view[:] = held
            return
        self._ask(lambda: self._store.read(path, view, offset, facts), path, len(view))

    def fetch(self, path: str, offset: int, nbytes: int, facts: FileFacts) -> memoryview:
        """Bytes in memory of their own; raises as :meth:`Patience.call`."""
        held = self._held(path, offset, nbytes)
        if held is not None:
            return held
        return self._ask(lambda: self._store.fetch(path, offset, nbytes, facts), path, nbytes)

    def _ask(self, request: Callable[[], T], path: str, nbytes: int) -> T:
        with self._turns.taken(nbytes):
            answer = self._patience.call(request, lambda: self._address(path))
        with self._lock:
            self.traffic.requests += 1
            self.traffic.nbytes += nbytes
        carry(nbytes)
        return answer

    def peek(self, path: str, view: memoryview, offset: int, facts: FileFacts) -> int:
        """Fill ``view`` with metadata, as far as one request goes; returns the number of bytes."""
        held = self._kept_near(path, offset)
        if held is None and len(view) >= _LONG_BYTES:
            self.read(path, view, offset, facts)
            return len(view)
        if held is None:
            start, stop = self._near(path, offset, len(view), facts.size)
            data = bytearray(stop - start)
            self.read(path, memoryview(data), start, facts)
            held = start, bytes(data)
            self._keep(path, start, held[1])
        start, data_held = held
        part = memoryview(data_held)[offset - start :][: len(view)]
        view[: len(part)] = part
        return len(part)

    def _near(self, path: str, offset: int, count: int, size: int) -> tuple[int, int]:
        """The bytes that are read where some are needed."""
        if size <= _SMALL_BYTES:
            return 0, size
        if offset >= size - _TAIL_BYTES:
            return size - _TAIL_BYTES, size
        if offset < _HEAD_BYTES:
            return 0, min(max(_HEAD_BYTES, offset + count), size)
        with self._lock:
            before = next(
                (
                    len(data)
                    for start in self._starts.get(path, ())
                    if (data := self._kept.get((path, start))) is not None
                    and start + len(data) == offset
                ),
                0,
            )
        length = max(count, min(2 * before, _LONGEST_BYTES), _MIDDLE_BYTES)
        return offset, min(offset + length, size)

    def _held(self, path: str, offset: int, nbytes: int) -> memoryview | None:
        """Bytes that are kept, all of them."""
        start, data = self._kept_near(path, offset) or (0, b"")
        found = memoryview(data)[offset - start :][:nbytes] if data else None
        return found if found is not None and len(found) == nbytes else None

    def _kept_near(self, path: str, offset: int) -> tuple[int, bytes] | None:
        with self._lock:
            for start in self._starts.get(path, ()):
                data = self._kept.get((path, start))
                if data is not None and start <= offset < start + len(data):
                    self._kept.move_to_end((path, start))
                    return start, data
        return None

    def _keep(self, path: str, start: int, data: bytes) -> None:
        with self._lock:
            before = self._kept.pop((path, start), b"")
            self._kept[path, start] = data
            self._kept_bytes += len(data) - len(before)
            if not before:
                self._starts.setdefault(path, []).append(start)
            while self._kept_bytes > _KEPT_BYTES and len(self._kept) > 1:
                (other, at), dropped = self._kept.popitem(last=False)
                self._kept_bytes -= len(dropped)
                self._starts[other].remove(at)


class RemoteFile:
    """An open file of a store."""

    def __init__(self, ranges: Ranges, path: str, facts: FileFacts) -> None:
        self._ranges, self._path, self._facts = ranges, path, facts

    def read_into(self, view: memoryview, offset: int) -> int:
        """See :meth:`ckpt_tools.storage.places.Readable.read_into`."""
        count = max(min(len(view), self._facts.size - offset), 0)
        if count:
            self._ranges.read(self._path, view[:count], offset, self._facts)
        return count

    def fetch(self, offset: int, nbytes: int) -> memoryview:
        """See :meth:`ckpt_tools.storage.places.Fetching.fetch`."""
        count = max(min(nbytes, self._facts.size - offset), 0)
        return (
            self._ranges.fetch(self._path, offset, count, self._facts) if count else memoryview(b"")
        )

    def peek_into(self, view: memoryview, offset: int) -> int:
        """See :meth:`ckpt_tools.storage.places.Distant.peek_into`."""
        count = max(min(len(view), self._facts.size - offset), 0)
        return self._ranges.peek(self._path, view[:count], offset, self._facts) if count else 0

    def close(self) -> None:
        """Nothing is held."""
