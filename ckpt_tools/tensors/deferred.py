"""Fragments whose place is found when it is first asked for, and finding many of them at once.

A format may say at once which file holds which elements, but where in the file their first byte lies only
after a look into it. With 100,000 such pieces the looks take longer than everything else that reading
metadata takes, and ``inspect`` does not need them. Coverage is proven from regions alone, before any place
is known. Knows no format; a reader's subclass does the looking.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ckpt_tools.tensors.catalogue import Box, FlatRange, Fragment, Stored, Tensor

_BATCH = 256


class DeferredFragment(Fragment, ABC):
    """A fragment that looks for its bytes when its file or offset is first asked for.

    Args:
        region: which elements it holds.
    """

    __slots__ = ("_place",)
    _place: tuple[Path, int] | None

    def __init__(self, region: FlatRange | Box) -> None:
        object.__setattr__(self, "region", region)
        object.__setattr__(self, "_place", None)

    @abstractmethod
    def find_place(self) -> tuple[Path, int]:
        """The file that holds the elements, and the first byte.

        Raises:
            DamagedCheckpoint: what lies there is not what the metadata describes.
        """

    def place(self) -> tuple[Path, int]:
        """The file and the first byte, found once."""
        if self._place is None:
            object.__setattr__(self, "_place", self.find_place())
        assert self._place is not None
        return self._place

    def __reduce__(self) -> tuple[Callable[..., Fragment], tuple[object, ...]]:
        """To another process it goes with its place, so that nothing is looked for twice."""
        return Fragment, (self.file, self.offset, self.region)

    @property
    def file(self) -> Path:
        """The file."""
        return self.place()[0]

    @property
    def offset(self) -> int:
        """First byte of the run."""
        return self.place()[1]


def settle(tensors: Iterable[Tensor], workers: int = 1) -> int:
    """Find every place that was left for later, so that damage shows before anything is written.

    Args:
        tensors: tensors as a reader made them; derived ones are passed over.
        workers: number of threads.

    Returns:
        How many fragments were looked at.

    Raises:
        CkptError: whatever the first look that failed raised.
    """
    # All fragments of a tensor are of one kind; the first one tells, because others may be made on demand.
    pending = [
        fragment
        for tensor in tensors
        if isinstance(tensor, Stored) and tensor.fragments
        if isinstance(tensor.fragments[0], DeferredFragment)
        for fragment in tensor.fragments
        if isinstance(fragment, DeferredFragment)
    ]
    batches = [pending[at : at + _BATCH] for at in range(0, len(pending), _BATCH)]
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        try:
            list(pool.map(_find_all, batches))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return len(pending)


def _find_all(fragments: Sequence[DeferredFragment]) -> None:
    for fragment in fragments:
        fragment.place()
