"""Owns the step from the hub layout back to the live one: names and shapes of the model in memory.

It is the reverse of :mod:`ckpt_tools.transforms.hub_layout`. Adapters are trained on the model in memory, so
their targets have its names, and its shapes where experts are fused. Only cuts and joins along axes are
undone; a recipe with another view is not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import prod

from ckpt_tools.hub.reference import ReferenceModel
from ckpt_tools.hub.reference.recipes import Joined, Live, Recipe, Shape, Strided
from ckpt_tools.tensors.catalogue import Catalogue, Tensor
from ckpt_tools.tensors.derived import Concat, strided, view


@dataclass(frozen=True)
class _Box:
    """A tensor that fills a box of a live tensor, in the live order of axes."""

    start: Shape
    tensor: Tensor

    def stop(self, axis: int) -> int:
        return self.start[axis] + self.tensor.shape[axis]


def live_layout(hub: Catalogue, model: ReferenceModel) -> tuple[Catalogue, dict[str, str]]:
    """The tensors of a hub directory as the model in memory has them.

    Args:
        hub: the tensors, under hub names.
        model: the model of the directory.

    Returns:
        The tensors, and for each live name the hub name of one tensor that it is made of. Tensors that
        cannot be made, or that the model does not know, keep their hub names.
    """
    boxes: dict[str, list[tuple[str, _Box]]] = {}
    for name, saved in {**model.saved, **model.tied}.items():
        if name in hub and hub[name].shape == saved.shape:
            for live, box in _boxes(saved.recipe, hub[name], model):
                boxes.setdefault(live, []).append((name, box))
    made: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    used: set[str] = set()
    for live, found in boxes.items():
        whole = _assembled(model.live[live].shape, [box for _, box in found])
        if whole is not None:
            made[live], origin[live] = whole, found[0][0]
            used.update(name for name, _ in found)
    rest = {name: tensor for name, tensor in hub.items() if name not in used and name not in made}
    tensors = {**made, **rest}
    names = {hub_name: live for live, hub_name in origin.items()}
    held = {names.get(alias, alias): names.get(kept, kept) for alias, kept in hub.ties.items()}
    # A directory lacks the second name of a tied tensor, and an adapter may have it.
    ties = {a: k for a, k in {**model.ties, **held}.items() if a not in tensors and k in tensors}
    return Catalogue(tensors, ties), origin


def live_modules(model: ReferenceModel) -> dict[str, str]:
    """For each module whose tensors have another name on the hub, its name in memory."""
    pairs = [(hub, live) for live, hub in model.hub_names.items()]
    found = {
        _module(hub): _module(live)
        for hub, live in (*pairs, *model.aliases.items())
        if _last(hub) == _last(live)
    }
    in_memory = {_module(live) for live in model.live}
    return {hub: live for hub, live in found.items() if hub != live and hub not in in_memory}


def lacking_modules(modules: Collection[str], names: Collection[str]) -> list[str]:
    """The modules without a tensor of their own among the names."""
    held = {_module(name) for name in names}
    return [module for module in modules if module not in held]


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _boxes(recipe: Recipe, tensor: Tensor, model: ReferenceModel) -> Iterator[tuple[str, _Box]]:
    """Which boxes of live tensors a hub tensor holds; none if the recipe cannot be undone."""
    if isinstance(recipe, Live):
        if recipe.name in model.live and model.live[recipe.name].shape == tensor.shape:
            yield recipe.name, _Box((0,) * len(tensor.shape), tensor)
    elif isinstance(recipe, Strided):
        seen = _flat(recipe)
        shape = None if seen is None else _shape(seen.of, model)
        box = None if seen is None or shape is None else _box(seen, tensor, shape)
        if seen is None or box is None:
            return
        if isinstance(seen.of, Live):
            yield seen.of.name, box
        elif box.tensor.shape == shape:
            yield from _boxes(seen.of, box.tensor, model)
    elif isinstance(recipe, Joined):
        at = 0
        for part in recipe.parts:
            shape = _shape(part, model)
            if shape is None:
                return
            start = [0] * len(shape)
            start[recipe.axis] = at
            yield from _boxes(part, _cut(tensor, tuple(start), shape), model)
            at += shape[recipe.axis]


def _flat(recipe: Strided) -> Strided | None:
    """A view of views as one view of what they show."""
    while isinstance(recipe.of, Strided):
        inner = recipe.of
        axes = tuple(zip(recipe.sizes, recipe.strides, strict=True))
        seen = strided(recipe.offset, axes, inner.sizes, inner.strides)
        if seen is None:
            return None
        recipe = Strided(inner.of, inner.offset + seen[0], recipe.sizes, seen[1])
    return recipe


def _shape(recipe: Recipe, model: ReferenceModel) -> Shape | None:
    if isinstance(recipe, Joined):
        shapes = [_shape(part, model) for part in recipe.parts]
        known = [shape for shape in shapes if shape is not None]
        if len(known) < len(shapes):
            return None
        joined = list(known[0])
        joined[recipe.axis] = sum(shape[recipe.axis] for shape in known)
        return tuple(joined)
    if isinstance(recipe, Strided):
        return recipe.sizes
    if isinstance(recipe, Live) and recipe.name in model.live:
        return model.live[recipe.name].shape
    return None


def _box(recipe: Strided, tensor: Tensor, live: Shape) -> _Box | None:
    """The box of a live tensor that a view of it shows, with the axes in the live order."""
    steps = _row_major(live)
    axis_of = {step: axis for axis, step in reversed(list(enumerate(steps))) if live[axis] > 1}
    order: dict[int, int] = {}
    for axis, (size, stride) in enumerate(zip(recipe.sizes, recipe.strides, strict=True)):
        if size > 1:
            if axis_of.get(stride) is None or axis_of[stride] in order:
                return None
            order[axis_of[stride]] = axis
    start, rest = [], recipe.offset
    for step in steps:
        start.append(rest // step)
        rest %= step
    sizes = [recipe.sizes[order[axis]] if axis in order else 1 for axis in range(len(live))]
    if any(s + n > total for s, n, total in zip(start, sizes, live, strict=True)):
        return None
    strides = _row_major(recipe.sizes)
    moved = tuple(strides[order[axis]] if axis in order else 0 for axis in range(len(live)))
    # An axis of one element may have any stride; that of a row-major tensor keeps it one run.
    moved = tuple(
        prod(sizes[axis + 1 :]) if size == 1 else stride
        for axis, (size, stride) in enumerate(zip(sizes, moved, strict=True))
    )
    return _Box(tuple(start), view(tensor, 0, tuple(sizes), moved))


def _assembled(shape: Shape, boxes: list[_Box]) -> Tensor | None:
    """The live tensor that the boxes fill; None if they do not fill it once."""
    if sum(prod(box.tensor.shape) for box in boxes) != prod(shape):
        return None
    return _filled((0,) * len(shape), shape, boxes)


def _filled(start: Shape, stop: Shape, boxes: list[_Box]) -> Tensor | None:
    """The tensor of a region, cut along one axis after the other."""
    if len(boxes) == 1:
        (box,) = boxes
        fits = box.start == start and all(box.stop(a) == end for a, end in enumerate(stop))
        return box.tensor if fits else None
    for axis in range(len(start)):
        runs = _runs(boxes, axis)
        if len(runs) == 1:
            continue
        parts: list[Tensor] = []
        at = start[axis]
        for run in runs:
            end = max(box.stop(axis) for box in run)
            low = (*start[:axis], at, *start[axis + 1 :])
            part = _filled(low, (*stop[:axis], end, *stop[axis + 1 :]), run)
            if part is None:
                return None
            parts.append(part)
            at = end
        return Concat(tuple(parts), axis) if at == stop[axis] else None
    return None


def _runs(boxes: list[_Box], axis: int) -> list[list[_Box]]:
    """The boxes in groups that do not overlap along an axis, in order."""
    runs: list[list[_Box]] = []
    end = -1
    for box in sorted(boxes, key=lambda box: box.start[axis]):
        if runs and box.start[axis] < end:
            runs[-1].append(box)
        else:
            runs.append([box])
        end = max(end, box.stop(axis))
    return runs


def _cut(tensor: Tensor, start: Shape, sizes: Shape) -> Tensor:
    steps = _row_major(tensor.shape)
    offset = sum(at * step for at, step in zip(start, steps, strict=True))
    return view(tensor, offset, sizes, steps)


def _row_major(shape: Shape) -> Shape:
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
