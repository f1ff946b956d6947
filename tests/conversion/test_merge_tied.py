"""Adapters that change one end of a tied pair: the merged model computes what the adapted one did.

PEFT's own merge adds in place, which reaches both ends. The oracle is the adapted model before the merge.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tools import extract_lora, merge_lora, verify

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
ATTENTION = ["q_proj", "v_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "embedding": ("Qwen2", {"target_modules": [*ATTENTION, "embed_tokens"]}),
    "embedding-and-head": (
        "Qwen2",
        {"target_modules": [*ATTENTION, "embed_tokens"], "ensure_weight_tying": True},
    ),
    "saved-embedding": (
        "Qwen2",
        {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]},
    ),
    "tokens": ("Qwen2", {"target_modules": ATTENTION, "trainable_token_indices": [3, 9]}),
    "embedding-of-a-base-that-stores-the-head": (
        "Qwen2",
        {"target_modules": [*ATTENTION, "embed_tokens"]},
    ),
    "embedding-of-a-resized-model": ("Qwen2", {"target_modules": [*ATTENTION, "embed_tokens"]}),
    "head-of-a-resized-model": ("Qwen2", {"target_modules": [*ATTENTION, "lm_head"]}),
    "head-whose-bias-stays-tied": ("Bert", {"target_modules": ["query", "decoder"]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_computes_what_the_adapted_one_did(case: str, tmp_path: Path) -> None:
    import transformers
    from peft import LoraConfig, get_peft_model

    family, settings = CASES[case]
    model_class = getattr(
        transformers, "BertForMaskedLM" if family == "Bert" else "Qwen2ForCausalLM"
    )
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = model_class(getattr(transformers, f"{family}Config")(**SIZES, **ids))
    base, run, adapter = tmp_path / "base", tmp_path / "run.pt", tmp_path / "adapter"
    model.save_pretrained(base)
    if "stores-the-head" in case:
        # As safetensors.torch.save_model does: of two names, the first in alphabetical order.
        held = load_file(base / "model.safetensors")
        held["lm_head.weight"] = held.pop("model.embed_tokens.weight")
        save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    if "resized" in case:
        model.resize_token_embeddings(SIZES["vocab_size"] + 2, mean_resizing=False)
    adapted: Any = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, **settings)).eval()
    # PEFT asks there whether the vocabulary was resized.
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(str(adapter))
    torch.save(adapted.state_dict(), run)
    tokens = torch.tensor([[3, 9, 17, 40]])
    with torch.no_grad():
        expected = adapted(input_ids=tokens).logits

    merge_lora(base, tmp_path / "out", adapter_dir=adapter, dtype="fp32")

    merged = model_class.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=tokens).logits, expected)
    if "ensure_weight_tying" in settings:
        extracted = tmp_path / "extracted"
        extract_lora(run, extracted, adapter_config=adapter, base_model="org/base")
        weights = "adapter_model.safetensors"
        assert (extracted / weights).read_bytes() == (adapter / weights).read_bytes()
        assert not [p for p in verify(extracted).errors if p.kind == "adapter-target"]


@pytest.mark.slow
def test_one_of_several_blocks_that_share_weights_is_changed_alone(tmp_path: Path) -> None:
    """Zamba's blocks share their weights; a directory holds them once, and an adapter may change one."""
    from peft import LoraConfig, get_peft_model
    from transformers import Zamba2Config, Zamba2ForCausalLM

    torch.manual_seed(0)
    config = Zamba2Config(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid"] * 2,
        num_mem_blocks=1,
        num_attention_heads=2,
        n_mamba_heads=2,
        mamba_d_state=4,
        mamba_ngroups=1,
        chunk_size=4,
        adapter_rank=2,
        bos_token_id=1,
    )
    model: Any = Zamba2ForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    lora.layers_to_transform, lora.layers_pattern = [1], "layers"
    adapted = get_peft_model(model, lora).eval()
    adapted.save_pretrained(str(tmp_path / "adapter"))
    tokens = torch.tensor([[1, 2, 3, 4]])
    live = adapted(input_ids=tokens).logits

    merge_lora(tmp_path / "base", tmp_path / "out", adapter_dir=tmp_path / "adapter")

    assert not verify(tmp_path / "out").errors
    merged: Any = Zamba2ForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(merged(input_ids=tokens).logits, live, rtol=0, atol=1e-6)
    first, second = (merged.model.layers[n].shared_transformer.self_attn for n in (1, 3))
    assert torch.equal(first.k_proj.weight, second.k_proj.weight)
    held = load_file(tmp_path / "base/model.safetensors")
    name = "model.layers.1.shared_transformer.self_attn.q_proj.weight"
    assert torch.equal(second.q_proj.weight, held[name])
    assert not torch.equal(first.q_proj.weight, held[name])
