"""Owns recipes: how a saved tensor is made of live tensors, by names, strided views and joins.

With recipes the child process tells the parent what ``save_pretrained`` does with the data of a model.
Every conversion of transformers only moves elements, so a name, a strided view and a concatenation are
enough. Recipes are plain values with a JSON form.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Live:
    """The whole tensor that the model in memory has under ``name``."""

    name: str


@dataclass(frozen=True, slots=True)
class Strided:
    """A view of the row-major elements of another tensor, as ``torch.as_strided`` defines it.

    Attributes:
        of: the other tensor.
        offset: flat index of the first element.
        sizes: shape of the view.
        strides: distance between neighbours along each axis, in elements of ``of``.
    """

    of: Recipe
    offset: int
    sizes: Shape
    strides: Shape


@dataclass(frozen=True, slots=True)
class Joined:
    """Tensors of one rank joined along an axis, as ``torch.cat`` does."""

    parts: tuple[Recipe, ...]
    axis: int


@dataclass(frozen=True, slots=True)
class NewValues:
    """A tensor with computed values: it cannot be made by moving the data of live tensors.

    Attributes:
        by: the operation that computed the values.
    """

    by: str


Recipe: TypeAlias = Live | Strided | Joined | NewValues


def leaves(recipe: Recipe) -> Iterator[Live | NewValues]:
    """The live tensors and new values that a recipe is made of."""
    if isinstance(recipe, Strided):
        yield from leaves(recipe.of)
    elif isinstance(recipe, Joined):
        for part in recipe.parts:
            yield from leaves(part)
    else:
        yield recipe


def to_json(recipe: Recipe) -> Any:
    """The recipe as a value of plain lists, strings and numbers."""
    if isinstance(recipe, Live):
        return recipe.name
    if isinstance(recipe, Strided):
        return ["view", to_json(recipe.of), recipe.offset, recipe.sizes, recipe.strides]
    if isinstance(recipe, Joined):
        return ["join", [to_json(part) for part in recipe.parts], recipe.axis]
    return ["computed", recipe.by]


def from_json(value: Any) -> Recipe:
    """The reverse of :func:`to_json`."""
    if isinstance(value, str):
        return Live(value)
    if value[0] == "view":
        _, of, offset, sizes, strides = value
        return Strided(from_json(of), offset, tuple(sizes), tuple(strides))
    if value[0] == "join":
        return Joined(tuple(from_json(part) for part in value[1]), value[2])
    return NewValues(value[1])
