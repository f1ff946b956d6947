"""Owns a folder of a store as a place of a tree that has further places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ckpt_tools.storage.places import Addressed, DirectoryPlace, FileFacts, Readable, Requests
from ckpt_tools.storage.pool import PooledPath


@dataclass(frozen=True)
class StoreFolder:
    """A folder of a store.

    Attributes:
        root: the folder, in the tree of its store.
        under: its path in the tree that it is a place of; empty for the root of the tree.
    """

    root: PooledPath
    under: str = ""

    @property
    def _store(self) -> Addressed:
        (place,) = self.root.pool.places
        assert isinstance(place, Addressed)
        return place

    @property
    def requests(self) -> Requests:
        """How its files are read best."""
        return self._store.requests

    @property
    def label(self) -> str:
        """The address."""
        return str(self.root)

    def listing(self) -> Mapping[str, FileFacts]:
        """Every file below it."""
        above = f"{self.root.within}/" if self.root.within else ""
        under = f"{self.under}/" if self.under else ""
        return {
            under + name[len(above) :]: facts
            for name, facts in self._store.listing().items()
            if name.startswith(above)
        }

    def covers(self, relative: str) -> bool:
        """Whether a path of the tree is this folder, or in it."""
        return not self.under or f"{relative}/".startswith(f"{self.under}/")

    def path(self, relative: str) -> PooledPath:
        """A path of the tree that it covers, in the tree of its store."""
        return self.root / relative[len(self.under) :].lstrip("/")

    def _within(self, relative: str) -> str:
        return self.path(relative).within or ""

    def open(self, relative: str) -> Readable:
        """See :meth:`ckpt_tools.storage.places.Place.open`."""
        return self._store.open(self._within(relative))

    def address(self, relative: str) -> str:
        """See :meth:`ckpt_tools.storage.places.Addressed.address`."""
        return str(self.path(relative) if self.covers(relative) else self.root)

    def local(self, relative: str) -> Path:
        """See :meth:`ckpt_tools.storage.places.Addressed.local`."""
        return self._store.local(self._within(relative))


Folder = DirectoryPlace | StoreFolder


def folder_of(root: Path, under: str = "") -> Folder:
    """A folder of this machine or of a store, as a place."""
    if isinstance(root, PooledPath) and root.is_addressed:
        return StoreFolder(root, under)
    return DirectoryPlace(root, under)
