"""Owns the limit on what lists, dictionaries and tuples of a pickle expand to.

A pickle can put one list into several places of another, and that one again into several places of a third.
Forty such levels take 200 bytes, and whoever prints, compares or walks through the result visits 2^40 items.
A tuple that is nested too deep overflows the stack when it is hashed, which kills the process. A list that
contains itself has no end.

Such a value gives way to an inert object, in the list, dictionary or object that holds it. A reader that
needs it refuses the file; other readers never see it. An object of an unknown class ends an expansion,
because nothing walks into it unasked. What it holds is measured by itself.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from typing import NamedTuple

from ckpt_tools.readers.containers.pickled import Opaque

# Frameworks nest a few levels.
_DEEPEST = 1_000
# A mesh of devices may be repeated in each tensor of a rank.
_ITEMS_A_BYTE, _ITEMS = 8, 200_000
_HOLDING = (dict, list, tuple, set, frozenset)


class Endless(Opaque):
    """A value that expands to much more than the pickle holds, or contains itself."""

    global_name = "value that expands without end"


class _Size(NamedTuple):
    """Items of a value with all that is in it, and its levels of tuples."""

    items: int
    levels: int


def may_expand(shared: Iterable[tuple[object, int]], length: int) -> bool:
    """Whether a pickle that is not odd may have built a value that :func:`without_expansion` replaces.

    Each further place of a value adds at most the size of that value to what holds it. So nothing is larger
    than all values of the pickle and the sizes of all further places together.

    Args:
        shared: the values that have further places, and the number of these.
        length: bytes of the pickle, of which each builds one value at most.
    """
    left = _ITEMS + _ITEMS_A_BYTE * length - length
    measuring = _Measuring(left)
    for value, places in shared:
        size = measuring.size(value)
        if size is None:
            return True
        left -= places * size.items
        if left < 0:
            return True
    return False


def without_expansion(value: object, length: int) -> object:
    """What a pickle has built, without values that expand to far more than it holds.

    Args:
        value: what was built; lists, dictionaries and inert objects in it are changed in place.
        length: bytes of the pickle.

    Raises:
        pickle.UnpicklingError: the value itself is such a value.
    """
    measuring = _Measuring(_ITEMS + _ITEMS_A_BYTE * length)
    if measuring.is_endless(value):
        raise pickle.UnpicklingError("what it shares expands to much more than it holds")
    known: set[int] = set()
    while measuring.objects:
        held = measuring.objects.pop()
        if id(held) in known:
            continue
        known.add(id(held))
        if measuring.is_endless(held.args):
            held.args = (Endless(),)
        if measuring.is_endless(held.state):
            held.state = Endless()
    return value


class _Measuring:
    """Measures each container once, the inner ones first.

    Attributes:
        objects: inert objects that were met.
    """

    def __init__(self, limit: int) -> None:
        self.objects: list[Opaque] = []
        self._limit = limit
        self._sizes: dict[int, _Size | None] = {}  # None for a value that expands without end

    def is_endless(self, value: object) -> bool:
        """Whether a value expands without end, after such values in it have given way."""
        return self.size(value) is None

    def size(self, value: object) -> _Size | None:
        """The size of a value, after values in it have given way; None if it expands without end."""
        if isinstance(value, Opaque):
            self.objects.append(value)
        if not isinstance(value, _HOLDING):
            return _Size(1, 0)
        sizes, pending, entered = self._sizes, [value], set[int]()
        while pending:
            one = pending[-1]
            key = id(one)
            if key in sizes:
                pending.pop()
            elif key in entered:
                pending.pop()
                sizes[key] = self._measured(one)
            else:
                inner = [item for item in _items(one) if isinstance(item, _HOLDING)]
                if inner:
                    entered.add(key)
                    pending += [item for item in inner if id(item) not in entered]
                else:
                    pending.pop()
                    sizes[key] = self._measured(one)
        return sizes[id(value)]

    def _measured(self, one: object) -> _Size | None:
        items, levels, lost = 1, 0, set[int]()
        for item in _items(one):
            items += 1
            if isinstance(item, _HOLDING):
                # A container without a size holds this one.
                size = self._sizes.get(id(item))
                if size is None or items + size.items > self._limit:
                    lost.add(id(item))
                else:
                    items += size.items
                    levels = max(levels, size.levels)
            elif isinstance(item, Opaque):
                self.objects.append(item)
        if isinstance(one, tuple | frozenset | set):
            return None if lost or levels >= _DEEPEST else _Size(items, levels + 1)
        if isinstance(one, list) and lost:
            one[:] = [Endless() if id(item) in lost else item for item in one]
        if isinstance(one, dict) and lost:
            one.update({k: Endless() for k, held in one.items() if id(held) in lost})
        return _Size(items, 0)


def _items(container: object) -> list[object]:
    if isinstance(container, dict):
        return [*container, *container.values()]
    assert isinstance(container, list | tuple | set | frozenset)
    return [*container]
