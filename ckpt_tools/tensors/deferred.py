"""Owns fragments whose place in a file is found on demand, and finding many of them at once.

The metadata of a format may name the file of each fragment, but not the offset in it; that needs a read of
the file. With 100,000 fragments these reads take longer than reading all other metadata, and ``inspect`` does
not need them. Coverage is proven from regions alone, before any place is known. A reader's subclass finds the
place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ckpt_tools.tensors.catalogue import Box, FlatRange, Fragment, Stored, Strided, Tensor
from ckpt_tools.tensors.threads import pool

_BATCH = 256


class Place(NamedTuple):
    """The file that holds a fragment, the first byte, and the layout if it is not row-major."""

    file: Path
    offset: int
    layout: Strided | None = None


class DeferredFragment(Fragment, ABC):
    """A fragment that finds its file and offset when one of them is first used.

    Args:
        region: which elements it holds.
    """

    __slots__ = ("_place",)
    _place: Place | None

    def __init__(self, region: FlatRange | Box) -> None:
        object.__setattr__(self, "region", region)
        object.__setattr__(self, "_place", None)

    @abstractmethod
    def find_place(self) -> Place:
        """The place of the elements.

        Raises:
            DamagedCheckpoint: the file contradicts the metadata.
        """

    def place(self) -> Place:
        """The place of the elements, found once."""
        if self._place is None:
            object.__setattr__(self, "_place", self.find_place())
        assert self._place is not None
        return self._place

    def __reduce__(self) -> tuple[Callable[..., Fragment], tuple[object, ...]]:
        """A pickle holds the place, so that another process does not search again."""
        return Fragment, (self.file, self.offset, self.region, self.layout)

    @property
    def file(self) -> Path:
        """The file."""
        return self.place().file

    @property
    def offset(self) -> int:
        """First byte of the run."""
        return self.place().offset

    @property
    def layout(self) -> Strided | None:
        """How the elements lie."""
        return self.place().layout


def settle(tensors: Iterable[Tensor], workers: int = 1) -> int:
    """Find the place of every deferred fragment, so that damage shows before anything is written.

    Args:
        tensors: tensors as a reader made them; derived tensors are skipped.
        workers: number of threads.

    Returns:
        The number of fragments.

    Raises:
        CkptError: the first error that :meth:`DeferredFragment.find_place` raised.
    """
    # All fragments of a tensor have one class. Only the first is checked: others may be made on demand.
    pending = [
        fragment
        for tensor in tensors
        if isinstance(tensor, Stored) and tensor.fragments
        if isinstance(tensor.fragments[0], DeferredFragment)
        for fragment in tensor.fragments
        if isinstance(fragment, DeferredFragment)
    ]
    count = max(workers, 1)
    size = max(min(_BATCH, len(pending) // count), 1)
    batches = [pending[at : at + size] for at in range(0, len(pending), size)]
    with pool(count) as threads:
        list(threads.map(_find_all, batches))
    return len(pending)


def _find_all(fragments: Sequence[DeferredFragment]) -> None:
    for fragment in fragments:
        fragment.place()
