"""Recipes: what a tensor was made of survives JSON, and makes the same bits again from the same sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ckpt_tools import open_checkpoint
from ckpt_tools.errors import DamagedCheckpoint, UsageError
from ckpt_tools.hub import AssetOptions, find_config
from ckpt_tools.model.fit import fit_to_model
from ckpt_tools.model.merging import merged_state
from ckpt_tools.model.state import cast_state, mean_state, model_state
from ckpt_tools.tensors.catalogue import Catalogue, Tensor
from ckpt_tools.tensors.checkpoint import Checkpoint, Copy
from ckpt_tools.tensors.derived import Concat, cast, view
from ckpt_tools.tensors.dtypes import BFLOAT16, FLOAT32
from ckpt_tools.transforms.average import Mean
from ckpt_tools.transforms.merge import ColumnNorms, Merged, MergedBias, merged_experts, with_rows
from ckpt_tools.transforms.recipe import (
    Json,
    Leaf,
    described,
    leaf_recipes,
    leaves_of,
    rebuilt,
    recipe_leaves,
)
from tests.conftest import FIXTURES
from tests.support.adapted import base_directory, facts
from tests.tensors.test_derived import derived, same_bits

ZERO = FIXTURES / "zero"
TWO_COPIES = ZERO / "zero2-bf16-llama-3ranks" / "checkpoint"
TIED = ZERO / "zero3-bf16-qwen3-tied-2ranks" / "checkpoint"


def through_json(recipe: Json) -> Json:
    read: Json = json.loads(json.dumps(recipe))
    return read


@pytest.fixture
def values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    return {
        "w": random(12, 8),
        "a": random(3, 8),
        "b": random(12, 3),
        "m": random(12),
        "columns": random(8),
        "bias": random(12),
        "update": random(12),
        "rows": random(2, 8),
        "experts": random(2, 12, 8),
        "ea": random(6, 8),
        "eb": random(12, 6),
    }


@pytest.fixture
def stored(values: dict[str, torch.Tensor], tmp_path: Path) -> dict[str, Tensor]:
    save_file(values, tmp_path / "model.safetensors")
    return {name: open_checkpoint(tmp_path)[name] for name in values}


def of_one_source(stored: dict[str, Tensor]) -> dict[Leaf, Tensor]:
    return {Leaf(0, name): tensor for name, tensor in stored.items()}


def merged(v: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
    return v["w"].float() + (v["b"].float() @ v["a"].float()) * scale


def test_the_grammar_is_this(stored: dict[str, Tensor]) -> None:
    """What the manifest of a release holds can be read by the next."""
    s = stored
    dora = Merged(s["w"], s["a"], s["b"], 0.1, magnitude=s["m"])
    table: dict[str, tuple[Tensor, Json]] = {
        "a leaf": (s["w"], "w"),
        "cast": (cast(s["w"], FLOAT32), {"op": "cast", "of": "w", "dtype": "float32"}),
        "view": (
            view(s["w"], 8, (8, 2), (1, 8)),
            {"op": "view", "of": "w", "offset": 8, "shape": [8, 2], "strides": [1, 8]},
        ),
        "concat": (
            Concat((s["w"], s["rows"]), 0),
            {"op": "concat", "of": ["w", "rows"], "axis": 0},
        ),
        "mean": (
            Mean((s["m"], s["bias"]), (1 / 3, 2 / 3)),
            {"op": "mean", "of": ["m", "bias"], "weights": [1 / 3, 2 / 3]},
        ),
        "merge": (
            dora,
            {
                "op": "merge",
                "base": "w",
                "a": "a",
                "b": "b",
                "scale": 0.1,
                "transposed": False,
                "magnitude": "m",
                "expert": 0,
                "experts": 1,
            },
        ),
        "column norms": (
            ColumnNorms(Merged(s["w"], s["a"], s["b"], 0.1)),
            {
                "op": "column_norms",
                "of": {
                    "op": "merge",
                    "base": "w",
                    "a": "a",
                    "b": "b",
                    "scale": 0.1,
                    "transposed": False,
                    "magnitude": None,
                    "expert": 0,
                    "experts": 1,
                },
            },
        ),
        "merged bias": (
            MergedBias(s["bias"], s["update"], 0.7),
            {"op": "merged_bias", "base": "bias", "update": "update", "scale": 0.7},
        ),
    }
    leaves = of_one_source(stored)
    for name, (tensor, recipe) in table.items():
        assert described(tensor, leaf_recipes(leaves)) == recipe, name
        again = rebuilt(through_json(recipe), leaves)
        assert described(again, leaf_recipes(leaves)) == recipe, name


def test_what_is_rebuilt_computes_what_torch_computes(
    values: dict[str, torch.Tensor], stored: dict[str, Tensor]
) -> None:
    v, s = values, stored
    third = 0.1 + 0.2  # not 0.3, and JSON may not make it so
    dora = merged(v, third)
    experts = torch.stack(
        [
            v["experts"][e].float()
            + (v["eb"].float()[:, e::2] @ v["ea"].float()[3 * e : 3 * e + 3])
            for e in range(2)
        ]
    )
    replaced = v["w"].clone()
    replaced[[5, 2]] = v["rows"]
    cases: list[tuple[Tensor, torch.Tensor]] = [
        (cast(cast(s["w"], FLOAT32), BFLOAT16), v["w"]),
        (cast(Merged(s["w"], s["a"], s["b"], third), BFLOAT16), dora.bfloat16()),
        (
            Merged(s["w"], s["a"], s["b"], third, magnitude=s["m"]),
            (v["m"].float() / torch.linalg.norm(dora, dim=1)).view(-1, 1) * dora,
        ),
        (
            Merged(view(s["w"], 0, (8, 12), (1, 8)), s["a"], s["b"], third, transposed=True),
            v["w"].float().T + (v["b"].float() @ v["a"].float()).T * third,
        ),
        (merged_experts(s["experts"], s["ea"], s["eb"], 1.0, transposed=False), experts),
        (with_rows(s["w"], s["rows"], [5, 2]), replaced),
        (
            Mean((s["m"], s["bias"]), (third, 0.7)),
            (v["m"].float() * third).add(v["bias"].float(), alpha=0.7),
        ),
        (
            MergedBias(s["bias"], s["update"], third),
            v["bias"].float() + v["update"].float() * third,
        ),
    ]
    leaves = of_one_source(stored)
    names = leaf_recipes(leaves)
    for tensor, truth in cases:
        recipe = through_json(described(tensor, names))
        again = rebuilt(recipe, leaves)
        assert again is not tensor
        assert same_bits(again.load(), tensor.load()), recipe
        torch.testing.assert_close(again.load(), truth, rtol=1e-6, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_views_joins_and_casts_of_each_other(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    pair = data.draw(derived(tmp_path_factory.mktemp("recipe") / "data.bin"))
    leaves = {Leaf(0, str(i)): tensor for i, tensor in enumerate(_stored_in(pair.lazy))}

    recipe = through_json(described(pair.lazy, leaf_recipes(leaves)))

    assert same_bits(rebuilt(recipe, leaves).load(), pair.truth)
    assert set(recipe_leaves(recipe)) == set(leaves)


def _stored_in(tensor: Tensor) -> list[Tensor]:
    inner = [getattr(tensor, "tensor", None), *getattr(tensor, "parts", ())]
    parts = [part for part in inner if part is not None]
    return [leaf for part in parts for leaf in _stored_in(part)] if parts else [tensor]


# -- real checkpoints ------------------------------------------------------------------------------


def remade(catalogue: Catalogue, sources: list[Checkpoint], again: list[Checkpoint]) -> Any:
    """Each tensor described with one reading of the sources, and made again from another."""
    leaves = {k: v for i, c in enumerate(sources) for k, v in leaves_of(i, c, "master").items()}
    fresh = {k: v for i, c in enumerate(again) for k, v in leaves_of(i, c, "master").items()}
    names = leaf_recipes(leaves)
    recipes = {name: described(tensor, names) for name, tensor in catalogue.items()}
    recipes = json.loads(json.dumps(recipes))
    return {name: rebuilt(recipe, fresh).load() for name, recipe in recipes.items()}


@pytest.mark.parametrize("weights", ["master", "model"])
def test_a_leaf_is_the_copy_that_the_catalogue_gives(weights: Copy) -> None:
    checkpoint = open_checkpoint(TWO_COPIES)
    leaves = leaves_of(0, checkpoint, weights)
    names = leaf_recipes(leaves)

    for name, tensor in checkpoint.catalogue(weights).items():
        assert described(tensor, names) == name
        assert rebuilt(name, leaves) is tensor
    other: Copy = "model" if weights == "master" else "master"
    name, weight = next((n, w) for n, w in checkpoint.weights.items() if w.master is not None)
    tensor = getattr(weight, other)
    recipe = described(tensor, names)
    assert recipe == {"op": "stored", "source": 0, "name": name, "copy": other}
    assert rebuilt(recipe, leaves) is tensor


def test_a_second_name_is_a_leaf_too() -> None:
    checkpoint = open_checkpoint(TIED)
    leaves = leaves_of(0, checkpoint, "master")
    (alias, kept), *_ = checkpoint.ties.items()

    assert rebuilt(alias, leaves) is rebuilt(kept, leaves) is checkpoint[kept]
    assert described(checkpoint[alias], leaf_recipes(leaves)) == kept


def test_a_tensor_of_a_later_source_says_which(tmp_path: Path) -> None:
    first, second = open_checkpoint(TWO_COPIES), open_checkpoint(TIED)
    leaves = leaves_of(0, first, "master") | leaves_of(1, second, "master")
    name = next(iter(second.weights))

    recipe = described(cast(second[name], BFLOAT16), leaf_recipes(leaves))

    of = {"op": "stored", "source": 1, "name": name}
    assert recipe == {"op": "cast", "of": of, "dtype": "bfloat16"}
    assert list(recipe_leaves(recipe)) == [Leaf(1, name)]


@pytest.mark.parametrize(
    "case", ["zero2-olmo2-dora", "zero3-gpt2-fan-in-fan-out", "fsdp2-olmo2-modules-to-save"]
)
def test_a_merge_of_a_real_run_is_what_peft_makes(case: str) -> None:
    source = FIXTURES / "peft" / case
    checkpoint = open_checkpoint(source / "checkpoint")

    found = remade(_merged(source, [checkpoint]), [checkpoint], _opened(source / "checkpoint"))

    truth = _peft_truth(source)
    assert found.keys() >= truth.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in truth.items())


@pytest.mark.slow
def test_merged_experts_of_a_real_run_under_their_hub_names() -> None:
    """Casts of views of joins of merges of views: the deepest recipe that there is."""
    source = FIXTURES / "peft" / "zero2-qwen3-moe-experts"
    checkpoint = open_checkpoint(source / "checkpoint")
    catalogue = _merged(source, [checkpoint])
    config = find_config(AssetOptions(config=source / "hf"))
    fitted = fit_to_model(catalogue, config, None, BFLOAT16).catalogue

    found = remade(fitted, [checkpoint], _opened(source / "checkpoint"))

    truth = _peft_truth(source)
    assert found.keys() == truth.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in truth.items())


def test_a_base_of_its_own_and_a_mean_are_of_two_sources(tmp_path: Path) -> None:
    source = FIXTURES / "peft" / "zero3-olmo2-lora-frozen-excluded"
    base = base_directory(source.name, tmp_path / "base")
    opened = [open_checkpoint(source / "checkpoint"), open_checkpoint(base)]

    found = remade(_merged(source, opened), opened, _opened(source / "checkpoint", base))

    truth = _peft_truth(source)
    assert found.keys() >= truth.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in truth.items())

    saves = ZERO / "zero2-bf16-llama-two-saves-2ranks"
    paths = [saves / "checkpoint" / tag for tag in ("global_step2", "global_step4")]
    runs = _opened(*paths)
    mean = cast_state(mean_state([model_state(run, "master") for run in runs], [0.3, 0.7]), "auto")
    found = remade(mean, runs, _opened(*paths))
    masters = [
        load_file(saves / d / "masters.safetensors") for d in ("truth-global_step2", "truth")
    ]
    for name, tensor in found.items():
        total = masters[0][name].double() * 0.3 + masters[1][name].double() * 0.7
        assert same_bits(tensor, total.float().bfloat16())


def _opened(*paths: Path) -> list[Checkpoint]:
    return [open_checkpoint(path) for path in paths]


def _merged(source: Path, checkpoints: list[Checkpoint]) -> Catalogue:
    state = merged_state(
        [model_state(checkpoint, "master") for checkpoint in checkpoints],
        model_ties={},
        adapter_state=None,
        adapter=None,
        configure=lambda adapter: adapter.configured(source / "truth/adapter", (), None, None),
        dtype="auto",
    )
    return cast_state(state, "auto")


def _peft_truth(source: Path) -> dict[str, torch.Tensor]:
    (merged,) = facts(source.name)["merged"].values()
    return load_file(source / "truth" / merged["directory"] / "model.safetensors")


# -- what is no recipe -----------------------------------------------------------------------------


def test_a_tensor_of_no_source_has_no_recipe(stored: dict[str, Tensor]) -> None:
    with pytest.raises(UsageError, match="the origin of a Stored is not known"):
        described(cast(stored["w"], FLOAT32), {})


MERGE: dict[str, Json] = {
    "op": "merge",
    "base": "w",
    "a": "a",
    "b": "b",
    "scale": 1.0,
    "transposed": False,
    "magnitude": None,
    "expert": 0,
    "experts": 1,
}


@pytest.mark.parametrize(
    ("recipe", "fact"),
    [
        (None, "not a recipe"),
        (3, "not a recipe"),
        (["w"], "not a recipe"),
        ({}, "None is not an operation"),
        ({"op": "rotate", "of": "w"}, "'rotate' is not an operation"),
        ({"op": ["cast"], "of": "w"}, "is not an operation"),
        ("x", "source 0 has no such tensor"),
        ({"op": "stored", "source": 1, "name": "w"}, "source 1 has no such tensor"),
        ({"op": "stored", "source": 0, "name": "w", "copy": "model"}, r"\(model copy\)"),
        ({"op": "stored", "source": 0, "name": "w", "copy": "best"}, "not a recipe"),
        ({"op": "stored", "source": True, "name": "w"}, "not a recipe"),
        ({"op": "stored", "source": 0}, "not a recipe"),
        ({"op": "cast", "of": "w"}, "cast: 'dtype'"),
        ({"op": "cast", "of": "w", "dtype": "bfloat17"}, "cast: 'bfloat17'"),
        ({"op": "cast", "of": "x", "dtype": "float32"}, "no such tensor"),
        ({"op": "view", "of": "w", "offset": 1, "shape": [96], "strides": [1]}, "outside"),
        (
            {"op": "view", "of": "w", "offset": 0.5, "shape": [1], "strides": [1]},
            "0.5 is not of type int",
        ),
        ({"op": "view", "of": "w", "offset": 0, "shape": 1, "strides": [1]}, "is not a list"),
        ({"op": "view", "of": "w", "offset": 0, "shape": [2, 2], "strides": [1]}, "view: "),
        ({"op": "concat", "of": ["w", "a"], "axis": 1}, "cannot join"),
        ({"op": "concat", "of": [], "axis": 0}, "cannot join"),
        ({"op": "concat", "of": "w", "axis": 0}, "is not a list"),
        ({"op": "mean", "of": ["w", "a"], "weights": [0.5, 0.5]}, "do not fit"),
        ({"op": "mean", "of": ["w"], "weights": [0.5, 0.5]}, "do not fit"),
        ({"op": "mean", "of": ["w"], "weights": ["1"]}, "is not of type float"),
        (MERGE | {"scale": True}, "is not of type float"),
        (MERGE | {"transposed": 0}, "is not of type bool"),
        (MERGE | {"a": "b"}, "do not fit"),
        (MERGE | {"b": "a"}, "do not fit"),
        (MERGE | {"base": "m"}, "do not fit"),
        (MERGE | {"magnitude": "columns"}, "do not fit"),
        (MERGE | {"experts": 2}, "do not fit"),
        (MERGE | {"experts": 0}, "do not fit"),
        (MERGE | {"expert": 1}, "do not fit"),
        (MERGE | {"expert": -1}, "do not fit"),
        ({"op": "column_norms", "of": "w"}, "column_norms: of is not a merge"),
        ({"op": "merged_bias", "base": "m", "update": "columns", "scale": 1.0}, "do not fit"),
    ],
    ids=str,
)
def test_what_is_no_recipe_is_damage(recipe: Json, fact: str, stored: dict[str, Tensor]) -> None:
    with pytest.raises(DamagedCheckpoint, match=fact):
        rebuilt(recipe, of_one_source(stored))


def test_the_recipes_that_were_broken_above_are_whole(stored: dict[str, Tensor]) -> None:
    assert rebuilt(MERGE, of_one_source(stored)).shape == (12, 8)
    assert rebuilt(MERGE | {"magnitude": "m"}, of_one_source(stored)).shape == (12, 8)


def test_leaves_are_named_as_often_as_they_are_used() -> None:
    twice: Json = {"op": "mean", "of": ["w", {"op": "cast", "of": "w", "dtype": "float32"}]}

    assert list(recipe_leaves(twice)) == [Leaf(0, "w"), Leaf(0, "w")]
    assert [leaf.name for leaf in recipe_leaves(MERGE)] == ["w", "a", "b"]
    with pytest.raises(DamagedCheckpoint, match="'rotate' is not an operation"):
        list(recipe_leaves({"op": "cast", "of": {"op": "rotate"}}))
