"""Refuses pickles that nest tuples so deep that hashing one would overflow the stack and kill the process.

A tuple that is a key is hashed, a tuple in it too, and so on, in C and without a limit. So tuples that deep
are never built: the opcodes are followed first, and of each object on the unpickler's stack is kept how deep
it is. That takes as long as building them; a pickle with too few tuples to do harm is spared it. A list, a
dictionary or an object is not hashed by what it holds and ends a nest, and no function of the allow-list
makes a tuple of more than numbers or takes one out of what it is given.

Sources: ``pickletools`` (what each opcode takes and leaves), ``Modules/_pickle.c`` (memo, POP).
"""

from __future__ import annotations

import io
import pickle
import pickletools
import resource
import threading
from functools import lru_cache

# Frameworks nest a handful.
_DEEPEST = 1_000
# A nested tuple takes 64 bytes of the stack, of which threads have 2 MB at least and 8 MB as a rule.
_STACK_BYTES = 80
_THREAD_STACK, _USUAL_STACK = 2 << 20, 8 << 20
_WINDOW, _LARGEST_WINDOW = 1 << 16, 1 << 28

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
    """Look at the pickle that begins where ``file`` stands, and leave ``file`` standing there.

    Args:
        file: in memory, and then one pickle alone; or a stream in which more may follow it.

    Raises:
        pickle.UnpicklingError: tuples are nested too deep, or it is no pickle.
        EOFError: it ends too early.
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
    """An upper bound of the tuples that hold something: bytes that may be opcodes that make one."""
    counted = sum(data.count(code) for code in (b"\x85", b"\x86", b"\x87"))
    return counted + min(data.count(b"("), data.count(b"t"))


def _stack() -> int:
    """Bytes of this thread's stack, at least."""
    if threading.current_thread() is not threading.main_thread():
        return _THREAD_STACK
    limit = resource.getrlimit(resource.RLIMIT_STACK)[0]
    return _USUAL_STACK if limit == resource.RLIM_INFINITY else min(limit, _USUAL_STACK)


@lru_cache(maxsize=1)
def _table() -> tuple[list[int], list[int], list[int]]:
    """Of each opcode: its kind, the bytes of its argument or how they are found, its net effect."""
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
    """Where the argument ends that starts at ``start``, by its size or by how that is found."""
    if size >= 0:
        return start + size
    if size == pickletools.UP_TO_NEWLINE:
        for _ in range(2 if data[start - 1 : start] in (b"c", b"i") else 1):
            start = data.find(b"\n", start) + 1 or len(data) + 1
        return start
    prefix = _PREFIXES[size]
    return start + prefix + int.from_bytes(data[start : start + prefix], "little")


def _follow(data: bytes) -> None:
    """Raise as :func:`refuse_deep_nesting` does; every other object counts as a tuple of nothing."""
    kinds, sizes, effects = _table()
    # Millions of steps: looking these up in the module would make each a third longer.
    pushes, memoize, get, take, last = _PUSH, _MEMOIZE, _GET, _TAKE, _LAST
    depths: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
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
                push(memo[data[start] if size == 1 else _index(data, start, at, size)])
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
        raise pickle.UnpicklingError("it takes what is not there") from error


def _index(data: bytes, start: int, stop: int, size: int) -> int:
    """A place in the memo: a number of so many bytes, or a line."""
    return int.from_bytes(data[start:stop], "little") if size > 0 else int(data[start:stop])


def _too_deep() -> pickle.UnpicklingError:
    return pickle.UnpicklingError("it nests tuples too deep")
