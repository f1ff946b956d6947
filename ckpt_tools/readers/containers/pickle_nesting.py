"""Owns the limit on nested tuples in pickles: hashing deeper ones overflows the stack and kills the process.

Python hashes a tuple that is a key, and the tuples in it, recursively in C without a limit. Such tuples
must not be built, so the opcodes are followed first, with the depth of each object on the unpickler's
stack. This takes as long as building the objects, so a pickle with too few tuples to do harm is not
followed. A list, a dictionary or an object is not hashed by its content and ends a nest. No function of the
allow-list makes a tuple of anything but numbers, or takes a tuple out of its arguments.

Sources: ``pickletools`` (what each opcode takes and leaves), ``Modules/_pickle.c`` (memo, POP).
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import resource
import threading
from functools import lru_cache

# Frameworks nest a few levels.
_DEEPEST = 1_000
# A nested tuple takes 64 bytes of the stack. Threads have stacks of at least 2 MB, usually 8 MB.
_STACK_BYTES = 80
_THREAD_STACK, _USUAL_STACK = 2 << 20, 8 << 20
_WINDOW, _LARGEST_WINDOW = 1 << 16, 1 << 28

# Metadata has millions of two runs of opcodes; each is followed as one step. The first is a call with a tuple
# of one tuple of numbers, as torch.Size is pickled; the second a new object, and a dictionary for its state.
_NUMBER = rb"(?:K.|M..|J....)"
_TUPLES = [_NUMBER * count + code for count, code in ((1, b"\x85"), (2, b"\x86"), (3, b"\x87"))]
_SIZE = re.compile(rb"h.(?:" + b"|".join(_TUPLES) + rb")\x94\x85\x94R\x94", re.DOTALL)
_OBJECT = re.compile(rb"h.\)\x81\x94\}\x94\(", re.DOTALL)
_ARGUMENTS, _NUMBER_CODES = ord(")"), frozenset(b"KMJ")

_PUSH, _MEMOIZE, _GET, _TAKE, _LAST, _TO_MARK, _TUPLE, _MARK, _PUT, _POP, _DUP, _STOP, _NONE = (
    range(13)
)
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
    "POP": _POP,
    "DUP": _DUP,
    "STOP": _STOP,
}
_PREFIXES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


def refuse_deep_nesting(file: io.BufferedIOBase | io.BytesIO) -> None:
    """Check the pickle at the position of ``file``, and restore the position.

    Args:
        file: one pickle in memory, or a stream in which more data may follow the pickle.

    Raises:
        pickle.UnpicklingError: tuples are nested too deep, or the data is not a pickle.
        EOFError: the pickle is truncated.
    """
    start = file.tell()
    if isinstance(file, io.BytesIO):
        data = file.getvalue()[start:]
        if _tuples(data) * _STACK_BYTES > _stack():
            _follow(data)
        return
    window = _WINDOW
    while True:
        file.seek(start)
        data = file.read(window)
        try:
            _follow(data)
            break
        except EOFError:
            if len(data) < window or window == _LARGEST_WINDOW:
                raise
        window *= 4
    file.seek(start)


def _tuples(data: bytes) -> int:
    """An upper bound of the number of non-empty tuples: bytes that may be opcodes which make one."""
    counted = sum(data.count(code) for code in (b"\x85", b"\x86", b"\x87"))
    return counted + min(data.count(b"("), data.count(b"t"))


def _stack() -> int:
    """A lower bound of the size of this thread's stack in bytes."""
    if threading.current_thread() is not threading.main_thread():
        return _THREAD_STACK
    limit = resource.getrlimit(resource.RLIMIT_STACK)[0]
    return _USUAL_STACK if limit == resource.RLIM_INFINITY else min(limit, _USUAL_STACK)


@lru_cache(maxsize=1)
def _table() -> tuple[list[int], list[int], list[int]]:
    """For each opcode: its kind, the size of its argument or how it is found, its effect on the stack."""
    kinds, sizes, effects = [_NONE] * 256, [0] * 256, [0] * 256
    for opcode in pickletools.opcodes:
        code, before = ord(opcode.code), [taken.name for taken in opcode.stack_before]
        effects[code] = len(opcode.stack_after) - len(before)
        kinds[code] = _KINDS.get(opcode.name, _PUSH if effects[code] == 1 else _TAKE)
        sizes[code] = 0 if opcode.arg is None else opcode.arg.n
        if kinds[code] == _LAST:
            effects[code] = -len(before)
        elif opcode.name not in _KINDS and "mark" in before:
            kinds[code] = _TO_MARK
            effects[code] = len(opcode.stack_after) - before.index("mark")
    return kinds, sizes, effects


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


def _follow(data: bytes) -> None:
    """Raise as :func:`refuse_deep_nesting`; every object but a tuple counts as an empty tuple."""
    kinds, sizes, effects = _table()
    # There are millions of steps, and a look-up in the module would make each a third slower.
    pushes, memoize, get, take, last = _PUSH, _MEMOIZE, _GET, _TAKE, _LAST
    depths: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    numbers, arguments, size_at, object_at = _NUMBER_CODES, _ARGUMENTS, _SIZE.match, _OBJECT.match
    push, known, at = depths.append, 0, 0
    try:
        while True:
            code = data[at]
            kind, size, start = kinds[code], sizes[code], at + 1
            at = start + size if size >= 0 else _end(data, start, size)
            if kind == pushes:
                push(1)
            elif kind == memoize:
                memo[known] = depths[-1]
                known += 1
            elif kind == get:
                if size == 1 and data[start] in memo:
                    following = data[at]
                    if following in numbers and (run := size_at(data, start - 1)):
                        memo[known], memo[known + 1], memo[known + 2] = 2, 3, 1
                        known, at = known + 3, run.end()
                        push(1)
                        continue
                    if following == arguments and (run := object_at(data, start - 1)):
                        memo[known] = memo[known + 1] = 1
                        known, at = known + 2, run.end()
                        depths += 1, 1
                        marks.append(len(depths))
                        continue
                push(
                    memo[
                        int.from_bytes(data[start:at], "little")
                        if size > 0
                        else int(data[start:at])
                    ]
                )
            elif kind == take:
                if effects[code]:
                    del depths[effects[code] :]
            elif kind == last:
                depth = 1 + max(depths[effects[code] :])
                if depth > _DEEPEST:
                    raise _too_deep()
                del depths[effects[code] :]
                push(depth)
            elif kind == _TO_MARK:
                del depths[marks.pop() :]
                if effects[code]:
                    push(1)
            elif kind == _TUPLE:
                first = marks.pop()
                depth = 1 + max(depths[first:], default=0)
                if depth > _DEEPEST:
                    raise _too_deep()
                del depths[first:]
                push(depth)
            elif kind == _MARK:
                marks.append(len(depths))
            elif kind == _PUT:
                memo[_index(data, start, at, size)] = depths[-1]
                known = len(memo)
            elif kind == _POP:
                if marks and marks[-1] == len(depths):
                    marks.pop()
                else:
                    depths.pop()
            elif kind == _DUP:
                push(depths[-1])
            elif kind == _STOP:
                return
            else:
                raise pickle.UnpicklingError(f"invalid load key, {data[start - 1 : start]!r}")
    except (IndexError, KeyError, ValueError) as error:
        if at >= len(data):
            raise EOFError from error
        raise pickle.UnpicklingError("an opcode takes an object that does not exist") from error


def _index(data: bytes, start: int, stop: int, size: int) -> int:
    """An index of the memo: a number of ``size`` bytes, or a line."""
    return int.from_bytes(data[start:stop], "little") if size > 0 else int(data[start:stop])


def _too_deep() -> pickle.UnpicklingError:
    return pickle.UnpicklingError("it nests tuples too deep")
