"""Owns the step from a state to the names and shapes of the hub, as ``save_pretrained`` writes them.

transformers 5 holds many models in memory under other names and shapes than on the hub. A state is in one
of the two layouts. Names and shapes that only one layout has show which. A state in the hub layout keeps
its tensors. A state in the live layout gets views and joins of its tensors. The facts about the model are in
:class:`~ckpt_tools.hub.reference.ReferenceModel`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ckpt_tools.errors import DamagedCheckpoint, UnsupportedLayout, UsageError
from ckpt_tools.hub.reference import ReferenceModel, SavedTensor
from ckpt_tools.hub.reference.recipes import Joined, Live, NewValues, Recipe, Strided, leaves
from ckpt_tools.tensors.catalogue import Catalogue, Tensor, row_major_strides
from ckpt_tools.tensors.derived import Concat, view

Layout: TypeAlias = Literal["live", "hub", "same"]


@dataclass(frozen=True)
class HubLayout:
    """A catalogue in the hub layout, and the changes that made it.

    Attributes:
        catalogue: the tensors in the order of ``save_pretrained``, then tied names for which the state
            holds a second tensor, then tensors that the model does not have. Ties are under hub names,
            and the kept names are those that ``save_pretrained`` keeps.
        renamed: old and new name of each tensor that was only renamed.
        converted: hub name of each tensor that was made from others, and their names in the state.
        unexpected: names of the state that the model does not have. They are kept.
        ignored: names of the state that ``save_pretrained`` never writes. They are left out.
    """

    catalogue: Catalogue
    renamed: Mapping[str, str]
    converted: Mapping[str, tuple[str, ...]]
    unexpected: tuple[str, ...]
    ignored: tuple[str, ...]


def hub_layout(catalogue: Catalogue, model: ReferenceModel) -> HubLayout:
    """Bring the tensors of a state into the layout that ``save_pretrained`` writes.

    Args:
        catalogue: the state, under names of the live model, of the hub, or of another known hub layout.
        model: the model of the state.

    Raises:
        UsageError: the shape of a tensor that must be split differs from the config.
        UnsupportedLayout: the layout needs more than moving data.
        DamagedCheckpoint: the state holds a tensor in both layouts.
    """
    state = {name: catalogue[name] for name in (*catalogue, *catalogue.ties)}
    found = layout_of(state, model)
    in_state = _names_in_layout(state, found, model)
    if found == "hub":
        state.update(_cut_anew(state, in_state, model))
    ignored = tuple(in_state[name] for name in model.ignored if name in in_state)
    tensors: dict[str, Tensor] = {}
    origins: dict[str, tuple[str, ...]] = {}
    for name, saved in {**model.saved, **model.tied}.items():
        recipe = _recipe(name, saved, found, in_state)
        if recipe is not None:
            needed = {leaf.name: in_state[leaf.name] for leaf in _names(recipe)}
            if not isinstance(recipe, Live):
                _prove_shapes(needed, state, model)
            tensors[name] = _built(recipe, {leaf: state[old] for leaf, old in needed.items()})
            origins[name] = tuple(needed.values())
    renamed = {
        old: name
        for name, (old, *others) in origins.items()
        if old != name and not others and tensors[name] is state[old]
    }
    used = {name for names in origins.values() for name in names}
    unexpected = tuple(name for name in state if name not in used and name not in ignored)
    for name in unexpected:
        if name in tensors:
            raise DamagedCheckpoint(
                f"the state holds it a second time as {' and '.join(origins[name])}", tensor=name
            )
    tensors.update((name, state[name]) for name in unexpected)
    ties = _ties(catalogue, origins, unexpected, model)
    return HubLayout(
        catalogue=Catalogue({n: t for n, t in tensors.items() if n not in ties}, ties),
        renamed=renamed,
        converted={
            name: old
            for name, old in origins.items()
            if all(tensors[name] is not state[source] for source in old)
        },
        unexpected=unexpected,
        ignored=ignored,
    )


def layout_of(state: Mapping[str, Tensor], model: ReferenceModel) -> Layout:
    """The layout of the state, from the names and shapes that only one layout has."""
    hub = {**model.saved, **model.tied}
    if all(tensor.recipe == Live(name) for name, tensor in hub.items()):
        return "same"
    signs = 0
    for name, tensor in state.items():
        if name not in hub or name not in model.live:
            signs += (name in model.live) - (name in hub)
        elif hub[name].shape != model.live[name].shape:
            signs += (tensor.shape == model.live[name].shape) - (tensor.shape == hub[name].shape)
    return "hub" if signs < 0 else "live"


def _names_in_layout(
    state: Mapping[str, Tensor], found: Layout, model: ReferenceModel
) -> dict[str, str]:
    """For each name of the layout, the name of its tensor in the state."""
    in_state = {name: name for name in state}
    hub_names = model.hub_names
    known = model.saved if found == "hub" else model.live
    for alias, live in model.aliases.items():
        name = hub_names.get(live, live) if found == "hub" else live
        if alias in state and alias not in known and name not in state:
            in_state[name] = in_state.pop(alias)
    if found == "hub":
        # Names that the hub's directories took over from the live model, before transformers renamed them.
        for live, name in hub_names.items():
            if live in state and live not in known and name not in state and live in in_state:
                in_state[name] = in_state.pop(live)
    for alias, kept in (model.hub_ties if found == "hub" else model.ties).items():
        if kept not in in_state and alias in in_state:
            in_state[kept] = in_state[alias]
    return in_state


def _cut_anew(
    state: Mapping[str, Tensor], in_state: Mapping[str, str], model: ReferenceModel
) -> dict[str, Tensor]:
    """The parts of joined tensors, cut as ``save_pretrained`` cuts them.

    Loading joins the parts of a tensor along the first axis, whatever their sizes. Saving cuts it into parts
    of one size: the convolutions of queries, keys and values of OlmoHybrid, of which the last is wider.
    """
    parts: dict[str, list[tuple[int, str, Strided]]] = {}
    for name, saved in model.saved.items():
        recipe = saved.recipe
        if isinstance(recipe, Strided) and isinstance(recipe.of, Live) and name in in_state:
            parts.setdefault(recipe.of.name, []).append((recipe.offset, name, recipe))
    cut: dict[str, Tensor] = {}
    for live, found in parts.items():
        ordered = [
            (name, recipe, state[in_state[name]]) for _, name, recipe in sorted(found, key=_first)
        ]
        shapes = [tensor.shape for _, _, tensor in ordered]
        if shapes == [recipe.sizes for _, recipe, _ in ordered]:
            continue
        whole = model.live[live].shape
        rows, rest = sum(shape[0] for shape in shapes if shape), {shape[1:] for shape in shapes}
        if (
            not whole
            or (rows, rest) != (whole[0], {whole[1:]})
            or not all(recipe.strides == row_major_strides(whole) for _, recipe, _ in ordered)
        ):
            continue
        joined = Concat(tuple(tensor for _, _, tensor in ordered), 0)
        for name, recipe, _ in ordered:
            cut[in_state[name]] = view(joined, recipe.offset, recipe.sizes, recipe.strides)
    return cut


def _first(part: tuple[int, str, Strided]) -> int:
    return part[0]


def _recipe(
    name: str, saved: SavedTensor, found: Layout, in_state: Mapping[str, str]
) -> Recipe | None:
    """The recipe of a tensor from those of the state; None if a tensor is missing."""
    if found == "hub":
        return Live(name) if name in in_state else None
    for leaf in leaves(saved.recipe):
        if isinstance(leaf, NewValues):
            raise UnsupportedLayout(
                f"save_pretrained computes it ({leaf.by}); ckpt-tools only moves data",
                tensor=name,
                hint="Save the model with save_pretrained of the installed transformers instead.",
            )
    if all(leaf.name in in_state for leaf in _names(saved.recipe)):
        return saved.recipe
    return None


def _names(recipe: Recipe) -> Iterable[Live]:
    return (leaf for leaf in leaves(recipe) if isinstance(leaf, Live))


def _prove_shapes(
    needed: Mapping[str, str], state: Mapping[str, Tensor], model: ReferenceModel
) -> None:
    for live, old in needed.items():
        if state[old].shape != model.live[live].shape:
            raise UsageError(
                f"its shape is {state[old].shape}; the config gives {model.live[live].shape}",
                tensor=old,
                hint="Pass the config of the training run with --config FILE.",
            )


def _built(recipe: Recipe, tensors: Mapping[str, Tensor]) -> Tensor:
    if isinstance(recipe, Live):
        return tensors[recipe.name]
    if isinstance(recipe, Strided):
        return view(_built(recipe.of, tensors), recipe.offset, recipe.sizes, recipe.strides)
    assert isinstance(recipe, Joined)
    return Concat(tuple(_built(part, tensors) for part in recipe.parts), recipe.axis)


def _ties(
    catalogue: Catalogue,
    origins: Mapping[str, tuple[str, ...]],
    unexpected: Iterable[str],
    model: ReferenceModel,
) -> dict[str, str]:
    """Tied names that share one tensor in the state, each with the name that the model keeps."""
    ties = {}
    for alias, kept in model.hub_ties.items():
        owners = [
            [catalogue.ties.get(old, old) for old in origins.get(name, ())]
            for name in (alias, kept)
        ]
        if owners[0] and owners[0] == owners[1]:
            ties[alias] = kept
    for name in unexpected:
        owner = catalogue.ties.get(name, name)
        if owner != name and owner in unexpected:
            ties[name] = owner
    return ties
