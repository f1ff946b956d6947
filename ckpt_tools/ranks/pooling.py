"""Owns pools of checkpoints of which each machine holds only its own files.

DeepSpeed's node-local storage and local NVMe make such checkpoints. All ranks name the same paths. The files
of each machine are a place of a ``Pool``, and those of the rank's own machine come first. So a rank reads its
own disk where it can, and asks other ranks for the other files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ckpt_tools.ranks.exchange import Exchange
from ckpt_tools.ranks.session import Ranks
from ckpt_tools.storage.places import LOCAL, DirectoryPlace, FileFacts, Place, Readable, Requests
from ckpt_tools.storage.pool import Pool


@contextmanager
def pooled_machines(
    ranks: Ranks, paths: Sequence[Path], further: Callable[[Path], Sequence[Place]] = lambda _: ()
) -> Iterator[list[Path]]:
    """Directories that hold the files of all machines. All ranks enter and leave the block together.

    Args:
        ranks: the ranks, in a session.
        paths: the directories, or files in them; the same on every rank.
        further: gives more places of this machine for a directory.

    Yields:
        The same paths, with the files of all machines, for every rank.

    Raises:
        RankFailed: the ranks cannot reach each other.
    """
    rows = ranks.all_gather("files", [path.is_file() for path in paths])
    are_files = [any(seen) for seen in zip(*rows, strict=True)]
    roots = [p.parent if is_file else p for p, is_file in zip(paths, are_files, strict=True)]
    mine = []
    for root in roots:
        own: list[Place] = [DirectoryPlace(root)] if root.is_dir() else []
        mine.append(Pool(root, [*own, *further(root)]))
    with Exchange(ranks, *map(_Offered, mine)) as exchange:
        pools = []
        for number, (root, pool) in enumerate(zip(roots, mine, strict=True)):
            others = []
            for machine in range(max(ranks.machines) + 1):
                members = tuple(r for r, m in enumerate(ranks.machines) if m == machine)
                if ranks.rank not in members:
                    label = f"machine {ranks.names[members[0]]}"
                    others.append(exchange.place(label, members, number))
            key = f"machines-{ranks.session_number}-{number}"
            pools.append(Pool(root, [*pool.places, *others], key=key))
        yield [
            pool.path(path.name) if is_file else pool.path()
            for pool, path, is_file in zip(pools, paths, are_files, strict=True)
        ]


@dataclass(frozen=True)
class _Offered:
    """The files of this machine, as one place."""

    pool: Pool
    label: str = "this machine"
    requests: ClassVar[Requests] = LOCAL

    def listing(self) -> Mapping[str, FileFacts]:
        """See :meth:`ckpt_tools.storage.places.Place.listing`."""
        found: dict[str, FileFacts] = {}
        for place in reversed(self.pool.places):  # the first that has a file counts
            found.update(place.listing().items())
        return found

    def open(self, relative: str) -> Readable:
        """See :meth:`ckpt_tools.storage.places.Place.open`."""
        return self.pool.open(relative)
