"""Owns the bytes of the answers of a store while they arrive."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ckpt_tools.storage.remote.failures import Incomplete

_OTHER_LENGTH = "the answer has another number of bytes than was asked for"
_NOTHING = np.empty(0, np.uint8)


class Answer:
    """The bytes of a range, as they arrive.

    Args:
        pieces: the bytes.
        nbytes: how many were asked for.
    """

    def __init__(self, pieces: Iterator[Any], nbytes: int) -> None:
        self._pieces = pieces
        self._piece = _NOTHING
        self._left = nbytes

    def fill(self, view: memoryview) -> None:
        """Fill ``view`` with the next bytes; raises Incomplete where there are fewer."""
        into, done = np.frombuffer(view, np.uint8), 0
        while done < len(into):
            piece = self._take(len(into) - done)
            # numpy copies without the interpreter lock.
            np.copyto(into[done : done + len(piece)], piece)
            done += len(piece)

    def skip(self, nbytes: int) -> None:
        """Leave the next bytes out; raises as :meth:`fill`."""
        while nbytes:
            nbytes -= len(self._take(nbytes))

    def _take(self, most: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Bytes of one piece, at most so many; the end of the answer must be that of the range."""
        while not len(self._piece):
            self._piece = self._next()
        taken = self._piece[:most]
        self._piece = self._piece[most:] if most < len(self._piece) else _NOTHING
        self._left -= len(taken)
        if not self._left and (len(self._piece) or next(self._pieces, None)):
            raise Incomplete(_OTHER_LENGTH)
        return taken

    def _next(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        piece = next(self._pieces, None)
        if piece is None:
            raise Incomplete(_OTHER_LENGTH)
        found: np.ndarray[Any, np.dtype[np.uint8]] = np.frombuffer(piece, np.uint8)
        return found


class Stream:
    """A run of a file that is read forward. An answer that fails is asked for again from there on.

    Args:
        ask: asks for the run from a byte of the file on.
        repeat: makes attempts until one ends well.
        stop: the end of the run.
    """

    def __init__(
        self,
        ask: Callable[[int], Answer],
        repeat: Callable[[Callable[[], None], int], None],
        stop: int,
    ) -> None:
        self._ask, self._repeat, self._stop = ask, repeat, stop
        self._answer: Answer | None = None
        self._at = 0

    def read_into(self, view: memoryview, offset: int) -> int:
        """See :meth:`ckpt_tools.storage.places.Readable.read_into`."""
        part = view[: max(self._stop - offset, 0)]
        if part:
            self._repeat(lambda: self._fill(part, offset), len(part))
        return len(part)

    def _fill(self, view: memoryview, offset: int) -> None:
        # An answer that fails is not read again.
        answer, self._answer = self._answer, None
        if answer is None or offset < self._at:
            answer, self._at = self._ask(offset), offset
        answer.skip(offset - self._at)
        answer.fill(view)
        self._answer, self._at = answer, offset + len(view)

    def close(self) -> None:
        """Leave what was not read."""
        self._answer = None
