"""Owns what is known of each opcode of a pickle: its argument, its effect on the stack, its result's size.

Source: ``pickletools`` (what each opcode takes and leaves).
"""

from __future__ import annotations

import pickletools
from functools import lru_cache

# The size of an object whose class decides what is in it, and of a list, a dictionary or a set.
# A tuple that holds one of the latter is at least as large, and the rest of its size counts what is plain.
OBJECT, MUTABLE = 3, 1 << 40
PUSH, TEXT, PUT, GET, MEMOIZE, TAKE, MARK, TUPLE, SET, LAST, MANY, SETS = range(12)
NUMBER, NAME, FROZEN, POP, DUP, STOP, FRAME, NONE, BUILD, NEW, LONG = range(12, 23)
# The size of an instance of a class, which is hashed by its identity, and that of the largest key that is an
# instance or one plain value. Others, such as tuples, may be made to have one hash.
INSTANCE = SIMPLE = 2
# Numbers of more bytes may have one hash, too.
LONGEST_SIMPLE = 7
_KINDS = {
    "MEMOIZE": MEMOIZE,
    "BINGET": GET,
    "LONG_BINGET": GET,
    "GET": GET,
    "TUPLE1": LAST,
    "TUPLE2": LAST,
    "TUPLE3": LAST,
    "TUPLE": TUPLE,
    "MARK": MARK,
    "BINPUT": PUT,
    "LONG_BINPUT": PUT,
    "PUT": PUT,
    "SETITEM": SET,
    "SETITEMS": SETS,
    "DICT": SETS,
    "ADDITEMS": FROZEN,
    "FROZENSET": FROZEN,
    "STACK_GLOBAL": NAME,
    "INT": NUMBER,
    "LONG": NUMBER,
    "LONG4": NUMBER,
    "FLOAT": NUMBER,
    "FRAME": FRAME,
    "POP": POP,
    "DUP": DUP,
    "STOP": STOP,
    "BUILD": BUILD,
    "NEWOBJ": NEW,
    "NEWOBJ_EX": NEW,
    "LONG1": LONG,
}
_SIZES = {
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "BYTEARRAY8"), MUTABLE),
    **dict.fromkeys(("LIST", "DICT"), MUTABLE),
    **dict.fromkeys(("GLOBAL", "PERSID", "EXT1", "EXT2", "EXT4", "INST", "OBJ"), OBJECT),
}
PREFIXES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


@lru_cache(maxsize=1)
def table_of_opcodes() -> list[tuple[int, int, int, int]]:
    """For each opcode: its kind, the size of its argument, its effect on the stack, the size of its result.

    The size of an argument that is not constant is a negative number that says how it is found.
    """
    kinds, arguments, effects, results = [NONE] * 256, [0] * 256, [0] * 256, [1] * 256
    for opcode in pickletools.opcodes:
        code, before = ord(opcode.code), [taken.name for taken in opcode.stack_before]
        effects[code] = len(opcode.stack_after) - len(before)
        arguments[code] = 0 if opcode.arg is None else opcode.arg.n
        results[code] = _SIZES.get(opcode.name, 1)
        if opcode.name in _KINDS:
            kinds[code] = _KINDS[opcode.name]
        elif "mark" in before:
            kinds[code] = MANY
        elif effects[code] == 1:
            kinds[code] = TEXT if arguments[code] < -1 and results[code] == 1 else PUSH
        else:
            kinds[code] = TAKE
        if kinds[code] == LAST:
            effects[code] = -len(before)
        elif "mark" in before:
            effects[code] = len(opcode.stack_after) - before.index("mark")
    return [*zip(kinds, arguments, effects, results, strict=True)]


def end_of_argument(data: bytes, start: int, size: int) -> int:
    """The end of the argument at ``start``; a negative ``size`` says how the size is found."""
    if size >= 0:
        return start + size
    if size == pickletools.UP_TO_NEWLINE:
        for _ in range(2 if data[start - 1 : start] in (b"c", b"i") else 1):
            start = data.find(b"\n", start) + 1 or len(data) + 1
        return start
    prefix = PREFIXES[size]
    return start + prefix + int.from_bytes(data[start : start + prefix], "little")
