"""What a user may choose beside the checkpoint: model, format, card, trust; and damage seen in time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tools import consolidate, inspect, open_checkpoint
from ckpt_tools.errors import AmbiguousCheckpoint, DamagedCheckpoint, UsageError

CUSTOM = """
from pathlib import Path
import torch
from transformers import PretrainedConfig, PreTrainedModel

Path("{canary}").touch()

class TinyConfig(PretrainedConfig):
    model_type = "tiny_custom"

class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    def __init__(self, config):
        super().__init__(config)
        self.a = torch.nn.Linear(4, 4)
        self.post_init()
"""


@pytest.mark.parametrize(
    ("name", "models"),
    [
        ("plain-two-models", ("model", "model_1")),
        ("deepspeed-two-models-2ranks", ("pytorch_model", "pytorch_model_1")),
    ],
)
def test_one_of_several_models_is_chosen_by_its_number(
    name: str, models: tuple[str, ...], fixtures: Path
) -> None:
    case = fixtures / "accelerate" / name
    with pytest.raises(AmbiguousCheckpoint) as caught:
        open_checkpoint(case / "checkpoint")
    assert set(models) <= set(caught.value.choices)

    truths = (case / "truth", case / f"truth-{models[1]}")
    for number, truth in enumerate(truths):
        live = load_file(truth / "model.safetensors")
        found = open_checkpoint(case / "checkpoint", model=number)
        assert found.location.name == models[number]
        assert {n: w.shape for n, w in found.weights.items()} == {
            n: tuple(live[n].shape) for n in found.weights
        }


def test_a_model_number_that_is_not_there_is_refused(fixtures: Path) -> None:
    with pytest.raises(UsageError, match="there is no model 2") as caught:
        inspect(fixtures / "accelerate" / "plain-two-models" / "checkpoint", model=2)
    assert "model_1" in str(caught.value)


def test_a_format_can_be_named_where_a_directory_fits_two(fixtures: Path, tmp_path: Path) -> None:
    case, both = fixtures / "zero" / "zero2-bf16-llama-3ranks", tmp_path / "both"
    shutil.copytree(case / "checkpoint", both)
    shutil.copy(case / "truth" / "model.safetensors", both)

    assert open_checkpoint(both).location.format == "deepspeed"
    assert open_checkpoint(both, source_format="deepspeed").location.format == "deepspeed"
    assert open_checkpoint(both, source_format="huggingface").location.format == "huggingface"


def test_a_format_that_nobody_reads_is_refused_with_those_that_are(fixtures: Path) -> None:
    with pytest.raises(UsageError, match="unknown format 'zip'") as caught:
        open_checkpoint(
            fixtures / "zero" / "zero2-bf16-llama-3ranks" / "checkpoint", source_format="zip"
        )
    assert "deepspeed" in str(caught.value)


def test_the_model_card_can_be_left_out(fixtures: Path, tmp_path: Path) -> None:
    case = fixtures / "zero" / "zero2-bf16-llama-3ranks"

    consolidate(case / "checkpoint", tmp_path / "with", config=case / "hf")
    consolidate(case / "checkpoint", tmp_path / "without", config=case / "hf", card=False)

    assert "| Training step | 2 |" in (tmp_path / "with" / "README.md").read_text()
    assert not (tmp_path / "without" / "README.md").exists()


@pytest.mark.parametrize("trust", [False, True])
def test_custom_code_runs_only_when_it_is_trusted(trust: bool, tmp_path: Path) -> None:
    code, state, canary = tmp_path / "code", tmp_path / "state", tmp_path / "canary"
    code.mkdir()
    state.mkdir()
    (code / "modeling_tiny.py").write_text(CUSTOM.format(canary=canary))
    auto_map = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyModel"}
    config = {"model_type": "tiny_custom", "architectures": ["TinyModel"], "auto_map": auto_map}
    (code / "config.json").write_text(json.dumps(config))
    weights = {"a.weight": torch.randn(4, 4), "a.bias": torch.randn(4)}
    save_file(weights, state / "model.safetensors", {"format": "pt"})

    report = consolidate(state, tmp_path / "out", config=code, trust_remote_code=trust)

    assert canary.exists() is trust
    assert any("no such model" in warning for warning in report.warnings) is not trust
    assert (tmp_path / "out" / "modeling_tiny.py").exists()


def test_damage_within_a_chunk_is_found_before_anything_is_written(
    fixtures: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "state"
    shutil.copytree(fixtures / "dcp" / "fsdp2-model-3ranks" / "checkpoint", copy)
    with (copy / "__1_0.distcp").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(bytes(size))

    with pytest.raises(DamagedCheckpoint):
        consolidate(copy, tmp_path / "out", weights_only=True, dry_run=True)
