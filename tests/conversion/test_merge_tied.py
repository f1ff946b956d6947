"""Adapters that change one end of a tied pair: the merged model computes what the adapted one did.

PEFT's own merge adds in place, which reaches both ends. The oracle is the adapted model before the merge.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

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
    adapted: Any = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, **settings)).eval()
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
