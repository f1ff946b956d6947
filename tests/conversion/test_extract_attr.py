"""extract-attr: one attribute of a composite model is the model that the live engine held there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ckpt_tools import consolidate, open_checkpoint
from ckpt_tools.errors import AttributeNotFound, DamagedCheckpoint
from tests.conftest import FIXTURES
from tests.support.models import live_model, loaded, same_logits
from tests.support.sampled import sampled

COMPOSITE = FIXTURES / "composite"


def attributes(key: str) -> list[tuple[str, str]]:
    found = []
    for path in sorted(COMPOSITE.iterdir()):
        facts = json.loads((path / "facts.json").read_text())
        found += [(path.name, attribute) for attribute in facts[key]]
    return found


# Plain Accelerate drops the second names of shared tensors and keeps no record of them.
LOST = ("accelerate-shared-backbone", "value_model")
MODELS = [case for case in attributes("attributes") if case != LOST]


def assert_equal_to_truth(out: Path, truth: Path) -> None:
    found, live = load_file(out / "model.safetensors"), load_file(truth / "model.safetensors")
    assert found.keys() == live.keys()
    for name, tensor in live.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("name", "attribute"), sampled(MODELS))
def test_an_attribute_is_the_live_model_and_loads_as_one(
    name: str, attribute: str, tmp_path: Path
) -> None:
    case, out = COMPOSITE / name, tmp_path / "out"

    consolidate(case / "checkpoint", out, attribute=attribute, config=case / "hf" / attribute)

    assert_equal_to_truth(out, case / "truth" / attribute)
    live = load_file(case / "truth" / attribute / "model.safetensors")
    assert same_logits(loaded(out), live_model(case / "hf" / attribute, live))


@pytest.mark.parametrize(("name", "attribute"), attributes("attributes_without_config"))
def test_an_attribute_without_a_config_is_written_as_weights(
    name: str, attribute: str, tmp_path: Path
) -> None:
    case, out = COMPOSITE / name, tmp_path / "out"

    consolidate(case / "checkpoint", out, attribute=attribute, weights_only=True)

    assert_equal_to_truth(out, case / "truth" / attribute)
    assert {p.name for p in out.iterdir()} == {"ckpt_tools_manifest.json", "model.safetensors"}


def test_only_the_bytes_of_the_attribute_are_read(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(COMPOSITE / "zero3-policy-value" / "checkpoint")
    policy = sum(t.nbytes for name, t in checkpoint.items() if name.startswith("policy."))
    whole = sum(tensor.nbytes for tensor in checkpoint.values())

    report = consolidate(checkpoint, tmp_path / "out", attribute="policy", weights_only=True)

    assert policy <= report.bytes_read < 0.6 * whole


def test_a_wrong_name_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(AttributeNotFound) as caught:
        consolidate(
            COMPOSITE / "zero3-policy-value" / "checkpoint", tmp_path / "out", attribute="actor"
        )

    assert caught.value.choices.keys() == {"policy", "value_model"}
    assert "policy (14 tensors)" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_backbone_that_the_save_dropped_is_missed_by_name(tmp_path: Path) -> None:
    name, attribute = LOST
    case = COMPOSITE / name

    with pytest.raises(DamagedCheckpoint) as caught:
        consolidate(
            case / "checkpoint",
            tmp_path / "out",
            attribute=attribute,
            config=case / "hf" / attribute,
        )

    assert "model.embed_tokens.weight" in caught.value.missing
    assert not (tmp_path / "out").exists()


def test_the_config_of_a_part_is_taken_from_the_composite_one(tmp_path: Path) -> None:
    case = COMPOSITE / "zero2-policy-value"
    parts = {
        part: json.loads((case / "hf" / part / "config.json").read_text())
        for part in ("policy", "value_model")
    }
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "actor_critic", **parts}))

    consolidate(case / "checkpoint", tmp_path / "out", attribute="policy", config=config)

    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == parts["policy"]["architectures"]
    assert_equal_to_truth(tmp_path / "out", case / "truth" / "policy")
