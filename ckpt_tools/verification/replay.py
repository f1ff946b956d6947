"""Owns the replay of a manifest's recipes: each recorded tensor is made again from a checkpoint.

The tensors that recipes use are searched in the given checkpoint, which replaces one source, and in the other
sources, if they still exist. Another check reports a manifest that cannot be read. Here it counts as absent.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_tools import readers
from ckpt_tools.errors import CkptError, DamagedCheckpoint
from ckpt_tools.readers.opening import open_weights
from ckpt_tools.storage.addresses import is_address
from ckpt_tools.storage.naming import as_path
from ckpt_tools.storage.regular import content_of
from ckpt_tools.tensors.catalogue import Tensor
from ckpt_tools.tensors.checkpoint import Checkpoint, Copy
from ckpt_tools.tensors.derived import cast
from ckpt_tools.transforms.lora import adapted_names, with_adapter_name
from ckpt_tools.transforms.prefixes import strip_wrappers
from ckpt_tools.transforms.recipe import Json, Leaf, leaves_of, rebuilt, recipe_leaves

Leaves = dict[Leaf, Tensor]


@dataclass(frozen=True)
class Record:
    """The record of a directory in its manifest.

    Attributes:
        recipes: the recipe of each tensor.
        sources: the record of each source.
        weights: the copy that was taken.
    """

    recipes: Mapping[str, Json]
    sources: tuple[Mapping[str, Any], ...]
    weights: Copy

    @property
    def step(self) -> int | None:
        """Step of the first source, if known."""
        step = self.sources[0].get("step")
        return step if isinstance(step, int) else None


def read_record(path: Path) -> Record | None:
    """The record in a manifest; None if the manifest is missing or has no record."""
    try:
        data = json.loads(content_of(path))
        sources = tuple(dict(source) for source in data["sources"])
        weights: Copy = "model" if data["options"].get("weights") == "model" else "master"
        recipes = {name: entry.get("from", name) for name, entry in data["tensors"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return Record(recipes, sources, weights) if sources else None


@dataclass(frozen=True)
class Replayed:
    """The tensors that the recipes make.

    Attributes:
        tensors: tensors that can be made.
        elsewhere: tensors that need a tensor that the checkpoint does not have, with the reason.
        broken: tensors whose recipe cannot be followed, with the reason.
        absent: tensors that need a missing source, by the reason.
    """

    tensors: Mapping[str, Tensor]
    elsewhere: Mapping[str, str]
    broken: Mapping[str, str]
    absent: Mapping[str, tuple[str, ...]]


def replay(record: Record, checkpoint: Checkpoint, names: Iterable[str]) -> Replayed:
    """Follow the recipes of some tensors again.

    Args:
        record: the manifest.
        checkpoint: replaces the source with the same directory, or the first source.
        names: the tensors. Those that the manifest does not have are left out.
    """
    recipes = {name: record.recipes[name] for name in names if name in record.recipes}
    begun: dict[str, tuple[Leaf, ...]] = {}
    broken: dict[str, str] = {}
    for name, recipe in recipes.items():
        try:
            leaves = tuple(recipe_leaves(recipe))
            if not all(0 <= leaf.source < len(record.sources) for leaf in leaves):
                raise DamagedCheckpoint("it names a source that is not listed")
            begun[name] = leaves
        except (DamagedCheckpoint, RecursionError) as error:
            broken[name] = str(error)
    place = _place(record, checkpoint)
    needed = {leaf for each in begun.values() for leaf in each}
    held, unread = _leaves(record, checkpoint, place, needed)
    tensors: dict[str, Tensor] = {}
    elsewhere: dict[str, str] = {}
    absent: dict[str, tuple[str, ...]] = {}
    for name, leaves in begun.items():
        gone = next((unread[leaf.source] for leaf in leaves if leaf.source in unread), None)
        lacking = next((leaf for leaf in leaves if leaf not in held), None)
        if gone is not None:
            absent[gone] = (*absent.get(gone, ()), name)
        elif lacking is not None and lacking.source == place:
            elsewhere[name] = f"it was made from {lacking.name}, which the checkpoint does not have"
        else:
            try:
                tensors[name] = rebuilt(recipes[name], held)
            except DamagedCheckpoint as error:
                broken[name] = str(error)
    return Replayed(tensors, elsewhere, broken, absent)


def _place(record: Record, checkpoint: Checkpoint) -> int:
    """The source that the checkpoint replaces."""
    location = checkpoint.location
    here = (str(location.directory.resolve()), location.part)
    paths = [(str(source.get("path", "")), source.get("part")) for source in record.sources]
    places = ((_resolved(path), part) if path else None for path, part in paths)
    return next((index for index, place in enumerate(places) if place == here), 0)


def _resolved(path: str) -> str:
    """The text of a recorded path, links resolved; an address has none."""
    return path if is_address(path) else str(Path(path).resolve())


def _leaves(
    record: Record, checkpoint: Checkpoint, place: int, needed: set[Leaf]
) -> tuple[Leaves, dict[int, str]]:
    """The tensors that recipes can use, and why sources cannot be read."""
    found = _of_checkpoint(place, checkpoint, record.weights, needed)
    unread: dict[int, str] = {}
    for index in sorted({leaf.source for leaf in needed} - {place}):
        try:
            source = _reopened(record.sources[index])
            found |= _of_checkpoint(index, source, record.weights, needed)
        except CkptError as error:
            unread[index] = f"{record.sources[index].get('path')}: {error.fact}"
    return found, unread


def _reopened(source: Mapping[str, Any]) -> Checkpoint:
    """A source at its recorded path."""
    path, format = as_path(str(source.get("path", ""))), source.get("format")
    if format not in readers.readers():
        return open_weights(path)
    found = readers.readers()[format].find(path, None)
    location = next((each for each in found if each.part == source.get("part")), None)
    if location is None:
        raise DamagedCheckpoint("it no longer exists", path=path)
    return readers.read(location)


def _of_checkpoint(index: int, checkpoint: Checkpoint, weights: Copy, needed: set[Leaf]) -> Leaves:
    """The tensors of a source under the names in recipes."""
    leaves: Leaves = dict(leaves_of(index, checkpoint, weights))
    for name, weight in checkpoint.weights.items() if weights == "model" else ():
        if weight.model is None and weight.master is not None:
            # The engine made the weights by rounding the masters.
            leaves[Leaf(index, name)] = cast(weight.master, weight.dtype)
    for alias, kept in checkpoint.ties.items():
        leaves[Leaf(index, alias)] = leaves[Leaf(index, kept)]
    wanted = {leaf.name for leaf in needed if leaf.source == index}
    held = [*checkpoint.weights, *checkpoint.ties]
    for name, other in _other_names(wanted - set(held), wanted, held).items():
        for copy in (None, "master", "model"):
            tensor = leaves.get(Leaf(index, other, copy))
            if tensor is not None:
                leaves[Leaf(index, name, copy)] = tensor
    return leaves


def _other_names(lacking: set[str], wanted: set[str], held: list[str]) -> dict[str, str]:
    """For recorded names that the checkpoint does not have, the matching names that it has.

    Either side can have wrapper prefixes. Tensors of an adapter's directory were recorded with the adapter's
    name.
    """
    if not lacking:
        return {}
    found: dict[str, str] = {}
    try:
        plain = {new: old for old, new in strip_wrappers(held).names.items()}
        recorded = strip_wrappers(wanted).names
        found |= {name: plain[recorded[name]] for name in lacking if recorded[name] in plain}
        found |= {name: plain[name] for name in lacking if name in plain}
        for adapter in adapted_names(lacking).adapters:
            found |= {with_adapter_name(name, adapter): name for name in held}
    except CkptError:
        return {}
    return {name: other for name, other in found.items() if name in lacking}
