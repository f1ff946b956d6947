"""Checkpoints of which each machine holds only its own files: DeepSpeed's node-local storage, local NVMe.

The ranks pool what they see under the path that all of them name: each machine's files are a place of a
:class:`~ckpt_tools.files.Pool`, one's own first, so that a rank reads from its own disk what lies there and
asks for the rest. Knows directories and ranks; knows nothing of what the files are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ckpt_tools.files import DirectoryPlace, FileFacts, Place, Pool, Readable
from ckpt_tools.ranks.exchange import Exchange
from ckpt_tools.ranks.session import Ranks


@contextmanager
def pooled_machines(ranks: Ranks, root: Path, also: Sequence[Place] = ()) -> Iterator[Path]:
    """One path for a directory of which every machine has a part. All ranks enter and leave it together.

    Args:
        ranks: the ranks, in a session.
        root: the directory, as every rank names it.
        also: further places of this machine.

    Yields:
        The same directory with the files of all machines, for every rank to read from.

    Raises:
        RankFailed: the ranks cannot reach each other.
    """
    own: list[Place] = [DirectoryPlace(root)] if root.is_dir() else []
    seen = Pool(root, [*own, *also])
    with Exchange(ranks, _Offered(seen)) as exchange:
        others = []
        for machine in range(max(ranks.machines) + 1):
            members = tuple(r for r, m in enumerate(ranks.machines) if m == machine)
            if ranks.rank not in members:
                others.append(exchange.place(f"machine {ranks.names[members[0]]}", members))
        pool = Pool(root, [*seen.places, *others], key=f"machines-{ranks.session_number}")
        yield pool.path()


@dataclass(frozen=True)
class _Offered:
    """What this machine has, as one place."""

    pool: Pool
    label: str = "this machine"

    def listing(self) -> Mapping[str, FileFacts]:
        """See :meth:`ckpt_tools.places.Place.listing`."""
        found: dict[str, FileFacts] = {}
        for place in reversed(self.pool.places):  # the first that has a file counts
            found.update(place.listing().items())
        return found

    def open(self, relative: str) -> Readable:
        """See :meth:`ckpt_tools.places.Place.open`."""
        return self.pool.open(relative)
