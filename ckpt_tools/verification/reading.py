"""Owns the division of the reading among threads and ranks. Results come back in the order of the pieces."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from itertools import accumulate, pairwise
from typing import TypeAlias

from ckpt_tools.ranks import Ranks
from ckpt_tools.tensors.threads import default_workers, pool
from ckpt_tools.verification.scan import Piece, Seen

# The result of a piece, or the error.
Found: TypeAlias = tuple[Piece, Seen | OSError]


def in_order(
    read: Callable[[Piece], Seen], pieces: Sequence[Piece], workers: int | None
) -> Iterator[Found]:
    """Read with several threads. Only a few pieces are read or wait at any time."""
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
    """The pieces that one of ``size`` ranks reads: consecutive, with about equal bytes."""
    before = [0, *accumulate(piece.nbytes for piece in pieces)]
    total = max(before[-1], 1)
    # The middle of a piece decides which rank reads it.
    middles = [(a + b) // 2 for a, b in pairwise(before)]
    return [p for p, middle in zip(pieces, middles, strict=True) if middle * size // total == rank]


def read_together(
    read: Callable[[Piece], Seen],
    pieces: Sequence[Piece],
    workers: int | None,
    ranks: Ranks | None,
) -> Iterator[Found]:
    """Read all pieces, together with the other ranks if there are any. The leader gets all results.

    Args:
        read: reads one piece.
        pieces: all pieces, the same on every rank.
        workers: threads; by default one for each processor, up to 16.
        ranks: the ranks, in a session. Each of them makes this call.

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
