"""Adapters on layers that are no matrices, and of resized models: what PEFT makes of its own directories."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ckpt_tools import extract_lora, merge_lora, verify
from ckpt_tools.errors import UnsupportedLayout, UsageError

State = dict[str, torch.Tensor]


class _Layers(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x)


def _adapted(layer: nn.Module, tmp_path: Path, **config: Any) -> Any:
    """A PEFT model with random factors; its base and its adapter are written to directories."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = _Layers(layer)
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    adapted = get_peft_model(
        model, LoraConfig(r=2, lora_alpha=3, target_modules=["layer"], **config)
    )
    for name, value in adapted.named_parameters():
        if "lora_" in name:
            value.data = torch.rand_like(value) + 0.5
    adapted.save_pretrained(str(tmp_path / "adapter"))
    return adapted


KERNELS = {
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "conv2d": lambda: nn.Conv2d(4, 6, (3, 2), bias=False),
    "conv2d-1x1": lambda: nn.Conv2d(4, 6, 1),
    "conv3d": lambda: nn.Conv3d(3, 4, 2),
}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", KERNELS)
def test_a_convolution_is_merged_as_peft_merges_it(kind: str, dora: bool, tmp_path: Path) -> None:
    adapted = _adapted(KERNELS[kind](), tmp_path, use_dora=dora)
    live = {name: value.clone() for name, value in adapted.state_dict().items()}
    (tmp_path / "run").mkdir()
    save_file(live, tmp_path / "run/model.safetensors", metadata={"format": "pt"})

    merge_lora(
        tmp_path / "base", tmp_path / "out", adapter_dir=tmp_path / "adapter", weights_only=True
    )
    extract_lora(
        tmp_path / "run",
        tmp_path / "extracted",
        adapter_config=tmp_path / "adapter",
        base_model="base",
    )

    theirs = adapted.merge_and_unload().state_dict()
    ours = load_file(tmp_path / "out/model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-6)
    assert not torch.equal(ours["layer.weight"], live["base_model.model.layer.base_layer.weight"])
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    copied = load_file(tmp_path / "extracted/adapter_model.safetensors")
    assert copied.keys() == saved.keys()
    assert all(torch.equal(copied[name], value) for name, value in saved.items())


def test_a_convolution_with_groups_is_copied_but_not_merged(tmp_path: Path) -> None:
    adapted = _adapted(nn.Conv2d(4, 6, 3, groups=2), tmp_path)
    (tmp_path / "run").mkdir()
    save_file(
        dict(adapted.state_dict()), tmp_path / "run/model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(UnsupportedLayout, match="convolution without groups") as raised:
        merge_lora(
            tmp_path / "base", tmp_path / "out", adapter_dir=tmp_path / "adapter", weights_only=True
        )
    assert "extract-lora" in str(raised.value.hint)
    extract_lora(
        tmp_path / "run",
        tmp_path / "extracted",
        adapter_config=tmp_path / "adapter",
        base_model="base",
    )
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    copied = load_file(tmp_path / "extracted/adapter_model.safetensors")
    assert copied.keys() == saved.keys()
    assert all(torch.equal(copied[name], value) for name, value in saved.items())


RESIZED = {
    "embeddings-adapted": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "trained-tokens": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [100, 103]},
    },
    "saved-whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "not-adapted": {"target_modules": ["q_proj"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", RESIZED)
def test_a_resized_vocabulary_comes_from_the_adapter(case: str, tied: bool, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    if tied and case == "embeddings-adapted":
        pytest.skip("PEFT does not merge both of two tied layers")
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(104, mean_resizing=False)
    adapted = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **RESIZED[case]))
    for value in adapted.parameters():
        if value.requires_grad:
            value.data += torch.rand_like(value)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(str(tmp_path / "adapter"))

    report = merge_lora(tmp_path / "base", tmp_path / "out", adapter_dir=tmp_path / "adapter")

    assert not verify(tmp_path / "adapter").errors
    again: Any = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    again.resize_token_embeddings(104, mean_resizing=False)
    merged = PeftModel.from_pretrained(again, str(tmp_path / "adapter")).merge_and_unload()
    merged.save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs/model.safetensors")
    ours = load_file(tmp_path / "out/model.safetensors")
    assert ours.keys() >= theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-6)
    assert json.loads((tmp_path / "out/config.json").read_bytes())["vocab_size"] == 104
    assert any("vocab_size set to 104" in text for text in (*report.notes, *report.warnings))


class Attending(nn.Module):
    """A module of PyTorch whose two projections PEFT adapts as one target."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


def test_attention_of_pytorch_is_copied_but_not_merged(tmp_path: Path) -> None:
    """PEFT adds the update of the output projection twice, in the forward pass too."""
    from peft import LoraConfig, PeftModel, get_peft_model

    base: Any = Attending()
    fresh = deepcopy(base)
    model: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["attn"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model.peft_config["default"].base_model_name_or_path = "base"
    model.save_pretrained(tmp_path / "peft")
    run = tmp_path / "run"
    run.mkdir()
    save_file(dict(model.state_dict()), run / "model.safetensors", metadata={"format": "pt"})
    given: Any = {"adapter_config": tmp_path / "peft"}
    extract_lora(run, tmp_path / "adapter", base_model="base", **given)
    ours, theirs = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "peft")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    stated = json.loads((tmp_path / "adapter/adapter_config.json").read_bytes())
    assert stated["target_modules"] == ["attn"]
    assert not [p for p in verify(tmp_path / "adapter").problems if p.kind == "adapter-target"]
    with pytest.raises(
        UnsupportedLayout, match=r"torch\.nn\.MultiheadAttention is not merged: attn"
    ):
        merge_lora(run, tmp_path / "merged", weights_only=True, **given)
    # The next step that the refusal names.
    x = torch.rand(3, 1, 16)
    merged = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).merge_and_unload()
    assert torch.equal(merged(x), model(x))


def test_a_state_in_one_file_is_merged(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(
        nn.Sequential(nn.Linear(4, 6, bias=False)),
        LoraConfig(r=2, lora_alpha=4, target_modules=["0"]),
    )
    for parameter in model.parameters():
        nn.init.constant_(parameter, 3)
    model.peft_config["default"].base_model_name_or_path = "base"
    model.save_pretrained(tmp_path / "peft")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    (tmp_path / "config.json").write_text("{}")

    merge_lora(
        tmp_path / "model.pt",
        tmp_path / "out",
        adapter_config=tmp_path / "peft",
        weights_only=True,
    )

    (merged,) = load_file(tmp_path / "out/model.safetensors").values()
    assert torch.equal(merged, model.merge_and_unload()[0].weight)
    assert torch.equal(merged, torch.full((6, 4), 3.0 + 2 * 2 * 9))


def test_an_adapter_of_another_model_is_not_called_damaged(tmp_path: Path) -> None:
    _adapted(nn.Linear(4, 6), tmp_path)
    save_file({"layer.weight": torch.ones(5, 4)}, tmp_path / "base/model.safetensors")
    with pytest.raises(UsageError, match="fits no tensor of the base"):
        merge_lora(
            tmp_path / "base", tmp_path / "out", adapter_dir=tmp_path / "adapter", weights_only=True
        )


def test_replicated_layers_are_refused_by_name(tmp_path: Path) -> None:
    """PEFT adds the updates of all copies of a layer to the one weight that they share."""
    _adapted(nn.Linear(4, 6), tmp_path)
    path = tmp_path / "adapter/adapter_config.json"
    config = json.loads(path.read_bytes())
    path.write_text(json.dumps({**config, "layer_replication": [[0, 2], [1, 2]]}))
    with pytest.raises(UnsupportedLayout, match="merge_and_unload adds all of them"):
        merge_lora(
            tmp_path / "base", tmp_path / "out", adapter_dir=tmp_path / "adapter", weights_only=True
        )
