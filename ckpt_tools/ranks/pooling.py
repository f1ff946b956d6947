"""Checkpoints of which each machine holds only its own files: DeepSpeed's node-local storage, local NVMe.

The ranks pool what they see under the paths that all of them name: each machine's files are a place of a
``Pool``, one's own first, so that a rank reads from its own disk what lies there and
asks for the rest. Knows directories and ranks; knows nothing of what the files are.
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
    """One path for each directory of which every machine has a part. All ranks enter and leave it together.

    Args:
        ranks: the ranks, in a session.
        paths: the directories, as every rank names them, or files in them.
        further: gives more places of this machine for a directory.

    Yields:
        The same paths with the files of all machines, for every rank to read from.

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
    """What this machine has of a tree, as one place."""

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
