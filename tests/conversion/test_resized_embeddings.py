"""Embeddings beside an adapter of a resized model: extract-lora writes what PEFT writes of the live model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tools import extract_lora
from tests.support.adapted import files, files_but_manifests

Settings = dict[str, Any]
TOKENS: Settings = {"trainable_token_indices": {"embed_tokens": [9, 11]}}
EMBEDDING: Settings = {"target_modules": ["q_proj", "embed_tokens"]}
HEAD: Settings = {"target_modules": ["k_proj", "lm_head"]}
WHOLE_HEAD: Settings = {"modules_to_save": ["lm_head"]}
WHOLE_EMBEDDING: Settings = {"target_modules": ["k_proj"], "modules_to_save": ["embed_tokens"]}
OTHER: Settings = {"target_modules": ["k_proj"]}
# Each is the adapter `default`, and then others.
CASES: dict[str, tuple[Settings, ...]] = {
    "tokens": (TOKENS,),
    "one-embedding-of-two": (EMBEDDING, OTHER),
    "each-another-embedding": (EMBEDDING, HEAD),
    "whole": (WHOLE_HEAD,),
    "each-another-whole": (WHOLE_HEAD, WHOLE_EMBEDDING),
}


def adapted(directory: Path, settings: tuple[Settings, ...], *, tied: bool) -> None:
    """A resized base, its state in training, and what PEFT saves of its adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(
        vocab_size=10, num_attention_heads=2, tie_word_embeddings=tied, bos_token_id=1, **sizes
    )
    config.save_pretrained(directory / "base")
    model: Any = LlamaForCausalLM(config)
    model.resize_token_embeddings(12, mean_resizing=False)
    names = ["default", *(f"other-{n}" for n in range(1, len(settings)))]
    for name, each in zip(names, settings, strict=True):
        lora = LoraConfig(r=2, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **each})
        if name == "default":
            model = get_peft_model(model, lora)
        else:
            model.add_adapter(name, lora)
        model.peft_config[name].base_model_name_or_path = str(directory / "base")
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)
    (directory / "run").mkdir()
    torch.save(model.state_dict(), directory / "run/pytorch_model.bin")
    model.get_base_model().config.save_pretrained(directory / "resized")
    model.save_pretrained(directory / "truth")
    for path in directory.rglob("README.md"):
        path.unlink()


def wrong(case: str, directory: Path, *, tied: bool, asked: bool) -> list[str]:
    adapted(directory, CASES[case], tied=tied)
    config: Any = {"config": directory / "resized"} if asked else {}
    report = extract_lora(
        directory / "run",
        directory / "out",
        adapter="all",
        adapter_config=directory / "truth",
        **config,
    )
    ours, theirs = files_but_manifests(directory / "out"), files(directory / "truth")
    differ = [file for file in {**ours, **theirs} if ours.get(file) != theirs.get(file)]
    return differ + [text for text in (*report.notes, *report.warnings) if "PEFT" in text]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", CASES)
def test_rules_alone_give_what_peft_writes(case: str, tied: bool, tmp_path: Path) -> None:
    assert not wrong(case, tmp_path, tied=tied, asked=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "tied"),
    [("tokens", True), ("each-another-embedding", False), ("each-another-whole", True)],
)
def test_peft_itself_gives_the_same_names(case: str, tied: bool, tmp_path: Path) -> None:
    assert not wrong(case, tmp_path, tied=tied, asked=True)
