"""Owns the limits on what a pickle may make the unpickler do: memory and work follow from its length.

The opcodes are followed before anything is built, with the size of each value on the unpickler's stack. A
number or a string has size 1. A tuple has 1 and the sizes of its items, each counted as often as it occurs,
because hashing, comparing and printing a tuple visit it that often. Refused are

* an index of the memo beyond the bytes before it: the unpickler allocates memory for all indices below;
* a key of a dictionary or a set that is a large tuple, or a tuple with a list in it: Python hashes a tuple
  recursively in C, without a limit of depth or time;
* numbers of thousands of digits, and frames that no pickler writes.

Counted are keys that are tuples or long numbers, which may have one hash. Where there are many of them,
:mod:`~ckpt_tools.readers.containers.pickle_keys` reads the pickle.

Following takes about as long as building. What a pickle shares between lists and dictionaries is measured
after they were built, by :mod:`~ckpt_tools.readers.containers.pickle_sharing`. :class:`Meter` counts the
work of functions that copy their arguments.

Sources: ``pickletools`` (what each opcode takes and leaves), ``Modules/_pickle.c`` (memo, POP, frames).
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from ckpt_tools.readers.containers.pickle_opcodes import (
    BUILD,
    DUP,
    FRAME,
    FROZEN,
    GET,
    INSTANCE,
    LAST,
    LONG,
    LONGEST_SIMPLE,
    MANY,
    MARK,
    MEMOIZE,
    MUTABLE,
    NAME,
    NEW,
    NUMBER,
    OBJECT,
    POP,
    PREFIXES,
    PUSH,
    PUT,
    SET,
    SETS,
    SIMPLE,
    STOP,
    TAKE,
    TEXT,
    TUPLE,
    end_of_argument,
    table_of_opcodes,
)
from ckpt_tools.readers.containers.pickle_segments import Segments

# A key of frameworks has a few parts.
_LARGEST_KEY = 1_000
_LONGEST_KEY = 1 << 16
# Comparing so many keys with each other takes seconds.
MOST_ODD_KEYS = 10_000
# The integers of a random generator's state have some 40 digits.
_LONGEST_NUMBER = 1_000
# Any pickle may use these indices of the memo.
_FIRST_INDICES = 1_024
# Picklers end a frame after 64 KiB, and write what is larger outside of frames.
_LARGEST_FRAME = 1 << 24
_WINDOW, _LARGEST_WINDOW = 1 << 16, 1 << 28
# Calls may copy this many items for each byte of a pickle, and as many in any pickle.
_COPIES_A_BYTE, _COPIES = 2, 1 << 18

# A nest has at most this many levels more than the largest key has items.
_MOST_LARGE = 1_000
_MEMOIZE_CODE = ord("\x94")


@dataclass(frozen=True, slots=True)
class Followed:
    """What following a pickle has shown.

    Attributes:
        data: the bytes of the pickle.
        is_odd: whether it builds many large tuples, or gives values several places in another way than by
            an index of the memo that has one value.
        has_containers: whether a tuple, list, dictionary or set has several places.
        shares: the further places of values that are not plain.
        odd_keys: number of keys that are tuples, results of calls or long numbers. Python compares all keys
            of one hash with each other, and anybody can find such keys that have one hash.
    """

    data: bytes
    is_odd: bool
    has_containers: bool
    shares: Shares
    odd_keys: int = 0


class Shares(list[int]):
    """The index of the memo for each further place of a value."""

    @cached_property
    def places(self) -> Mapping[int, int]:
        """The number of places for each index. Pickles that are alike share it."""
        return Counter(self)


class Meter:
    """Counts the items that functions of the allow-list copy.

    Args:
        length: bytes of the pickle.

    Attributes:
        mappings: number of mappings that were made by calls.
    """

    def __init__(self, length: int) -> None:
        self.mappings = self._odd_keys = 0
        self._left = _COPIES + _COPIES_A_BYTE * length

    def spend(self, count: int) -> None:
        """Count ``count`` items.

        Raises:
            pickle.UnpicklingError: the pickle makes far more of its bytes than picklers do.
        """
        self._left -= count
        if self._left < 0:
            raise pickle.UnpicklingError("its calls copy much more than it holds")

    def admits(self, key: object) -> bool:
        """Count a key of a mapping or a set that a call makes.

        Returns:
            Whether it is hashed at once, and is not one of many that may have one hash.
        """
        if has_own_hash(key):
            return True
        self._odd_keys += 1
        return is_plain_key(key) and self._odd_keys <= MOST_ODD_KEYS


def follow(file: io.BufferedIOBase | io.BytesIO) -> Followed:
    """Check the pickle at the position of ``file``, and go to its end.

    Args:
        file: one pickle in memory, or a stream in which more data may follow the pickle.

    Raises:
        pickle.UnpicklingError: the pickle exceeds a limit, or the data is not a pickle.
        EOFError: the pickle is truncated.
    """
    start = file.tell()
    window = _LARGEST_WINDOW if isinstance(file, io.BytesIO) else _WINDOW
    while True:
        file.seek(start)
        data = file.read(window)
        try:
            end, is_odd, has_containers, shares, odd_keys = _follow(data)
            break
        except EOFError:
            if len(data) < window or window == _LARGEST_WINDOW:
                raise
        window *= 4
    file.seek(start + end)
    held = data if end == len(data) else data[:end]
    return Followed(held, is_odd, has_containers, shares, odd_keys)


def has_own_hash(key: object) -> bool:
    """Whether a key is a text or a number of which few others have the hash."""
    if isinstance(key, str | bytes):
        return len(key) <= _LONGEST_KEY
    if isinstance(key, int):
        return key.bit_length() <= 8 * LONGEST_SIMPLE - 1
    return key is None or isinstance(key, float)


def is_plain_key(key: object, depth: int = 4) -> bool:
    """Whether a value is a key that is hashed and compared at once: a string, a number or a few of them."""
    if isinstance(key, str | bytes):
        return len(key) <= _LONGEST_KEY
    if isinstance(key, tuple):
        return depth > 0 and len(key) <= 64 and all(is_plain_key(item, depth - 1) for item in key)
    return key is None or isinstance(key, int | float | complex)


def values(data: bytes) -> Iterator[tuple[int, int]]:
    """Where the numbers and texts of a pickle that was followed lie, without the lengths before them.

    Its limits are the same whatever these bytes are.
    """
    table, at = table_of_opcodes(), 0
    while at < len(data):
        kind, size, _, _ = table[data[at]]
        start, at = at + 1, end_of_argument(data, at + 1, size)
        if kind == PUSH and size > 0:
            yield start, at
        elif kind in (TEXT, LONG):
            yield start + PREFIXES[size], at


def _follow(data: bytes) -> tuple[int, bool, bool, Shares, int]:
    """The end of the pickle, and the facts of :class:`Followed`; raises as :func:`follow`."""
    table = table_of_opcodes()
    # There are millions of steps, and a look-up in the module would make each a third slower.
    pushes, texts, puts, gets, memoize, take, last = (
        PUSH,
        TEXT,
        PUT,
        GET,
        MEMOIZE,
        TAKE,
        LAST,
    )
    whole, one_byte = int.from_bytes, pickletools.TAKEN_FROM_ARGUMENT1
    limit, plain, longest = _LARGEST_KEY, MUTABLE - 1, _LONGEST_KEY
    stack: list[int] = []
    marks: list[int] = []
    memo: list[int] | _OddMemo = []
    shares = Shares()
    push, share, memoise, at, start = stack.append, shares.append, memo.append, 0, 0
    is_odd = has_containers = False
    odd_keys = 0
    segments = Segments(data, limit)
    large, huge = 0, MUTABLE + limit + 1
    try:
        while True:
            kind, size, effect, result = table[data[at]]
            start = at + 1
            if size >= 0:
                at = start + size
            elif size == one_byte:
                at = start + 1 + data[start]
            else:
                at = end_of_argument(data, start, size)
            if kind == pushes:
                push(result)
            elif kind == gets:
                if size == 1:
                    index = data[start]
                elif size > 0:
                    index = whole(data[start:at], "little")
                else:
                    index = _index(data, start, at, size)
                push(held := memo[index])
                if held > 1:
                    share(index)
                    if held > OBJECT:
                        has_containers = True
                continue
            elif kind == texts:
                push(1 if at - start <= longest else limit + 1)
            elif kind == take:
                if effect:
                    del stack[effect:]
            elif kind == last:
                total = 1 + sum(stack[effect:])
                del stack[effect:]
                if total & plain > limit:
                    large, total = large + 1, huge
                push(total)
            elif kind == puts:
                index = data[start] if size == 1 else _index(data, start, at, size)
                if index != len(memo):
                    if index > at + _FIRST_INDICES:
                        raise pickle.UnpicklingError("an index of its memo is beyond its length")
                    if isinstance(memo, list):
                        memo = _OddMemo(enumerate(memo))
                        memoise = memo.append
                    # Two values may have the same index, one after the other.
                    is_odd = True
                    memo[index] = stack[-1]
                else:
                    memoise(stack[-1])
            elif kind == memoize:
                memoise(stack[-1])
            elif kind == BUILD:
                del stack[-1:]
                if isinstance(memo, list):
                    at = segments.pass_on(at, stack, marks, memo, shares)
            elif kind == MARK:
                marks.append(len(stack))
            elif kind == TUPLE:
                first = marks.pop()
                total = 1 + sum(stack[first:])
                del stack[first:]
                if total & plain > limit:
                    large, total = large + 1, huge
                push(total)
            elif kind == NEW:
                del stack[effect:]
                stack[-1] = INSTANCE
            elif kind == LONG:
                push(1 if data[start] <= LONGEST_SIMPLE else OBJECT)
            elif kind == SET:
                if stack[-2] > SIMPLE:
                    odd_keys += 1
                    if stack[-2] > limit:
                        raise _too_large()
                del stack[-2:]
            elif kind in (SETS, MANY):
                first = marks.pop()
                if kind == SETS and max(keys := stack[first::2], default=0) > SIMPLE:
                    odd_keys += _odd(keys)
                del stack[first:]
                if effect:
                    push(result)
            elif kind == FROZEN:
                first = marks.pop()
                odd_keys += _odd(stack[first:])
                total = 1 + sum(stack[first:])
                del stack[first:]
                if effect:
                    large += total & plain > limit
                    push(min(total, huge))
            elif kind == NUMBER:
                if at - start > _LONGEST_NUMBER:
                    raise pickle.UnpicklingError("a number in it has thousands of digits")
                push(1 if at - start <= 2 * LONGEST_SIMPLE else OBJECT)
            elif kind == NAME:
                del stack[-1]
                stack[-1] = OBJECT
            elif kind == POP:
                if marks and marks[-1] == len(stack):
                    marks.pop()
                else:
                    stack.pop()
            elif kind == DUP:
                push(stack[-1])
                is_odd = True
            elif kind == FRAME:
                if int.from_bytes(data[start:at], "little") > _LARGEST_FRAME:
                    raise pickle.UnpicklingError("it has a frame that no pickler writes")
            elif kind == STOP:
                return at, is_odd or large > _MOST_LARGE, has_containers, shares, odd_keys
            else:
                raise pickle.UnpicklingError(f"invalid load key, {data[start - 1 : start]!r}")
            # Most opcodes are followed by this one.
            if data[at] == _MEMOIZE_CODE:
                memoise(stack[-1])
                at += 1
    except (IndexError, KeyError, ValueError) as error:
        if max(at, start) >= len(data):
            raise EOFError from error
        raise pickle.UnpicklingError("an opcode takes an object that does not exist") from error


def _odd(keys: list[int]) -> int:
    """The number of keys that may be made to have one hash."""
    if max(keys, default=0) > _LARGEST_KEY:
        raise _too_large()
    return sum(size > SIMPLE for size in keys)


def _index(data: bytes, start: int, stop: int, size: int) -> int:
    """An index of the memo: a number of ``size`` bytes, or a line."""
    if size > 0:
        return int.from_bytes(data[start:stop], "little")
    if stop - start > _LONGEST_NUMBER:
        raise pickle.UnpicklingError("a number in it has thousands of digits")
    index = int(data[start:stop])
    if index < 0:
        raise pickle.UnpicklingError("an index of its memo is negative")
    return index


class _OddMemo(dict[int, int]):
    """The sizes in a memo whose indices do not count from 0."""

    def append(self, size: int) -> None:
        """Add a size as MEMOIZE does."""
        self[len(self)] = size


def _too_large() -> pickle.UnpicklingError:
    return pickle.UnpicklingError("a key in it is not a plain value, or too large")
