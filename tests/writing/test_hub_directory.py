"""A sharded state of a live model becomes, file for file, the directory that save_pretrained writes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dist_checkpoint
from safetensors.torch import load_file

from ckpt_tools import consolidate
from tests.transforms.test_hub_layout import ARCHITECTURES, Case

QUICK = ("MixtralForCausalLM", "Qwen3ForCausalLM tied")
REST = (
    *("LlamaForCausalLM", "LlamaForSequenceClassification", "MistralForCausalLM"),
    *("Gemma2ForCausalLM", "Gemma3ForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM"),
    *("Phi3ForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "BertForMaskedLM"),
    *("OlmoeForCausalLM", "FlexOlmoForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"),
    *("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM"),
    *(
        "T5ForConditionalGeneration",
        "BartForConditionalGeneration",
        "WhisperForConditionalGeneration",
    ),
    *("LlavaForConditionalGeneration", "Gemma3ForConditionalGeneration"),
    *("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
    *("Qwen3VLForConditionalGeneration", "PaliGemmaForConditionalGeneration"),
)


def save_state(model: Any, directory: Path) -> None:
    """The state as a training loop saves it: torch DCP, names and shapes of the model in memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist_checkpoint.save({"model": model.state_dict()}, checkpoint_id=directory, no_dist=True)


@pytest.mark.parametrize(
    "title", [*QUICK, *(pytest.param(title, marks=pytest.mark.slow) for title in REST)]
)
def test_the_directory_is_what_save_pretrained_writes(title: str, tmp_path: Path) -> None:
    case = Case(title, tmp_path)
    truth, out = tmp_path / "truth", tmp_path / "out"
    save_state(case.model, tmp_path / "state")

    consolidate(tmp_path / "state", out, config=truth, generation_config="none")

    written, wanted = out / "model.safetensors", truth / "model.safetensors"
    assert written.read_bytes() == wanted.read_bytes()
    ours, theirs = (json.loads((d / "config.json").read_text()) for d in (out, truth))
    assert ours == theirs


def test_the_live_layout_is_another_one() -> None:
    """Or the tests above would prove nothing of the mixture of experts."""
    assert set(QUICK) | set(REST) <= ARCHITECTURES.keys()
    assert len(QUICK) + len(REST) >= 25


def test_a_mixture_of_experts_is_cast_and_sharded_in_the_hub_layout(tmp_path: Path) -> None:
    case = Case("MixtralForCausalLM", tmp_path)
    save_state(case.model, tmp_path / "state")
    case.model.to(torch.bfloat16).save_pretrained(tmp_path / "bf16", max_shard_size=20_000)

    consolidate(
        tmp_path / "state",
        tmp_path / "out",
        config=tmp_path / "truth",
        dtype="bf16",
        max_shard_size=20_000,
    )

    found, wanted = _state(tmp_path / "out"), _state(tmp_path / "bf16")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def _state(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}
