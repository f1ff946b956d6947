"""How a tensor was derived, as plain JSON, and back: what the manifest records of each output tensor.

Owns the grammar. A recipe is a string, which is the name of a tensor of the first source, or an object
whose ``op`` says what is done:

    "model.norm.weight"
    {"op": "stored", "source": 1, "name": "model.norm.weight", "copy": "model"}
    {"op": "cast", "of": R, "dtype": "bfloat16"}
    {"op": "view", "of": R, "offset": 0, "shape": [4, 6], "strides": [6, 1]}
    {"op": "concat", "of": [R, ...], "axis": 0}
    {"op": "mean", "of": [R, ...], "weights": [0.5, 0.5]}
    {"op": "merge", "base": R, "a": R, "b": R, "scale": 2.0, "transposed": false,
     "magnitude": R or null, "expert": 0, "experts": 1}
    {"op": "column_norms", "of": R}
    {"op": "merged_bias", "base": R, "update": R, "scale": 2.0}

``copy`` stands only where it is not the copy that ``Checkpoint.catalogue`` gives.
The keys of each op are the fields of the class of the same sense in :mod:`ckpt_tools.tensors.derived`,
:mod:`ckpt_tools.transforms.average` and :mod:`ckpt_tools.transforms.merge`. It must not know outputs, files
or who keeps the recipes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from ckpt_tools.errors import DamagedCheckpoint, UsageError
from ckpt_tools.tensors.catalogue import Tensor
from ckpt_tools.tensors.checkpoint import Checkpoint, Copy
from ckpt_tools.tensors.derived import Cast, Concat, View
from ckpt_tools.tensors.dtypes import BY_NAME
from ckpt_tools.transforms.average import Mean
from ckpt_tools.transforms.merge import ColumnNorms, Merged, MergedBias

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None


class Leaf(NamedTuple):
    """A tensor that lies in a source.

    Attributes:
        source: which source, counted from 0.
        name: its name in the :class:`~ckpt_tools.tensors.checkpoint.Checkpoint`.
        copy: which copy of it, where it is not the one that the catalogue of the source gives.
    """

    source: int
    name: str
    copy: Copy | None = None


def leaves_of(source: int, checkpoint: Checkpoint, weights: Copy) -> dict[Leaf, Tensor]:
    """Every tensor that a recipe can begin with, second names of tied tensors included.

    Args:
        source: the number of the source.
        checkpoint: the source.
        weights: the copy that was chosen (``--weights``).
    """
    found: dict[Leaf, Tensor] = {}
    for name, weight in checkpoint.weights.items():
        copies: list[Copy] = ["model", "master"] if weights == "model" else ["master", "model"]
        held = {copy: tensor for copy in copies if (tensor := getattr(weight, copy)) is not None}
        first, *others = held
        found[Leaf(source, name)] = held[first]
        found |= {Leaf(source, name, copy): held[copy] for copy in others}
    for alias, kept in checkpoint.ties.items():
        found |= {
            Leaf(source, alias, copy): tensor
            for copy in (None, "master", "model")
            if (tensor := found.get(Leaf(source, kept, copy))) is not None
        }
    return found


def leaf_names(leaves: Mapping[Leaf, Tensor]) -> dict[int, Leaf]:
    """For the ``id`` of each tensor the leaf that it is: what :func:`described` asks for.

    The tensors must stay alive for as long as the answer is used.
    """
    found: dict[int, Leaf] = {}
    for leaf, tensor in leaves.items():
        found.setdefault(id(tensor), leaf)
    return found


def described(tensor: Tensor, names: Mapping[int, Leaf]) -> Json:
    """The recipe of a tensor.

    Args:
        tensor: what was written.
        names: for the ``id`` of each tensor of a source, the leaf that it is.

    Raises:
        UsageError: it is made of a tensor of no source, or in a way that the grammar has no word for.
    """
    leaf = names.get(id(tensor))
    if leaf is not None:
        return _of_leaf(leaf)
    op = next((op for op, form in _FORMS.items() if type(tensor) is form.kind), None)
    if op is None:
        raise UsageError(f"nothing is known of where a {type(tensor).__name__} came from")
    recipe: dict[str, Json] = {"op": op}
    for key, field in _FORMS[op].fields.items():
        recipe[key] = field.to_json(getattr(tensor, field.name or key), names)
    return recipe


def rebuilt(recipe: Json, leaves: Mapping[Leaf, Tensor]) -> Tensor:
    """The tensor that a recipe makes: the inverse of :func:`described`.

    Args:
        recipe: what was recorded.
        leaves: the tensors of all sources.

    Raises:
        DamagedCheckpoint: it is no recipe, or a tensor that it names is in no source.
    """
    if _is_leaf(recipe):
        leaf = _leaf(recipe)
        if leaf not in leaves:
            copy = f" ({leaf.copy} copy)" if leaf.copy else ""
            raise DamagedCheckpoint(
                f"source {leaf.source} has no such tensor{copy}", tensor=leaf.name
            )
        return leaves[leaf]
    op, form = _form(recipe)
    assert isinstance(recipe, dict)
    try:
        given = {
            field.name or key: field.from_json(recipe[key], leaves)
            for key, field in form.fields.items()
        }
        return _fitting(form.kind(**given))
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(f"its recipe cannot be followed: {op}: {error}") from error


def recipe_leaves(recipe: Json) -> Iterator[Leaf]:
    """The tensors of sources that a recipe names, as often as it names them.

    Raises:
        DamagedCheckpoint: it is no recipe.
    """
    if _is_leaf(recipe):
        yield _leaf(recipe)
        return
    _, form = _form(recipe)
    assert isinstance(recipe, dict)
    for key, field in form.fields.items():
        if field.holds_recipes and recipe.get(key) is not None:
            value = recipe[key]
            for part in value if isinstance(value, list) else [value]:
                yield from recipe_leaves(part)


def is_computed(recipe: Json) -> bool:
    """Whether numbers are added or multiplied on the way, not only moved and rounded.

    Raises:
        DamagedCheckpoint: it is no recipe.
    """
    if _is_leaf(recipe):
        return False
    op, form = _form(recipe)
    assert isinstance(recipe, dict)
    parts = [recipe.get(key) for key, field in form.fields.items() if field.holds_recipes]
    inner = [p for part in parts for p in (part if isinstance(part, list) else [part])]
    return op not in _MOVES or any(is_computed(part) for part in inner)


def _fitting(tensor: Tensor) -> Tensor:
    """The tensor, whose parts have shapes that can be computed with; the other classes see to that.

    Raises:
        ValueError: they have not.
    """
    match tensor:
        case Mean(tensors, weights):
            fits = len(tensors) == len(weights) and len({part.shape for part in tensors}) == 1
        case MergedBias(base, update):
            fits = base.shape == update.shape
        case Merged(base, a, b) if len(base.shape) == 2 and a.shape and tensor.experts > 0:
            rows, columns = base.shape[::-1] if tensor.transposed else base.shape
            rank, rest = divmod(a.shape[0], tensor.experts)
            fits = not rest and rank > 0 and 0 <= tensor.expert < tensor.experts
            fits = fits and a.numel == a.shape[0] * columns and b.numel == a.shape[0] * rows
            fits = fits and (tensor.magnitude is None or tensor.magnitude.numel == rows)
        case ColumnNorms(merged):
            fits = isinstance(merged, Merged)
        case Merged():
            fits = False
        case _:
            fits = True
    if not fits:
        raise ValueError("the shapes of its parts do not fit each other")
    return tensor


# -- the grammar -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Field:
    """How one field of a derived tensor is written.

    Attributes:
        to_json: the field as JSON, given the names of leaves.
        from_json: the field again, given the leaves.
        name: the field in the class, where it is not the key in the recipe.
        holds_recipes: whether its JSON is a recipe, a list of them, or null.
    """

    to_json: Callable[[Any, Mapping[int, Leaf]], Json]
    from_json: Callable[[Any, Mapping[Leaf, Tensor]], Any]
    name: str | None = None
    holds_recipes: bool = False


@dataclass(frozen=True)
class _Form:
    """A class of derived tensors and its fields by their keys in a recipe."""

    kind: Callable[..., Tensor]
    fields: Mapping[str, _Field]


def _one(name: str | None = None) -> _Field:
    return _Field(described, rebuilt, name, holds_recipes=True)


def _many(name: str) -> _Field:
    return _Field(
        lambda tensors, names: [described(tensor, names) for tensor in tensors],
        lambda recipes, leaves: tuple(rebuilt(recipe, leaves) for recipe in _listed(recipes)),
        name,
        holds_recipes=True,
    )


def _plain(kind: type) -> _Field:
    return _Field(lambda value, _: value, lambda value, _: _checked(value, kind))


def _several(kind: type) -> _Field:
    return _Field(
        lambda values, _: list(values),
        lambda values, _: tuple(_checked(value, kind) for value in _listed(values)),
    )


def _checked(value: Any, kind: type) -> Any:
    """A number as the kind of number that it was; JSON has one kind, and ``true`` is none."""
    if isinstance(value, bool) is not (kind is bool) or not isinstance(value, (kind, int)):
        raise TypeError(f"{value!r}, which is no {kind.__name__}")
    return kind(value)


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r}, which is no list")
    return value


_DTYPE = _Field(lambda dtype, _: str(dtype), lambda name, _: BY_NAME[name])
_OPTIONAL = _Field(
    lambda tensor, names: None if tensor is None else described(tensor, names),
    lambda recipe, leaves: None if recipe is None else rebuilt(recipe, leaves),
    holds_recipes=True,
)
_MOVES = {"cast", "view", "concat"}
_FORMS = {
    "cast": _Form(Cast, {"of": _one("tensor"), "dtype": _DTYPE}),
    "view": _Form(
        View,
        {
            "of": _one("tensor"),
            "offset": _plain(int),
            "shape": _several(int),
            "strides": _several(int),
        },
    ),
    "concat": _Form(Concat, {"of": _many("parts"), "axis": _plain(int)}),
    "mean": _Form(Mean, {"of": _many("tensors"), "weights": _several(float)}),
    "merge": _Form(
        Merged,
        {
            "base": _one(),
            "a": _one(),
            "b": _one(),
            "scale": _plain(float),
            "transposed": _plain(bool),
            "magnitude": _OPTIONAL,
            "expert": _plain(int),
            "experts": _plain(int),
        },
    ),
    "column_norms": _Form(ColumnNorms, {"of": _one("merged")}),
    "merged_bias": _Form(MergedBias, {"base": _one(), "update": _one(), "scale": _plain(float)}),
}


def _of_leaf(leaf: Leaf) -> Json:
    if leaf.source == 0 and leaf.copy is None:
        return leaf.name
    stored: dict[str, Json] = {"op": "stored", "source": leaf.source, "name": leaf.name}
    return stored if leaf.copy is None else {**stored, "copy": leaf.copy}


def _is_leaf(recipe: Json) -> bool:
    return isinstance(recipe, str) or (isinstance(recipe, dict) and recipe.get("op") == "stored")


def _leaf(recipe: Json) -> Leaf:
    if isinstance(recipe, str):
        return Leaf(0, recipe)
    assert isinstance(recipe, dict)
    match recipe:
        case {"source": bool()}:
            pass
        case {"source": int(source), "name": str(name), "copy": "master" | "model" as copy}:
            return Leaf(source, name, copy)
        case {"source": int(source), "name": str(name)} if "copy" not in recipe:
            return Leaf(source, name)
    raise DamagedCheckpoint(f"not a recipe: {recipe}")


def _form(recipe: Json) -> tuple[str, _Form]:
    op = recipe.get("op") if isinstance(recipe, dict) else None
    if not isinstance(op, str) or op not in _FORMS:
        raise DamagedCheckpoint(
            f"not a recipe: {op!r} is no operation"
            if isinstance(recipe, dict)
            else f"not a recipe: {recipe!r}",
            hint="The manifest was written by a newer ckpt-tools, or was changed.",
        )
    return op, _FORMS[op]
