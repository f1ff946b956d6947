"""Owns the unpickling of many keys that may have one hash, in time that follows from their number.

Whole numbers that differ by 2^61 - 1 have one hash, and so have the tuples that they are in. Python compares
each key with all others of its hash, so ten thousand such keys take seconds, and a million take days. A file
with more of them need not be hostile: a pickled tokenizer has tuples as keys.

:class:`ApartUnpickler` makes such a key inert before a dictionary or a set gets it. An inert object is hashed
by its identity. This unpickler is the one of the standard library that is written in Python, because the
other one, which takes a tenth of the time, gives keys to dictionaries by itself.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, ClassVar

from ckpt_tools.readers.containers.pickle_limits import has_own_hash
from ckpt_tools.readers.containers.pickled import Opaque


class Key(Opaque):
    """A key that is a tuple, a long number or another value of which many may have one hash."""

    __slots__ = ()
    global_name = "tuple or long number"


def apart(key: Any) -> Any:
    """A key as it is, or inert if many like it may have one hash."""
    return key if isinstance(key, Opaque | type) or has_own_hash(key) else Key(key)


def _with_keys(
    load: Callable[[Any], None], step: int, first: int | None = None
) -> Callable[[Any], None]:
    """What an opcode does, after the keys on the stack were made inert.

    Args:
        load: what the opcode does.
        step: distance between keys on the stack.
        first: place of the first; by default the place after the last mark.
    """

    def do(unpickler: Any) -> None:
        keys = slice(first, None, step)
        unpickler.stack[keys] = map(apart, unpickler.stack[keys])
        load(unpickler)

    return do


_LOADS: dict[int, Callable[[Any], None]] = {**pickle._Unpickler.dispatch}


class ApartUnpickler(pickle._Unpickler):
    """An unpickler of which no dictionary and no set has keys that may have one hash."""

    dispatch: ClassVar[dict[int, Any]] = {
        **_LOADS,
        pickle.SETITEM[0]: _with_keys(_LOADS[pickle.SETITEM[0]], 2, -2),
        pickle.SETITEMS[0]: _with_keys(_LOADS[pickle.SETITEMS[0]], 2),
        pickle.DICT[0]: _with_keys(_LOADS[pickle.DICT[0]], 2),
        pickle.ADDITEMS[0]: _with_keys(_LOADS[pickle.ADDITEMS[0]], 1),
        pickle.FROZENSET[0]: _with_keys(_LOADS[pickle.FROZENSET[0]], 1),
    }

    def load(self) -> Any:
        """The value; an object that does not exist is an error of the pickle, as for the other unpickler."""
        try:
            return super().load()
        except (IndexError, KeyError) as error:
            raise pickle.UnpicklingError("an opcode takes an object that does not exist") from error
