"""Owns the short way through a pickle of many alike objects: the segments that differ in values alone.

The metadata of a checkpoint has a million objects of a few classes. A segment is what lies between one BUILD
and the sixth after it. Its effect is found once, opcode by opcode. A segment with the same opcodes has the
same effect, as long as what it takes from the memo has the same sizes. Comparing it takes a third of the time
of following it, or less.

Only a segment of plain opcodes is known: it takes nothing from the stack that lies below its start, writes to
the memo in order, and exceeds no limit. :mod:`~ckpt_tools.readers.containers.pickle_limits` follows all else.
"""

from __future__ import annotations

import pickletools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import compress

from ckpt_tools.readers.containers.pickle_opcodes import (
    BUILD,
    GET,
    INSTANCE,
    LAST,
    LONG,
    LONGEST_SIMPLE,
    MANY,
    MARK,
    MEMOIZE,
    MUTABLE,
    NEW,
    OBJECT,
    PUSH,
    SET,
    SETS,
    SIMPLE,
    TAKE,
    TEXT,
    TUPLE,
    table_of_opcodes,
)

# Opcodes that are looked at to find effects: in any pickle, for each byte of one, and in one segment.
_STEPS, _STEPS_A_BYTE, _LONGEST = 1 << 14, 1 / 256, 256
# The length of a number of few bytes.
_SHORT = b"[\\x00-\\x%02x]" % LONGEST_SIMPLE
# Segments that begin with one opcode, and objects in a segment.
_MOST_ALIKE, _OBJECTS = 8, 6


@dataclass(eq=False)
class _Run:
    """Opcodes up to a text, or to the end of the segment.

    Attributes:
        matches: matches the opcodes, whatever their values; the last byte is the length of the text.
        indices: reads the indices of the memo that may differ.
        held: the sizes of what the memo has there; -1 for the first value that the segment adds, and so on.
        shared: which of these are not plain.
    """

    matches: Callable[[bytes, int], re.Match[bytes] | None]
    indices: Callable[[bytes, int], tuple[int, ...]]
    held: list[int]
    shared: list[bool]


@dataclass(eq=False)
class Segment:
    """The effect of a segment.

    Attributes:
        pushed: the sizes that it leaves on the stack.
        marks: the places of the marks that it leaves, from its start.
        memoized: the sizes that it adds to the memo.
        shares: the indices of the memo that are the same in each such segment, for values that are not plain.
    """

    pushed: list[int] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memoized: list[int] = field(default_factory=list)
    shares: list[int] = field(default_factory=list)
    runs: list[_Run] = field(default_factory=list)


class Segments:
    """The segments of one pickle.

    Args:
        data: the pickle.
        limit: the size of the largest key.
    """

    def __init__(self, data: bytes, limit: int) -> None:
        self._data, self._limit = data, limit
        self._known: dict[int, list[Segment]] = {}
        self._steps = _STEPS + _STEPS_A_BYTE * len(data)

    def pass_on(
        self, at: int, stack: list[int], marks: list[int], memo: list[int], shares: list[int]
    ) -> int:
        """Add the effects of the segments that follow; return the place after them.

        Args:
            at: a place after a BUILD.
            stack: the sizes of what the pickle has built.
            marks: the places of the marks on the stack.
            memo: the size for each index; each index has had one value.
            shares: the index of each further place of a value that is not plain.
        """
        data, known = self._data, self._known
        while at < len(data):
            alike, count = known.get(data[at], []), len(memo)
            for segment in alike:
                after, taken = at, list[int]()
                for run in segment.runs:
                    match = run.matches(data, after)
                    if match is None:
                        break
                    if run.held:
                        found = run.indices(data, after)
                        if [memo[i] if i < count else count - i - 1 for i in found] != run.held:
                            break
                        taken += compress(found, run.shared)
                    after = match.end()
                    if run is not segment.runs[-1]:
                        after += data[after - 1]
                else:
                    break
            else:
                if not self._learn(at, memo):
                    return at
                continue
            if segment is not alike[0]:
                alike.remove(segment)
                alike.insert(0, segment)
            level = len(stack)
            stack += segment.pushed
            marks += [level + place for place in segment.marks]
            memo += segment.memoized
            shares += segment.shares
            shares += taken
            at = after
        return at

    def _learn(self, at: int, memo: list[int]) -> bool:
        """Whether the segment at a place is one that can be known, and is known now."""
        kind = table_of_opcodes()[self._data[at]][0]
        if kind not in (PUSH, TEXT, LONG, GET, MARK) or self._steps < 0:
            return False
        segment = self._effect(at, memo)
        if segment is None:
            return False
        alike = self._known.setdefault(self._data[at], [])
        alike.insert(0, segment)
        del alike[_MOST_ALIKE:]
        return True

    def _effect(self, at: int, memo: list[int]) -> Segment | None:
        """The effect of the segment at a place; None if it is not plain."""
        data, table, limit = self._data, table_of_opcodes(), self._limit
        segment, writer = Segment(), _Writer()
        stack, marks = segment.pushed, segment.marks
        objects = _OBJECTS
        for _ in range(_LONGEST):
            if at + 1 >= len(data):
                return None
            code = data[at]
            kind, size, effect, result = table[code]
            taken = effect
            if kind in (TUPLE, SETS, MANY):
                if not marks:
                    return None
                taken = marks.pop() - len(stack)
            elif kind == SET:
                taken = -2
            # What it takes, and the object that it changes, must be the segment's own.
            if -taken + (kind in (TAKE, BUILD, SET, NEW)) > len(stack) - (
                marks[-1] if marks else 0
            ):
                return None
            self._steps -= 1
            items = stack[len(stack) + taken :] if taken < 0 else []
            writer.opcode(code)
            after = at + 1 + max(size, 0)
            if kind == PUSH and size >= 0:
                stack.append(result)
                writer.any(size)
            elif kind in (TEXT, LONG) and size == pickletools.TAKEN_FROM_ARGUMENT1:
                if kind == LONG and data[at + 1] > LONGEST_SIMPLE:
                    return None
                stack.append(1)
                segment.runs.append(writer.run(_SHORT if kind == LONG else b"."))
                writer = _Writer()
                after = at + 2 + data[at + 1]
            elif kind == GET and size > 0:
                index = int.from_bytes(data[at + 1 : after], "little")
                own = index - len(memo)
                if own >= (len(segment.memoized) if size > 1 else 0):
                    return None
                held = segment.memoized[own] if own >= 0 else memo[index]
                if held > OBJECT:
                    return None
                stack.append(held)
                if size == 1:
                    # The objects that a pickle refers to most are its first.
                    writer.literal(data[at + 1])
                    if held > 1:
                        segment.shares.append(index)
                else:
                    writer.index(held, -own - 1 if own >= 0 else held)
            elif kind == MEMOIZE and len(stack) > (marks[-1] if marks else 0):
                segment.memoized.append(stack[-1])
            elif kind == MARK:
                marks.append(len(stack))
            elif kind in (LAST, TUPLE):
                total = 1 + sum(items)
                if total & (MUTABLE - 1) > limit:
                    return None
                del stack[len(stack) - len(items) :]
                stack.append(total)
            elif kind in (TAKE, BUILD, SET, SETS, MANY, NEW) and size == 0:
                if kind in (SET, SETS) and max(items[::2], default=0) > SIMPLE:
                    return None
                del stack[len(stack) - len(items) :]
                if kind == NEW:
                    stack[-1] = INSTANCE
                if kind in (SETS, MANY) and effect:
                    stack.append(result)
            else:
                return None
            at = after
            objects -= kind == BUILD
            if objects == 0:
                segment.runs.append(writer.run())
                return segment
        return None


class _Writer:
    """Writes what matches the opcodes of a run."""

    def __init__(self) -> None:
        self._pattern, self._format = b"", "<"
        self._held: list[int] = []
        self._shared: list[bool] = []

    def opcode(self, code: int) -> None:
        """This opcode."""
        self.literal(code)

    def literal(self, byte: int) -> None:
        """This byte."""
        self._pattern += re.escape(bytes([byte]))
        self._format += "x"

    def any(self, count: int) -> None:
        """So many bytes of a value."""
        self._pattern += b"." * count
        self._format += "x" * count

    def index(self, size: int, held: int) -> None:
        """An index of the memo, in four bytes, the size of what it has there, and how it is known again."""
        self._pattern += b"...."
        self._format += "I"
        self._held.append(held)
        self._shared.append(size > 1)

    def run(self, end: bytes = b"") -> _Run:
        """What was written; ``end`` matches the length of the text or number at its end."""
        pattern = self._pattern + end
        return _Run(
            re.compile(pattern, re.DOTALL).match,
            struct.Struct(self._format).unpack_from,
            self._held,
            self._shared,
        )
