"""Reads pieces of files: with several threads, and of several ranks each its share.

Owns who reads which piece and the order in which what was seen comes back: that of the pieces, whoever
read them. It must not know what is looked for in a piece, or what it means.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from itertools import accumulate, pairwise
from typing import TypeAlias

from ckpt_tools.ranks import Ranks
from ckpt_tools.tensors.threads import default_workers, pool
from ckpt_tools.verification.scan import Piece, Seen

# What was seen of a piece, or why it could not be read.
Found: TypeAlias = tuple[Piece, Seen | OSError]


def in_order(
    read: Callable[[Piece], Seen], pieces: Sequence[Piece], workers: int | None
) -> Iterator[Found]:
    """Read with several threads; few pieces are under way or waiting at any time."""
    count = workers or default_workers()
    todo = iter(pieces)
    waiting: deque[tuple[Piece, Future[Seen]]] = deque()
    with pool(count) as threads:
        while True:
            while len(waiting) < 2 * count and (piece := next(todo, None)) is not None:
                waiting.append((piece, threads.submit(read, piece)))
            if not waiting:
                return
            piece, future = waiting.popleft()
            try:
                yield piece, future.result()
            except OSError as error:
                yield piece, error


def share(pieces: Sequence[Piece], rank: int, size: int) -> Sequence[Piece]:
    """The pieces that one of ``size`` ranks reads: consecutive, and as many bytes as any other's."""
    before = [0, *accumulate(piece.nbytes for piece in pieces)]
    total = max(before[-1], 1)
    # A piece is whose its middle is.
    middles = [(a + b) // 2 for a, b in pairwise(before)]
    return [p for p, middle in zip(pieces, middles, strict=True) if middle * size // total == rank]


def read_together(
    read: Callable[[Piece], Seen],
    pieces: Sequence[Piece],
    workers: int | None,
    ranks: Ranks | None,
) -> Iterator[Found]:
    """Read all pieces, with the other ranks where there are some; the leader gets what all have seen.

    Args:
        read: what is done with a piece.
        pieces: all of them, the same on every rank.
        workers: threads; by default one for each processor, up to 16.
        ranks: the ranks, in a session; every one of them makes this call.

    Raises:
        RankFailed: another rank failed.
    """
    if ranks is None:
        yield from in_order(read, pieces, workers)
        return
    mine = []
    for found in in_order(read, share(pieces, ranks.rank, ranks.size), workers):
        mine.append(found)
        ranks.active(found[0].nbytes)
        ranks.check()
    for part in ranks.gather("seen", mine) or ():
        yield from part
