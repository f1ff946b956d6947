"""Owns the limits on what a pickle may make the unpickler do: memory and work follow from its length.

The opcodes are followed before anything is built, with the size of each value on the unpickler's stack. A
number or a string has size 1. A tuple has 1 and the sizes of its items, each counted as often as it occurs,
because hashing, comparing and printing a tuple visit it that often. Refused are

* an index of the memo beyond the bytes before it: the unpickler allocates memory for all indices below;
* a key of a dictionary or a set that is a large tuple, or a tuple with a list in it: Python hashes a tuple
  recursively in C, without a limit of depth or time;
* numbers of thousands of digits, and frames that no pickler writes.

Following takes about as long as building. What a pickle shares between lists and dictionaries is measured
after they were built, by :mod:`~ckpt_tools.readers.containers.pickle_sharing`. :class:`Meter` counts the
work of functions that copy their arguments.

Sources: ``pickletools`` (what each opcode takes and leaves), ``Modules/_pickle.c`` (memo, POP, frames).
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

# A key of frameworks has a few parts.
_LARGEST_KEY = 1_000
_LONGEST_KEY = 1 << 16
# The integers of a random generator's state have some 40 digits.
_LONGEST_NUMBER = 1_000
# Any pickle may use these indices of the memo.
_FIRST_INDICES = 1_024
# Picklers end a frame after 64 KiB, and write what is larger outside of frames.
_LARGEST_FRAME = 1 << 24
_WINDOW, _LARGEST_WINDOW = 1 << 16, 1 << 28
# Calls may copy this many items for each byte of a pickle, and as many in any pickle.
_COPIES_A_BYTE, _COPIES = 2, 1 << 18

# The size of an object whose class decides what is in it, and of a list, a dictionary or a set.
# A tuple that holds one of the latter is at least as large, and the rest of its size counts what is plain.
_OBJECT, _MUTABLE = 3, 1 << 40
# A nest has at most this many levels more than the largest key has items.
_MOST_LARGE = 1_000
_MEMOIZE_CODE = ord("\x94")

_PUSH, _TEXT, _PUT, _GET, _MEMOIZE, _TAKE, _MARK, _TUPLE, _SET, _LAST, _MANY, _SETS = range(12)
_NUMBER, _NAME, _FROZEN, _POP, _DUP, _STOP, _FRAME, _NONE = range(12, 20)
_KINDS = {
    "MEMOIZE": _MEMOIZE,
    "BINGET": _GET,
    "LONG_BINGET": _GET,
    "GET": _GET,
    "TUPLE1": _LAST,
    "TUPLE2": _LAST,
    "TUPLE3": _LAST,
    "TUPLE": _TUPLE,
    "MARK": _MARK,
    "BINPUT": _PUT,
    "LONG_BINPUT": _PUT,
    "PUT": _PUT,
    "SETITEM": _SET,
    "SETITEMS": _SETS,
    "DICT": _SETS,
    "ADDITEMS": _FROZEN,
    "FROZENSET": _FROZEN,
    "STACK_GLOBAL": _NAME,
    "INT": _NUMBER,
    "LONG": _NUMBER,
    "LONG4": _NUMBER,
    "FLOAT": _NUMBER,
    "FRAME": _FRAME,
    "POP": _POP,
    "DUP": _DUP,
    "STOP": _STOP,
}
_SIZES = {
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "BYTEARRAY8"), _MUTABLE),
    **dict.fromkeys(("LIST", "DICT"), _MUTABLE),
    **dict.fromkeys(("GLOBAL", "PERSID", "EXT1", "EXT2", "EXT4", "INST", "OBJ"), _OBJECT),
}
_PREFIXES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


@dataclass(frozen=True, slots=True)
class Followed:
    """What following a pickle has shown.

    Attributes:
        data: the bytes of the pickle.
        is_odd: whether it builds many large tuples, or gives values several places in another way than by
            an index of the memo that has one value.
        has_containers: whether a tuple, list, dictionary or set has several places.
        shares: the index of the memo for each further place of a value that is not plain.
    """

    data: bytes
    is_odd: bool
    has_containers: bool
    shares: Sequence[int]


class Meter:
    """Counts the items that functions of the allow-list copy.

    Args:
        length: bytes of the pickle.

    Attributes:
        mappings: number of mappings that were made by calls.
    """

    def __init__(self, length: int) -> None:
        self.mappings = 0
        self._left = _COPIES + _COPIES_A_BYTE * length

    def spend(self, count: int) -> None:
        """Count ``count`` items.

        Raises:
            pickle.UnpicklingError: the pickle makes far more of its bytes than picklers do.
        """
        self._left -= count
        if self._left < 0:
            raise pickle.UnpicklingError("its calls copy much more than it holds")


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
            end, is_odd, has_containers, shares = _follow(data)
            break
        except EOFError:
            if len(data) < window or window == _LARGEST_WINDOW:
                raise
        window *= 4
    file.seek(start + end)
    held = data if end == len(data) else data[:end]
    return Followed(held, is_odd, has_containers, shares)


def is_plain_key(key: object, depth: int = 4) -> bool:
    """Whether a value is a key that is hashed and compared at once: a string, a number or a few of them."""
    if isinstance(key, str | bytes):
        return len(key) <= _LONGEST_KEY
    if isinstance(key, tuple):
        return depth > 0 and len(key) <= 64 and all(is_plain_key(item, depth - 1) for item in key)
    return key is None or isinstance(key, int | float | complex)


@lru_cache(maxsize=1)
def _table() -> list[tuple[int, int, int, int]]:
    """For each opcode: its kind, the size of its argument, its effect on the stack, the size of its result.

    The size of an argument that is not constant is a negative number that says how it is found.
    """
    kinds, arguments, effects, results = [_NONE] * 256, [0] * 256, [0] * 256, [1] * 256
    for opcode in pickletools.opcodes:
        code, before = ord(opcode.code), [taken.name for taken in opcode.stack_before]
        effects[code] = len(opcode.stack_after) - len(before)
        arguments[code] = 0 if opcode.arg is None else opcode.arg.n
        results[code] = _SIZES.get(opcode.name, 1)
        if opcode.name in _KINDS:
            kinds[code] = _KINDS[opcode.name]
        elif "mark" in before:
            kinds[code] = _MANY
        elif effects[code] == 1:
            kinds[code] = _TEXT if arguments[code] < -1 and results[code] == 1 else _PUSH
        else:
            kinds[code] = _TAKE
        if kinds[code] == _LAST:
            effects[code] = -len(before)
        elif "mark" in before:
            effects[code] = len(opcode.stack_after) - before.index("mark")
    return [*zip(kinds, arguments, effects, results, strict=True)]


def _end(data: bytes, start: int, size: int) -> int:
    """The end of the argument at ``start``; a negative ``size`` says how the size is found."""
    if size >= 0:
        return start + size
    if size == pickletools.UP_TO_NEWLINE:
        for _ in range(2 if data[start - 1 : start] in (b"c", b"i") else 1):
            start = data.find(b"\n", start) + 1 or len(data) + 1
        return start
    prefix = _PREFIXES[size]
    return start + prefix + int.from_bytes(data[start : start + prefix], "little")


def values(data: bytes) -> Iterator[tuple[int, int]]:
    """Where the numbers and texts of a pickle that was followed lie, without the lengths before them.

    Its limits are the same whatever these bytes are.
    """
    table, at = _table(), 0
    while at < len(data):
        kind, size, _, _ = table[data[at]]
        start, at = at + 1, _end(data, at + 1, size)
        if kind == _PUSH and size > 0:
            yield start, at
        elif kind == _TEXT:
            yield start + _PREFIXES[size], at


def _follow(data: bytes) -> tuple[int, bool, bool, Sequence[int]]:
    """The end of the pickle, and the facts of :class:`Followed`; raises as :func:`follow`."""
    table = _table()
    # There are millions of steps, and a look-up in the module would make each a third slower.
    pushes, texts, puts, gets, memoize, take, last = (
        _PUSH,
        _TEXT,
        _PUT,
        _GET,
        _MEMOIZE,
        _TAKE,
        _LAST,
    )
    whole, one_byte = int.from_bytes, pickletools.TAKEN_FROM_ARGUMENT1
    limit, plain, longest = _LARGEST_KEY, _MUTABLE - 1, _LONGEST_KEY
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    shares: list[int] = []
    push, share, at, start = stack.append, shares.append, 0, 0
    is_odd = has_containers = False
    large, huge = 0, _MUTABLE + limit + 1
    try:
        while True:
            kind, size, effect, result = table[data[at]]
            start = at + 1
            if size >= 0:
                at = start + size
            elif size == one_byte:
                at = start + 1 + data[start]
            else:
                at = _end(data, start, size)
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
                    if held > _OBJECT:
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
                    # Two values may have the same index, one after the other.
                    is_odd = True
                memo[index] = stack[-1]
            elif kind == memoize:
                memo[len(memo)] = stack[-1]
            elif kind == _MARK:
                marks.append(len(stack))
            elif kind == _TUPLE:
                first = marks.pop()
                total = 1 + sum(stack[first:])
                del stack[first:]
                if total & plain > limit:
                    large, total = large + 1, huge
                push(total)
            elif kind == _SET:
                if stack[-2] > limit:
                    raise _too_large()
                del stack[-2:]
            elif kind in (_SETS, _MANY):
                first = marks.pop()
                if kind == _SETS and max(stack[first::2], default=0) > limit:
                    raise _too_large()
                del stack[first:]
                if effect:
                    push(result)
            elif kind == _FROZEN:
                first = marks.pop()
                if max(stack[first:], default=0) > limit:
                    raise _too_large()
                total = 1 + sum(stack[first:])
                del stack[first:]
                if effect:
                    large += total & plain > limit
                    push(min(total, huge))
            elif kind == _NUMBER:
                if at - start > _LONGEST_NUMBER:
                    raise pickle.UnpicklingError("a number in it has thousands of digits")
                push(1)
            elif kind == _NAME:
                del stack[-1]
                stack[-1] = _OBJECT
            elif kind == _POP:
                if marks and marks[-1] == len(stack):
                    marks.pop()
                else:
                    stack.pop()
            elif kind == _DUP:
                push(stack[-1])
                is_odd = True
            elif kind == _FRAME:
                if int.from_bytes(data[start:at], "little") > _LARGEST_FRAME:
                    raise pickle.UnpicklingError("it has a frame that no pickler writes")
            elif kind == _STOP:
                return at, is_odd or large > _MOST_LARGE, has_containers, shares
            else:
                raise pickle.UnpicklingError(f"invalid load key, {data[start - 1 : start]!r}")
            # Most opcodes are followed by this one.
            if data[at] == _MEMOIZE_CODE:
                memo[len(memo)] = stack[-1]
                at += 1
    except (IndexError, KeyError, ValueError) as error:
        if max(at, start) >= len(data):
            raise EOFError from error
        raise pickle.UnpicklingError("an opcode takes an object that does not exist") from error


def _index(data: bytes, start: int, stop: int, size: int) -> int:
    """An index of the memo: a number of ``size`` bytes, or a line."""
    if size > 0:
        return int.from_bytes(data[start:stop], "little")
    if stop - start > _LONGEST_NUMBER:
        raise pickle.UnpicklingError("a number in it has thousands of digits")
    return int(data[start:stop])


def _too_large() -> pickle.UnpicklingError:
    return pickle.UnpicklingError("a key in it is not a plain value, or too large")
