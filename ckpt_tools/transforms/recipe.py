"""Owns the grammar of recipes: how an output tensor was derived, as JSON, and back.

The manifest records one recipe for each output tensor. A recipe is a string, the name of a tensor of the
first source, or an object whose ``op`` names an operation:

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
    {"op": "dequantise", "scheme": "mxfp4", "of": [R, R], "roles": ["blocks", "scales"], "settings": {},
     "shape": [2, 4, 32], "dtype": "bfloat16"}
    {"op": "prompt", "of": [R, ...], "names": ["prompt_encoder.default.embedding.weight", ...],
     "dtype": "float32", "shape": [8, 64], "saved": "prompt_embeddings", "question": {...}}

``copy`` is present only if it differs from the copy that ``Checkpoint.catalogue`` gives. The operations are
the classes of :mod:`ckpt_tools.tensors.derived`, :mod:`ckpt_tools.transforms.average`,
:mod:`ckpt_tools.transforms.merge` and :mod:`ckpt_tools.hub.reference.adapters`, and the keys are their
fields.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

from ckpt_tools.errors import DamagedCheckpoint, UsageError
from ckpt_tools.hub.reference.adapters import MadeByPeft
from ckpt_tools.tensors.catalogue import Tensor
from ckpt_tools.tensors.checkpoint import Checkpoint, Copy
from ckpt_tools.tensors.dequantise import SCHEMES, Dequantised, fits
from ckpt_tools.tensors.derived import Cast, Concat, View
from ckpt_tools.tensors.dtypes import BY_NAME
from ckpt_tools.transforms.average import Mean
from ckpt_tools.transforms.merge import ColumnNorms, Merged, MergedBias

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None


class Leaf(NamedTuple):
    """A tensor of a source.

    Attributes:
        source: the number of the source, from 0.
        name: its name in the :class:`~ckpt_tools.tensors.checkpoint.Checkpoint`.
        copy: the copy, if it is not the one that the catalogue of the source gives.
    """

    source: int
    name: str
    copy: Copy | None = None


def leaves_of(source: int, checkpoint: Checkpoint, weights: Copy) -> dict[Leaf, Tensor]:
    """Every source tensor that a recipe can use, second names of tied tensors included.

    Args:
        source: the number of the source.
        checkpoint: the source.
        weights: the chosen copy (``--weights``).
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


def leaf_recipes(leaves: Mapping[Leaf, Tensor]) -> dict[int, Json]:
    """The recipe of each source tensor, by the ``id`` of the tensor; :func:`described` takes this.

    The tensors must stay alive as long as the result is used.
    """
    found: dict[int, Json] = {}
    for leaf, tensor in leaves.items():
        found.setdefault(id(tensor), _of_leaf(leaf))
    return found


def described(tensor: Tensor, recipes: Mapping[int, Json]) -> Json:
    """The recipe of a tensor.

    Args:
        tensor: the written tensor.
        recipes: the recipe of each source tensor, by the ``id`` of the tensor.

    Raises:
        UsageError: the tensor uses a tensor of no source, or a class that the grammar does not cover.
    """
    leaf = recipes.get(id(tensor))
    if leaf is not None:
        return leaf

    def of(part: Tensor) -> Json:
        return described(part, recipes)

    match tensor:
        case Cast():
            return {"op": "cast", "of": of(tensor.tensor), "dtype": str(tensor.dtype)}
        case View():
            return {
                "op": "view",
                "of": of(tensor.tensor),
                "offset": tensor.offset,
                "shape": list(tensor.shape),
                "strides": list(tensor.strides),
            }
        case Concat():
            return {"op": "concat", "of": [of(p) for p in tensor.parts], "axis": tensor.axis}
        case Mean():
            terms = [of(term) for term in tensor.tensors]
            return {"op": "mean", "of": terms, "weights": list(tensor.weights)}
        case Merged():
            return {
                "op": "merge",
                "base": of(tensor.base),
                "a": of(tensor.a),
                "b": of(tensor.b),
                "scale": tensor.scale,
                "transposed": tensor.transposed,
                "magnitude": None if tensor.magnitude is None else of(tensor.magnitude),
                "expert": tensor.expert,
                "experts": tensor.experts,
            }
        case ColumnNorms():
            return {"op": "column_norms", "of": of(tensor.merged)}
        case MergedBias():
            base, update = of(tensor.base), of(tensor.update)
            return {"op": "merged_bias", "base": base, "update": update, "scale": tensor.scale}
        case Dequantised():
            return {
                "op": "dequantise",
                "scheme": tensor.scheme,
                "of": [of(part) for part in tensor.parts.values()],
                "roles": list(tensor.parts),
                "settings": dict(tensor.settings),
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype),
            }
        case MadeByPeft():
            return {
                "op": "prompt",
                "of": [of(part) for _, part in tensor.inputs],
                "names": [name for name, _ in tensor.inputs],
                "dtype": str(tensor.dtype),
                "shape": list(tensor.shape),
                "saved": tensor.saved,
                "question": json.loads(tensor.question),
            }
    raise UsageError(f"the origin of a {type(tensor).__name__} is not known")


def rebuilt(recipe: Json, leaves: Mapping[Leaf, Tensor]) -> Tensor:
    """The tensor that a recipe makes: the inverse of :func:`described`.

    Args:
        recipe: the recorded recipe.
        leaves: the tensors of all sources.

    Raises:
        DamagedCheckpoint: it is not a recipe, or it names a tensor that no source has.
    """
    if _is_leaf(recipe):
        leaf = _leaf(recipe)
        if leaf not in leaves:
            copy = f" ({leaf.copy} copy)" if leaf.copy else ""
            raise DamagedCheckpoint(
                f"source {leaf.source} has no such tensor{copy}", tensor=leaf.name
            )
        return leaves[leaf]
    op, fields = _operation(recipe)
    try:
        return _fitting(_made(op, fields, leaves))
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(f"its recipe cannot be followed: {op}: {error}") from error


def recipe_leaves(recipe: Json) -> Iterator[Leaf]:
    """The source tensors that a recipe names, once for each use.

    Raises:
        DamagedCheckpoint: it is not a recipe.
    """
    if _is_leaf(recipe):
        yield _leaf(recipe)
    else:
        for part in _parts(recipe):
            yield from recipe_leaves(part)


def _made(op: str, fields: Mapping[str, Any], leaves: Mapping[Leaf, Tensor]) -> Tensor:
    """The tensor that an operation makes of its fields."""

    def of(key: str = "of") -> Tensor:
        return rebuilt(fields[key], leaves)

    def each() -> tuple[Tensor, ...]:
        return tuple(rebuilt(part, leaves) for part in _listed(fields["of"]))

    def number(key: str, kind: type) -> Any:
        return _checked(fields[key], kind)

    def numbers(key: str, kind: type) -> tuple[Any, ...]:
        return tuple(_checked(value, kind) for value in _listed(fields[key]))

    match op:
        case "cast":
            return Cast(of(), BY_NAME[fields["dtype"]])
        case "view":
            return View(of(), number("offset", int), numbers("shape", int), numbers("strides", int))
        case "concat":
            return Concat(each(), number("axis", int))
        case "mean":
            return Mean(each(), numbers("weights", float))
        case "merge":
            return Merged(
                of("base"),
                of("a"),
                of("b"),
                number("scale", float),
                number("transposed", bool),
                None if fields["magnitude"] is None else of("magnitude"),
                number("expert", int),
                number("experts", int),
            )
        case "column_norms":
            merged = of()
            if not isinstance(merged, Merged):
                raise TypeError("of is not a merge")
            return ColumnNorms(merged)
        case "dequantise":
            if fields["scheme"] not in SCHEMES:
                raise ValueError("its scheme is not known")
            return Dequantised(
                fields["scheme"],
                dict(zip(_listed(fields["roles"]), each(), strict=True)),
                dict(fields["settings"]),
                numbers("shape", int),
                BY_NAME[fields["dtype"]],
            )
        case "prompt":
            names = [str(name) for name in _listed(fields["names"])]
            return MadeByPeft(
                BY_NAME[fields["dtype"]],
                numbers("shape", int),
                str(fields["saved"]),
                json.dumps(fields["question"]),
                tuple(zip(names, each(), strict=True)),
            )
        case _:
            return MergedBias(of("base"), of("update"), number("scale", float))


def _fitting(tensor: Tensor) -> Tensor:
    """The tensor, if the shapes of its parts allow the computation. Other classes check themselves.

    Raises:
        ValueError: the shapes do not fit.
    """
    match tensor:
        case Mean(tensors, weights):
            fitting = len(tensors) == len(weights) and len({part.shape for part in tensors}) == 1
        case MergedBias(base, update):
            fitting = base.shape == update.shape
        case Merged(base, a, b) if len(base.shape) == 2 and a.shape and tensor.experts > 0:
            rows, columns = base.shape[::-1] if tensor.transposed else base.shape
            rank, rest = divmod(a.shape[0], tensor.experts)
            fitting = not rest and rank > 0 and 0 <= tensor.expert < tensor.experts
            fitting = fitting and a.numel == a.shape[0] * columns and b.numel == a.shape[0] * rows
            fitting = fitting and (tensor.magnitude is None or tensor.magnitude.numel == rows)
        case Merged():
            fitting = False
        case Dequantised():
            fitting = fits(tensor)
        case _:
            fitting = True
    if not fitting:
        raise ValueError("the shapes of its parts do not fit each other")
    return tensor


def _checked(value: Any, kind: type) -> Any:
    """A number of this kind. JSON has one kind of number, and ``true`` is not one."""
    if isinstance(value, bool) is not (kind is bool) or not isinstance(value, (kind, int)):
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return kind(value)


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is not a list")
    return value


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


# The fields of each operation that hold a recipe, a list of recipes, or null.
_PARTS = {
    "cast": ("of",),
    "view": ("of",),
    "concat": ("of",),
    "mean": ("of",),
    "merge": ("base", "a", "b", "magnitude"),
    "column_norms": ("of",),
    "merged_bias": ("base", "update"),
    "dequantise": ("of",),
    "prompt": ("of",),
}


def _parts(recipe: Json) -> list[Json]:
    """The recipes that an operation uses."""
    op, fields = _operation(recipe)
    held = [fields.get(key) for key in _PARTS[op]]
    return [
        part
        for value in held
        if value is not None
        for part in (value if isinstance(value, list) else [value])
    ]


def _operation(recipe: Json) -> tuple[str, dict[str, Json]]:
    """The name of an operation, and its fields."""
    op = recipe.get("op") if isinstance(recipe, dict) else None
    if not isinstance(recipe, dict) or not isinstance(op, str) or op not in _PARTS:
        raise DamagedCheckpoint(
            f"not a recipe: {op!r} is not an operation"
            if isinstance(recipe, dict)
            else f"not a recipe: {recipe!r}",
            hint="A newer ckpt-tools wrote the manifest, or the manifest was changed.",
        )
    return op, recipe
