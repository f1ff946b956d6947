"""The recipes of a manifest make the same bits again, of the same sources or of others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ckpt_tools import merge_lora, open_checkpoint
from ckpt_tools.hub import AssetOptions, find_config, reference
from ckpt_tools.hub.reference import child
from ckpt_tools.model.fit import fit_to_model
from ckpt_tools.model.merging import merged_state
from ckpt_tools.model.state import cast_state, model_state
from ckpt_tools.tensors.catalogue import Tensor
from ckpt_tools.tensors.dtypes import BFLOAT16
from ckpt_tools.transforms.recipe import Json, Leaf, described, leaf_recipes, leaves_of
from tests.conftest import FIXTURES
from tests.support.adapted import base_directory, facts
from tests.support.verification.beside import (
    DORA,
    EXPERTS,
    MANIFEST,
    PEFT,
    PLAIN,
    SAVES,
    SINGLE,
    TIED,
    UP,
    against,
    casts,
    good,
    mean_of_two,
    record,
    told,
    written,
)

TIED_EMBEDDING = PEFT / "zero2-qwen3-tied-embedding"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """What the live engine held in bf16, as a directory."""
    return written(tmp_path / "model", load_file(PLAIN / "truth" / SINGLE))


@pytest.fixture
def _asked_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers is asked in this process, where others loaded it."""
    monkeypatch.setattr(reference, "ask", lambda _, question: child._answer(json.loads(question)))


def recipes_of(tensors: Mapping[str, Tensor], *sources: Any) -> dict[str, Json]:
    leaves: dict[Leaf, Tensor] = {}
    for index, source in enumerate(sources):
        leaves |= leaves_of(index, source, "master")
    names = leaf_recipes(leaves)
    return {name: described(tensor, names) for name, tensor in tensors.items()}


def merged_by_peft(source: Path, directory: Path, *bases: Path) -> tuple[Path, dict[str, Json]]:
    """What PEFT's merge wrote, and the recipes of the same merge."""
    sources = [open_checkpoint(path) for path in (source / "checkpoint", *bases)]
    state = merged_state(
        [model_state(each, "master") for each in sources],
        model_ties={},
        adapter_state=None,
        adapter=None,
        configure=lambda adapter: adapter.configured(source / "truth/adapter", (), None, None),
        dtype="auto",
    )
    catalogue = cast_state(state, "auto")
    config = find_config(AssetOptions(config=source / "hf"))
    catalogue = fit_to_model(catalogue, config, None, BFLOAT16).catalogue
    (merged,) = facts(source.name)["merged"].values()
    shutil.copytree(source / "truth" / merged["directory"], directory)
    recipes = recipes_of(catalogue, *sources)
    record(directory, recipes, source / "checkpoint", *bases)
    return directory, recipes


@pytest.mark.usefixtures("_asked_here")
@pytest.mark.parametrize("case", [DORA, EXPERTS], ids=lambda case: case.name)
def test_a_merge_is_made_again(case: Path, tmp_path: Path) -> None:
    """No tensor that was merged has a counterpart in the checkpoint; the experts have other shapes, too."""
    directory, recipes = merged_by_peft(case, tmp_path / "merged")
    assert any("merge" in json.dumps(recipe) for recipe in recipes.values())

    assert good(against(directory, case / "checkpoint"), len(recipes))
    # Without the manifest nobody could tell.
    (directory / MANIFEST).unlink()
    assert against(directory, case / "checkpoint").problems


@pytest.mark.usefixtures("_asked_here")
def test_a_base_of_its_own_is_read_where_it_lay(tmp_path: Path) -> None:
    source = PEFT / "zero3-olmo2-lora-frozen-excluded"
    base = base_directory(source.name, tmp_path / "base")
    directory, recipes = merged_by_peft(source, tmp_path / "merged", base)

    assert good(against(directory, source / "checkpoint"), len(recipes))

    base.rename(tmp_path / "moved")
    found = against(directory, source / "checkpoint")
    (problem,) = found.problems
    assert (problem.kind, problem.severity, problem.file) == (
        "against-unchecked",
        "warning",
        MANIFEST,
    )
    assert f"{len(recipes)} tensors could not be compared" in problem.detail
    assert f"({base}: it no longer exists)" in problem.detail
    assert found.checked == []
    # The base alone is one of the sources: it stands for itself.
    (tmp_path / "moved").rename(base)
    assert good(against(directory, base), len(recipes))


@pytest.mark.parametrize("tag", ["global_step2", "global_step4"])
def test_a_mean_is_made_again_whichever_of_its_sources_is_named(tag: str, tmp_path: Path) -> None:
    directory = mean_of_two(tmp_path / "mean")

    assert good(against(directory, SAVES / "checkpoint" / tag), 21)


def test_a_copy_stands_for_the_first_source(tmp_path: Path) -> None:
    directory = mean_of_two(tmp_path / "mean")
    shutil.copytree(SAVES / "checkpoint" / "global_step2", tmp_path / "copy" / "global_step2")
    shutil.copytree(SAVES / "checkpoint" / "global_step4", tmp_path / "other" / "global_step4")

    assert good(against(directory, tmp_path / "copy"), 21)
    found = against(directory, tmp_path / "other")
    assert {problem.kind for problem in found.problems} == {"tensor-differs"}
    assert {problem.hint for problem in found.problems} == {
        "The directory was made from step 2; the checkpoint is step 4."
    }


def test_the_models_of_one_directory_are_told_apart(tmp_path: Path) -> None:
    """Accelerate keeps several models in a directory, under names that they share."""
    case = FIXTURES / "accelerate" / "plain-two-models"
    name = "lm_head.weight"
    truths = [load_file(case / truth / SINGLE) for truth in ("truth", "truth-model_1")]
    recipes: dict[str, Json] = {
        "first": name,
        "second": {"op": "stored", "source": 1, "name": name},
    }
    state = {"first": truths[0][name], "second": truths[1][name].clone()}
    directory = record(written(tmp_path / "x", state), recipes, PLAIN / "checkpoint")
    manifest = json.loads((directory / MANIFEST).read_text())
    source = {"path": str(case / "checkpoint"), "format": "accelerate"}
    parts = [source | {"part": part, "name": part} for part in ("model", "model_1")]
    (directory / MANIFEST).write_text(json.dumps(manifest | {"sources": parts}))

    for tag in ("model", "model_1"):
        assert good(against(directory, open_checkpoint(case / "checkpoint", tag=tag)), 2)


def test_recipes_rename_cut_and_join(tmp_path: Path) -> None:
    masters = load_file(PLAIN / "truth" / "masters.safetensors")
    up, gate = masters[UP], masters[UP.replace("up_proj", "gate_proj")]
    state = {
        "turned": up.T.contiguous(),
        "joined": torch.cat([gate, up]),
        "part": up[3:5].clone(),
        "renamed": up.clone(),
    }
    rows, columns = up.shape
    recipes: dict[str, Json] = {
        "turned": {
            "op": "view",
            "of": UP,
            "offset": 0,
            "shape": [columns, rows],
            "strides": [1, columns],
        },
        "joined": {"op": "concat", "of": [UP.replace("up_proj", "gate_proj"), UP], "axis": 0},
        "part": {
            "op": "view",
            "of": UP,
            "offset": 3 * columns,
            "shape": [2, columns],
            "strides": [columns, 1],
        },
        "renamed": UP,
    }
    directory = record(written(tmp_path / "x", state), recipes, PLAIN / "checkpoint")

    assert good(against(directory, PLAIN / "checkpoint"), 4)
    state["part"][1, 0] += 1
    written(directory, state)
    assert told(against(directory, PLAIN / "checkpoint")) == {("tensor-differs", "part")}


def test_the_recorded_copy_is_compared(tmp_path: Path) -> None:
    """fp32 of the 16-bit weights is not fp32 of the masters."""
    state = {n: t.float() for n, t in load_file(PLAIN / "truth" / SINGLE).items()}
    recipes: dict[str, Json] = {
        name: {"op": "cast", "of": name, "dtype": "float32"} for name in state
    }
    directory = written(tmp_path / "x", state)

    record(directory, recipes, PLAIN / "checkpoint", weights="model")
    assert good(against(directory, PLAIN / "checkpoint"), len(state))
    record(directory, recipes, PLAIN / "checkpoint", weights="master")
    assert {p.kind for p in against(directory, PLAIN / "checkpoint").problems} == {"tensor-differs"}
    for name in state:
        leaf: Json = {"op": "stored", "source": 0, "name": name, "copy": "model"}
        recipes[name] = {"op": "cast", "of": leaf, "dtype": "float32"}
    record(directory, recipes, PLAIN / "checkpoint", weights="master")
    assert good(against(directory, PLAIN / "checkpoint"), len(state))


def test_16_bit_weights_that_a_format_does_not_keep_are_its_masters_rounded(tmp_path: Path) -> None:
    """Recorded of a ZeRO-2 run, asked of a ZeRO-3 one: here, of the masters of the same model."""
    state = {n: t.float() for n, t in load_file(TIED / "truth" / SINGLE).items()}
    recipes: dict[str, Json] = {
        name: {"op": "cast", "of": name, "dtype": "float32"} for name in state
    }
    directory = record(
        written(tmp_path / "x", state), recipes, TIED / "checkpoint", weights="model"
    )

    assert good(against(directory, TIED / "checkpoint"), len(state))


def test_names_that_were_recorded_with_wrappers_are_found_without_and_the_reverse(
    tmp_path: Path, model: Path
) -> None:
    names = [*load_file(model / SINGLE)]
    wrapped = {name: f"module._orig_mod.{name}" for name in names}
    recipes: dict[str, Json] = {
        name: {"op": "cast", "of": wrapped[name], "dtype": "bfloat16"} for name in names
    }
    record(model, recipes, PLAIN / "checkpoint")
    assert good(against(model, PLAIN / "checkpoint"), len(names))

    masters = load_file(PLAIN / "truth" / "masters.safetensors")
    run = written(tmp_path / "run", {f"module.{name}": masters[name] for name in names})
    record(model, casts(names), PLAIN / "checkpoint")
    assert good(against(model, run), len(names))
    # Under another name in the directory only the recipe leads there.
    renamed = written(tmp_path / "renamed", {"renamed": masters[UP]})
    for recorded in (UP, f"module.{UP}"):
        record(renamed, {"renamed": recorded}, PLAIN / "checkpoint")
        for checkpoint in (PLAIN / "checkpoint", run):
            assert good(against(renamed, checkpoint), 1)
    # A child that is called like a wrapper is none, though the recipes name nothing beside it.
    real = written(
        tmp_path / "real", {"_orig_mod.module.a": masters[UP], "_orig_mod.b": masters[UP] + 1}
    )
    record(renamed, {"renamed": "module.a"}, PLAIN / "checkpoint")
    assert good(against(renamed, real), 1)


def test_a_recipe_that_another_checkpoint_cannot_begin_gives_way_to_the_name(
    tmp_path: Path,
) -> None:
    """A merge of a LoRA run, against a directory that somebody else merged."""
    state = load_file(DORA / "truth" / "merged" / SINGLE)
    recipes: dict[str, Json] = {
        name: {"op": "cast", "of": f"base_model.model.{name}.base_layer", "dtype": "bfloat16"}
        for name in state
    }
    directory = record(written(tmp_path / "x", state), recipes, DORA / "checkpoint")

    assert good(against(directory, DORA / "truth" / "merged"), len(state))


def test_tensors_of_an_adapters_directory_were_recorded_with_its_name(tmp_path: Path) -> None:
    """merge-lora --adapter-dir takes them from PEFT's files, where the adapter has no name."""
    adapter = DORA / "truth" / "adapter"
    held = load_file(adapter / "adapter_model.safetensors")
    saved = next(name for name in held if ".lora_A." in name)
    vector = next(name for name in held if name.endswith("lora_magnitude_vector"))
    state = {"a": held[saved].float(), "m": held[vector].clone()}
    recorded = {
        "a": saved.replace(".lora_A.", ".lora_A.default."),
        "m": f"{vector}.default.weight",
    }
    leaf = {n: {"op": "stored", "source": 1, "name": recorded[n]} for n in recorded}
    recipes: dict[str, Any] = {
        "a": {"op": "cast", "of": leaf["a"], "dtype": "float32"},
        "m": leaf["m"],
    }
    directory = record(written(tmp_path / "x", state), recipes, DORA / "checkpoint")
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest["sources"].append({"path": str(adapter), "name": "adapter"})
    (directory / MANIFEST).write_text(json.dumps(manifest))

    assert good(against(directory, DORA / "checkpoint"), 2)


def test_recipes_that_cannot_be_followed(model: Path) -> None:
    names = [*load_file(model / SINGLE)]
    recipes = casts(names)
    recipes["model.norm.weight"] = {"op": "rotate", "of": "model.norm.weight"}
    recipes[UP] = {"op": "cast", "of": "model.gone", "dtype": "bfloat16"}
    recipes["lm_head.weight"] = {"op": "stored", "source": 4, "name": "lm_head.weight"}
    record(model, recipes, PLAIN / "checkpoint")

    found = against(model, PLAIN / "checkpoint")

    # A name that the checkpoint has is compared, whatever its recipe began with.
    assert told(found) == {
        ("cannot-replay", "model.norm.weight"),
        ("cannot-replay", "lm_head.weight"),
    }
    details = {problem.tensor: problem.detail for problem in found.problems}
    assert "'rotate' is not an operation" in details["model.norm.weight"]
    assert "it names a source that is not listed" in details["lm_head.weight"]
    written(model, load_file(model / SINGLE) | {"new": torch.zeros(1)})
    record(model, recipes | {"new": "model.gone"}, PLAIN / "checkpoint")
    details = {p.tensor: p.detail for p in against(model, PLAIN / "checkpoint").problems}
    assert details["new"] == "it was made from model.gone, which the checkpoint does not have"


def test_sums_are_the_same_with_any_torch(tmp_path: Path) -> None:
    directory = mean_of_two(tmp_path / "mean")
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest["versions"]["torch"] = "2.4.0"
    (directory / MANIFEST).write_text(json.dumps(manifest))
    checkpoint = SAVES / "checkpoint" / "global_step2"
    assert good(against(directory, checkpoint), 21)
    state = load_file(directory / SINGLE)
    state[UP].view(torch.int16)[0, 0] ^= 1
    written(directory, state)

    (problem,) = against(directory, checkpoint).problems

    assert (problem.kind, problem.tensor) == ("tensor-differs", UP)
    assert problem.hint is not None
    assert problem.hint.startswith("Write the directory again from this checkpoint")


@pytest.mark.parametrize(
    "case",
    [DORA, EXPERTS, pytest.param(TIED_EMBEDDING, marks=pytest.mark.slow)],
    ids=lambda case: case.name,
)
def test_what_merge_lora_writes_is_made_again(case: Path, tmp_path: Path) -> None:
    """And an element that is one step beside it is told."""
    out = tmp_path / "out"
    merge_lora(
        case / "checkpoint", out, adapter_config=case / "truth" / "adapter", config=case / "hf"
    )
    assert "merge" in (out / MANIFEST).read_text()
    state = load_file(out / SINGLE)
    assert good(against(out, case / "checkpoint"), len(state))

    name = next(name for name in state if name.endswith("q_proj.weight"))
    state[name].view(torch.int16)[3, 1] ^= 1
    written(out, state)
    assert told(against(out, case / "checkpoint")) == {("tensor-differs", name)}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"tensors": {}}',
        '{"sources": [], "options": {}, "tensors": {}, "versions": {}}',
    ],
)
def test_a_manifest_that_says_nothing_is_none(content: str, model: Path) -> None:
    (model / MANIFEST).write_text(content)

    assert good(against(model, PLAIN / "checkpoint"), 21)
