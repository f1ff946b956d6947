"""Owns new names for tensors: wrapper prefixes of ``torch.compile``, DDP and others are removed.

A wrapper module has exactly one child. So a segment is removed only if it has no sibling. ``module.`` is a
common name of real children, so it is a wrapper only at the front of all names; ``_orig_mod.`` is one at any
depth.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from ckpt_tools.tensors.catalogue import Catalogue

# Written by torch's own wrappers at any depth.
_ANYWHERE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Written by DDP, DataParallel and engines, around the whole model.
_IN_FRONT = ("module",)
_WRAPPERS = (*_ANYWHERE, *_IN_FRONT)


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
    """
    # Most checkpoints have none, and splitting a million names takes a second.
    if not any(wrapper in name for wrapper in _WRAPPERS for name in names):
        return Stripped({name: name for name in names}, {})
    tree = _Node()
    for name in names:
        node = tree
        for segment in name.split("."):
            node = node.step(segment)
            node.count += 1
        node.is_name = True
    removed = dict(_mark_wrappers(tree))
    return Stripped({name: _without_wrappers(name, tree) for name in names}, removed)


class _Node:
    """A segment in the tree of all names.

    Attributes:
        children: the segments that follow it.
        count: number of names that pass it or end at it.
        is_name: whether a name ends at it.
        is_wrapper: whether it is to be removed.
    """

    __slots__ = ("children", "count", "is_name", "is_wrapper")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.count = 0
        self.is_name = self.is_wrapper = False

    def step(self, segment: str) -> _Node:
        """The child of a segment, made if there is none."""
        child = self.children.get(segment)
        if child is None:
            child = self.children[segment] = _Node()
        return child


def _mark_wrappers(tree: _Node) -> Iterator[tuple[str, int]]:
    """Mark the wrappers, the outer ones first: a wrapper is the only child of what is left above it.

    Yields:
        The path of each wrapper under the new names, with a dot at its end, and its number of names.
    """
    pending = deque([("", tree)])
    while pending:
        where, node = pending.popleft()
        while len(node.children) == 1:
            ((segment, child),) = node.children.items()
            can_be = segment in _ANYWHERE or (segment in _IN_FRONT and not where)
            if not can_be or child.is_name:
                break
            child.is_wrapper = True
            yield f"{where}{segment}.", child.count
            node = child
        for segment, child in node.children.items():
            pending.append((f"{where}{segment}.", child))


def _without_wrappers(name: str, tree: _Node) -> str:
    node, kept = tree, []
    for segment in name.split("."):
        node = node.children[segment]
        if not node.is_wrapper:
            kept.append(segment)
    return ".".join(kept)


def rename(catalogue: Catalogue, names: Mapping[str, str]) -> Catalogue:
    """The catalogue with every name, tied ones included, replaced by ``names[name]``."""
    tensors = {names[name]: catalogue[name] for name in catalogue}
    ties = {names[alias]: names[kept] for alias, kept in catalogue.ties.items()}
    return Catalogue(tensors, ties)
