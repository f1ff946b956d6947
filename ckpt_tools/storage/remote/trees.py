"""Owns the tree of an address: a pool whose only place is a store.

A store is listed once, when an address in it is first named. The facts of each file are noted then; every
range that is read later must be of that version.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import xxhash

from ckpt_tools.errors import UsageError
from ckpt_tools.storage.addresses import Address, parsed
from ckpt_tools.storage.patience import patience_seconds
from ckpt_tools.storage.places import FileFacts, Readable, Requests
from ckpt_tools.storage.pool import Pool, PooledPath
from ckpt_tools.storage.remote.copies import Copies
from ckpt_tools.storage.remote.failures import Patience, changed
from ckpt_tools.storage.remote.listing import list_at
from ckpt_tools.storage.remote.ranges import REMOTE, Ranges, RemoteFile
from ckpt_tools.storage.remote.stores import Bucket, Store

_open: dict[str, StoreTree] = {}
_lock = threading.Lock()


def store_of(address: Address) -> Store:
    """The store of an address."""
    if address.scheme == "hf":
        from ckpt_tools.storage.remote.hub import Repository

        return Repository(address)
    if address.scheme in ("http", "https"):
        from ckpt_tools.storage.remote.web import WebServer

        return WebServer(address)
    return Bucket(address)


class StorePlace:
    """The files of a store that were listed for an address.

    Args:
        address: what was named.
        store: its store.
        patience: repeats requests.
    """

    requests: ClassVar[Requests] = REMOTE

    def __init__(self, address: Address, store: Store, patience: Patience) -> None:
        self._root = address.root
        self.label = str(address)
        listed = list_at(store, address.path, patience, self.address)
        self.files = listed.files
        self.ranges = Ranges(store, patience, self.address)
        name = xxhash.xxh3_64_hexdigest(str(address).encode())
        self._copies = Copies(self.ranges, self.files, name)

    def listing(self) -> Mapping[str, FileFacts]:
        """See :meth:`ckpt_tools.storage.places.Place.listing`."""
        return self.files

    def open(self, relative: str) -> Readable:
        """See :meth:`ckpt_tools.storage.places.Place.open`."""
        return RemoteFile(self.ranges, relative, self.files[relative])

    def address(self, relative: str) -> str:
        """See :meth:`ckpt_tools.storage.places.Addressed.address`."""
        return f"{self._root}/{relative}" if relative else str(self._root)

    def local(self, relative: str) -> Path:
        """See :meth:`ckpt_tools.storage.places.Addressed.local`."""
        return self._copies.path(relative)


class StoreTree(Pool):
    """The tree of an address; its root is the whole bucket, host or repository."""

    def __init__(self, address: Address, patience: Patience) -> None:
        self.store = StorePlace(address, store_of(address), patience)
        self.address = address
        super().__init__(address.name, [self.store], key=str(address))

    @property
    def is_of_one_address(self) -> bool:
        """See :attr:`ckpt_tools.storage.pool.Pool.is_of_one_address`."""
        return True

    def reopening(self, relative: str) -> tuple[Callable[..., Path], tuple[Any, ...]]:
        """How another process makes a path of this tree; its file must be the same version there."""
        facts = self.store.files.get(relative)
        return _reopened, (str(self.address), relative, facts)


def opened(address: Address) -> PooledPath:
    """The path of an address; its store is listed if that was not done before.

    Raises:
        UsageError: the packages for it are not installed.
        StoreFailed: the store cannot be reached, or refuses.
    """
    return _tree_of(address).path(address.path)


def _tree_of(address: Address) -> StoreTree:
    with _lock:
        key = str(address)
        if key not in _open:
            try:
                _open[key] = StoreTree(address, patience())
            except FileNotFoundError:
                raise UsageError(
                    "there is nothing at this address", path=key, hint="Check its spelling."
                ) from None
        return _open[key]


def patience() -> Patience:
    """How long requests are repeated."""
    return Patience(patience_seconds())


def forget() -> None:
    """List every store anew when it is named next."""
    with _lock:
        _open.clear()


def _reopened(text: str, relative: str, facts: FileFacts | None) -> Path:
    tree = _tree_of(parsed(text))
    if facts is not None and tree.store.files.get(relative) != facts:
        raise changed(tree.store.address(relative))
    return tree.path(relative)
