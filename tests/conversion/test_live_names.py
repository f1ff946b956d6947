"""An adapter of the model in memory on a base with hub names: what PEFT makes of the two directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tools import merge_lora
from ckpt_tools.errors import UsageError
from tests.transforms.test_hub_layout import ARCHITECTURES

pytestmark = pytest.mark.slow

# Fused experts, and names of the hub that differ from those in memory.
CASES: dict[str, dict[str, Any]] = {
    "Qwen3MoeForCausalLM": {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "MixtralForCausalLM": {
        "target_modules": ["v_proj"],
        "target_parameters": ["experts.down_proj"],
    },
    "Qwen2_5_VLForConditionalGeneration": {"target_modules": ["q_proj", "qkv"]},
    "LlavaForConditionalGeneration": {"target_modules": ["q_proj", "down_proj"]},
}


def _trained(title: str, tmp_path: Path) -> Any:
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model_class = getattr(transformers, title)
    model = model_class(model_class.config_class(**ARCHITECTURES[title]))
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, **CASES[title]))
    for name, value in adapted.named_parameters():
        if "lora_" in name:
            value.data = torch.rand_like(value)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(str(tmp_path / "adapter"))
    return adapted


@pytest.mark.parametrize("title", CASES)
def test_the_layout_is_undone_before_targets_are_looked_for(title: str, tmp_path: Path) -> None:
    adapted = _trained(title, tmp_path)
    adapted.merge_and_unload().save_pretrained(tmp_path / "theirs")

    merge_lora(tmp_path / "base", tmp_path / "out", adapter_dir=tmp_path / "adapter")

    theirs = load_file(tmp_path / "theirs/model.safetensors")
    ours = load_file(tmp_path / "out/model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5)
    before = load_file(tmp_path / "base/model.safetensors")
    assert not all(torch.equal(before[name], value) for name, value in ours.items())


def test_a_base_that_a_whole_checkpoint_does_not_need_is_no_second_copy(tmp_path: Path) -> None:
    """The run names its tensors as the model in memory does, the base as the hub does."""
    adapted = _trained("Qwen2_5_VLForConditionalGeneration", tmp_path)
    (tmp_path / "run").mkdir()
    torch.save(adapted.state_dict(), tmp_path / "run/pytorch_model.bin")
    given: Any = {"adapter_config": tmp_path / "adapter", "config": tmp_path / "base"}
    merge_lora(tmp_path / "run", tmp_path / "whole", **given)
    merge_lora(tmp_path / "run", tmp_path / "out", base=tmp_path / "base", **given)
    whole, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert ours.keys() == whole.keys() == load_file(tmp_path / "base/model.safetensors").keys()
    assert all(torch.equal(ours[name], value) for name, value in whole.items())


@pytest.mark.parametrize("loaded", ["LlamaModel", "LlamaForCausalLM"])
def test_an_adapter_of_a_model_without_head_fits_one_with_it(loaded: str, tmp_path: Path) -> None:
    import transformers
    from peft import LoraConfig, get_peft_model

    config = transformers.LlamaConfig(**ARCHITECTURES["LlamaForCausalLM"])
    whole = transformers.LlamaForCausalLM(config)
    (whole if loaded == "LlamaModel" else whole.model).save_pretrained(tmp_path / "base")
    model = getattr(transformers, loaded).from_pretrained(tmp_path / "base")
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    for name, value in adapted.named_parameters():
        if "lora_" in name:
            value.data = torch.rand_like(value)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    theirs = adapted.merge_and_unload().state_dict()

    report = merge_lora(tmp_path / "base", tmp_path / "out", adapter_dir=tmp_path / "adapter")

    ours = load_file(tmp_path / "out/model.safetensors")
    assert any("got the names of the base" in note for note in report.notes)
    for name, value in ours.items():
        other = name.removeprefix("model.") if loaded == "LlamaModel" else f"model.{name}"
        if other in theirs:
            torch.testing.assert_close(value, theirs[other], rtol=1e-6, atol=1e-6)
    assert ours.keys() == load_file(tmp_path / "base/model.safetensors").keys()


def test_without_the_model_the_hint_names_the_parts(tmp_path: Path) -> None:
    _trained("Qwen3MoeForCausalLM", tmp_path)
    config = json.loads((tmp_path / "base/config.json").read_bytes())
    (tmp_path / "base/config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    with pytest.raises(UsageError, match="the base has parts of it") as raised:
        merge_lora(tmp_path / "base", tmp_path / "out", adapter_dir=tmp_path / "adapter")
    assert "--base" not in str(raised.value.hint)


def test_another_base_is_named(tmp_path: Path) -> None:
    _trained("LlavaForConditionalGeneration", tmp_path)
    save_file({"other.weight": torch.ones(2, 2)}, tmp_path / "base/model.safetensors")
    with pytest.raises(UsageError, match=r"its weights are called other\.weight"):
        merge_lora(tmp_path / "base", tmp_path / "out", adapter_dir=tmp_path / "adapter")
