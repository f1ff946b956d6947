"""Owns new names for tensors: wrapper prefixes of ``torch.compile``, DDP and others are removed.

A wrapper module has exactly one child. So a segment is removed only if it has no sibling. ``module.`` is a
common name of real children, so it is a wrapper only at the front of all names; ``_orig_mod.`` is one at any
depth.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.tensors.catalogue import Catalogue

# Written by torch's own wrappers at any depth.
_ANYWHERE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Written by DDP, DataParallel and engines, around the whole model.
_IN_FRONT = ("module",)
_WRAPPERS = {*_ANYWHERE, *_IN_FRONT}


@dataclass(frozen=True)
class Stripped:
    """New names, and the wrappers that were removed.

    Attributes:
        names: old name to new name, for every name.
        removed: each removed wrapper, as ``where.segment.``, with the number of names.
    """

    names: Mapping[str, str]
    removed: Mapping[str, int]


def strip_wrappers(names: Collection[str]) -> Stripped:
    """Remove wrapper segments from ``names``.

    Args:
        names: all names of the state, second names of tied tensors included.

    Raises:
        DamagedCheckpoint: two names become the same.
    """
    # Most checkpoints have none, and splitting a million names takes a second.
    if not any(wrapper in name for wrapper in _WRAPPERS for name in names):
        return Stripped({name: name for name in names}, {})
    paths = {name: name.split(".") for name in names}
    removed: dict[str, int] = {}
    while (wrapper := _find_wrapper(paths.values())) is not None:
        depth = len(wrapper)
        hits = [name for name, path in paths.items() if path[:depth] == wrapper]
        for name in hits:
            paths[name] = [*wrapper[:-1], *paths[name][depth:]]
        removed[".".join(wrapper) + "."] = len(hits)
    new = {name: ".".join(path) for name, path in paths.items()}
    if len(set(new.values())) < len(new):
        seen: dict[str, str] = {}
        for old, name in new.items():
            if name in seen:
                raise DamagedCheckpoint(
                    f"without its wrapper prefix it has the same name as {seen[name]}", tensor=old
                )
            seen[name] = old
    return Stripped(new, removed)


class _Node:
    """A segment in the tree of all names. What a name takes is in proportion to its length."""

    __slots__ = ("_parent", "_segment", "children", "is_name")

    def __init__(self, parent: _Node | None = None, segment: str = "") -> None:
        self._parent, self._segment = parent, segment
        self.children: dict[str, _Node] = {}
        self.is_name = False

    def path(self) -> list[str]:
        """The segments from the root to this one."""
        if self._parent is None:
            return []
        return [*self._parent.path(), self._segment]


def _find_wrapper(paths: Collection[list[str]]) -> list[str] | None:
    """The outermost wrapper: a path whose last segment is the only child of its parent."""
    # After the last wrapper there is none, and the tree of a million names takes seconds.
    if all(_WRAPPERS.isdisjoint(path) for path in paths):
        return None
    tree = _Node()
    for path in paths:
        node = tree
        for segment in path:
            inner = node.children.get(segment)
            if inner is None:
                inner = node.children[segment] = _Node(node, segment)
            node = inner
        node.is_name = True
    level = [tree]
    while level:
        for parent in level:
            if len(parent.children) != 1:
                continue
            ((only, child),) = parent.children.items()
            is_wrapper = only in _ANYWHERE or (only in _IN_FRONT and parent is tree)
            if is_wrapper and not child.is_name:
                return child.path()
        level = [child for node in level for child in node.children.values()]
    return None


def rename(catalogue: Catalogue, names: Mapping[str, str]) -> Catalogue:
    """The catalogue with every name, tied ones included, replaced by ``names[name]``."""
    tensors = {names[name]: catalogue[name] for name in catalogue}
    ties = {names[alias]: names[kept] for alias, kept in catalogue.ties.items()}
    return Catalogue(tensors, ties)
