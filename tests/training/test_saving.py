"""What a save does with its arguments, in a process by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ckpt_tools
from ckpt_tools import training
from ckpt_tools.errors import (
    AttributeNotFound,
    CkptError,
    MissingAsset,
    OutputExists,
    OutputFailed,
    UsageError,
)
from ckpt_tools.ranks import from_process_group
from ckpt_tools.training.saving import _wanted
from ckpt_tools.training.state_dict import holding_of
from ckpt_tools.training.wrappers import unwrapped
from tests.support.outputs import contents

CHAT, MANIFEST = "zero/zero3-bf16-olmo2-chat-2ranks/hf", "ckpt_tools_manifest.json"


class Composite(nn.Module):
    """A policy, a value model, and an embedding that they share."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 2)})
        self.value = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 1)})
        self.value["embed"].weight = self.policy["embed"].weight
        self.policy["head"].bias.requires_grad_(False)


class Adapted(Composite):
    """What makes a PEFT model for those who ask."""

    @property
    def peft_config(self) -> dict[str, Any]:
        return {"default": None, "other": None}

    def get_base_model(self) -> nn.Module:
        return self


def save(model: nn.Module, output: Path, **options: Any) -> ckpt_tools.Report:
    return training.save(model, output, weights_only=True, **options)


def test_the_training_is_offered_by_the_package() -> None:
    assert ckpt_tools.training is training


def test_weights_alone_and_the_manifest(tmp_path: Path) -> None:
    model = Composite()

    report = save(model, tmp_path / "out", sha256=True)

    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.safetensors",
        "ckpt_tools_manifest.json",
        "SHA256SUMS",
    }
    saved = load_file(tmp_path / "out" / "model.safetensors")
    state = model.state_dict()
    assert {*saved} == {*state} - {"value.embed.weight"}
    assert all(torch.equal(value, state[name]) for name, value in saved.items())
    (source,) = json.loads((tmp_path / "out" / "ckpt_tools_manifest.json").read_text())["sources"]
    assert (source["path"], source["format"]) == (None, "live")
    assert report.tensors == len(saved)


def test_an_attribute_has_what_it_shares_with_another(tmp_path: Path) -> None:
    model = Composite()

    save(model, tmp_path / "out", attribute="value", dtype="bf16")

    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {*saved} == {"embed.weight", "head.weight", "head.bias"}
    shared = model.state_dict()["policy.embed.weight"]
    assert torch.equal(saved["embed.weight"], shared.bfloat16())


def test_what_will_be_written_is_known_beforehand() -> None:
    """Only that is compared between ranks: a frozen base may be a thousand times its adapter."""
    holding = holding_of(unwrapped(Composite()), masters=False)

    assert _wanted(holding, None, trained_only=False) is None
    assert _wanted(holding, "value", trained_only=False) == {
        "policy.embed.weight",
        "value.head.weight",
        "value.head.bias",
    }
    assert _wanted(holding, "policy", trained_only=True) == {
        "policy.embed.weight",
        "policy.head.weight",
    }


@pytest.mark.parametrize(
    ("model", "options", "error", "said"),
    [
        (Composite(), {"attribute": "polic"}, AttributeNotFound, "no attribute 'polic'"),
        (Composite(), {"adapter": "default"}, UsageError, "none, because it is not a PEFT model"),
        (Adapted(), {"adapter": "third"}, UsageError, "It has: default, other"),
        (Adapted(), {"weights_only": False}, UsageError, "Pass adapter='default'"),
        (Composite(), {"weights_only": False}, MissingAsset, "a Composite has no config"),
        (Composite(), {"dtype": "int4"}, UsageError, "'int4' is not a dtype"),
    ],
)
def test_what_cannot_be_saved_is_said_and_leaves_nothing(
    tmp_path: Path, model: Any, options: dict[str, Any], error: type[CkptError], said: str
) -> None:
    with pytest.raises(error, match=said):
        training.save(model, tmp_path / "out", **{"weights_only": True, **options})

    assert not list(tmp_path.iterdir())


def test_a_model_in_a_dictionary_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a dict is not a model"):
        training.save({}, tmp_path / "out")


def test_an_existing_output_is_replaced_when_asked_for(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    save(model, tmp_path / "out")
    nn.init.ones_(model.weight)

    with pytest.raises(OutputExists):
        save(model, tmp_path / "out")
    save(model, tmp_path / "out", overwrite=True)

    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(saved["weight"], torch.ones(2, 2))


def test_a_save_that_fails_cannot_be_resumed_and_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckpt_tools.writing import delivery

    finish = delivery._finish_all

    def failing(*arguments: Any) -> None:
        finish(*arguments)
        raise OutputFailed("no space left on the output's disk")

    monkeypatch.setattr(delivery, "_finish_all", failing)
    # As after some seconds of writing.
    monkeypatch.setattr("ckpt_tools.writing.journal.has_proof", lambda home: True)
    with pytest.raises(OutputFailed) as error:
        save(nn.Linear(512, 512), tmp_path / "out")

    assert "--resume" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_adapter_on_a_base_without_a_name_is_saved_as_peft_does(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), lora)
    model.save_pretrained(str(tmp_path / "peft"))

    training.save(model, tmp_path / "ours", adapter="default")
    other = LoraConfig(r=3, target_modules=["k_proj"], task_type="CAUSAL_LM")
    value = get_peft_model(LlamaForCausalLM(config), other)
    pair = nn.ModuleDict({"value": value, "policy": model})
    training.save(pair, tmp_path / "of a pair", attribute="policy", adapter="default")

    for name in ("adapter_model.safetensors", "adapter_config.json"):
        expected = (tmp_path / "peft" / name).read_bytes()
        assert (tmp_path / "ours" / name).read_bytes() == expected
        assert (tmp_path / "of a pair" / name).read_bytes() == expected


def test_a_process_alone_has_no_ranks() -> None:
    assert from_process_group(1.0) is None


@pytest.mark.slow
def test_compat_and_chat_template_are_those_of_a_conversion(fixtures: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    hf, template = fixtures / CHAT, tmp_path / "template.jinja"
    template.write_text(
        "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"
    )
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(hf))
    options: dict[str, Any] = {"compat": "transformers-4", "chat_template": template}
    options |= {"tokenizer": hf, "card": False}
    training.save(model, tmp_path / "live", **options)
    (tmp_path / "state").mkdir()
    torch.save(model.state_dict(), tmp_path / "state/pytorch_model.bin")
    ckpt_tools.consolidate(tmp_path / "state", tmp_path / "converted", config=hf, **options)

    live, converted = contents(tmp_path / "live"), contents(tmp_path / "converted")
    assert {name for name in live if live[name] != converted.get(name)} == {MANIFEST}
    assert live.keys() == converted.keys()
    assert live["chat_template.jinja"] == template.read_bytes()
    config, tokenizer = (json.loads(live[n]) for n in ("config.json", "tokenizer_config.json"))
    assert (config["rope_theta"], config["torch_dtype"]) == (10000.0, "bfloat16")
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
