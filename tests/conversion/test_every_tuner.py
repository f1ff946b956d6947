"""extract-lora of every tuner that PEFT registers: PEFT's own directory, byte for byte, or a refusal by name.

``ROWS`` is the table of docs/adapters.md. A PEFT with a tuner that has no row fails here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import LlamaConfig, LlamaForCausalLM

from ckpt_tools import extract_lora
from ckpt_tools.errors import UnsupportedLayout
from tests.adapted import files, files_but_manifests

DOCS = Path(__file__).parents[2] / "docs"
IDENTICAL = "identical"
TWO = ["q_proj", "v_proj"]
SQUARE = ["q_proj", "o_proj"]


@dataclass(frozen=True)
class Row:
    """One configuration of a tuner.

    Attributes:
        tuner: PEFT's name of it.
        variant: the configuration in words.
        outcome: ``identical``, or the reason of the refusal.
        options: of the tuner's config.
    """

    tuner: str
    variant: str
    options: dict[str, Any] = field(default_factory=dict)
    outcome: str = IDENTICAL
    needs: str = ""

    def __str__(self) -> str:
        return f"{self.tuner}-{self.variant}".replace(" ", "-")


ROWS = [
    Row("LORA", "default", {"r": 2, "target_modules": TWO, "init_lora_weights": False}),
    Row("LORA", "dora", {"r": 2, "target_modules": TWO, "use_dora": True}),
    Row("LORA", "bias", {"r": 2, "target_modules": TWO, "bias": "all"}),
    Row("LORA", "bdlora", {"r": 2, "target_modules": TWO, "lora_bias": True}),
    Row("LORA", "parameter", {"r": 2, "target_parameters": ["q_proj.weight"], "target_modules": []}),
    Row("LORA", "tokens", {"r": 2, "target_modules": TWO, "trainable_token_indices": [1, 2]}),
    Row("LORA", "saved", {"r": 2, "target_modules": TWO, "modules_to_save": ["lm_head"]}),
    Row("LORA", "embedding", {"r": 2, "target_modules": ["embed_tokens"]}),
    Row("LORA", "pissa", {"r": 2, "target_modules": TWO, "init_lora_weights": "pissa"}),
    Row("LORA", "olora", {"r": 2, "target_modules": TWO, "init_lora_weights": "olora"}),
    Row("ADALORA", "default", {"init_r": 4, "target_r": 2, "total_step": 10, "tinit": 1, "tfinal": 1, "target_modules": TWO}),
    Row("ADAMSS", "default", {"r": 4, "num_subspaces": 2, "subspace_rank": 1, "target_modules": TWO}, needs="sklearn"),
    Row("ADAPTION_PROMPT", "prompt", {"adapter_len": 3, "adapter_layers": 1}),
    Row("BEFT", "default", {"target_modules": TWO}),
    Row("BOFT", "default", {"boft_block_size": 4, "target_modules": TWO}),
    Row("BOFT", "num", {"boft_block_size": 0, "boft_block_num": 2, "boft_n_butterfly_factor": 1, "target_modules": TWO}),
    Row("C3A", "default", {"block_size": 4, "target_modules": TWO}),
    Row("CARTRIDGE", "default", {"num_virtual_tokens": 3}),
    Row("CARTRIDGE", "frozen", {"num_virtual_tokens": 3, "num_frozen_tokens": 0}),
    Row("CPT", "default", {"cpt_token_ids": [1, 2, 3], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]}),
    Row("DEFT", "default", {"r": 2, "target_modules": TWO}),
    Row("DEFT", "qr", {"r": 2, "target_modules": TWO, "decomposition_method": "qr", "para": True}),
    Row("DELORA", "default", {"r": 2, "target_modules": TWO}),
    Row("FOURIERFT", "default", {"n_frequency": 8, "target_modules": TWO}),
    Row("FROD", "default", {"target_modules": TWO}, "decomposes the values"),
    Row("FROD", "projection", {"target_modules": TWO, "save_projection": True}, "decomposes the values"),
    Row("FROD", "no-projection", {"target_modules": TWO, "save_projection": False}, "decomposes the values"),
    Row("GLORA", "default", {"r": 2, "target_modules": TWO}),
    Row("GRALORA", "default", {"r": 4, "gralora_k": 2, "target_modules": TWO}),
    Row("GRALORA", "hybrid", {"r": 4, "hybrid_r": 2, "gralora_k": 2, "target_modules": TWO}),
    Row("HIRA", "default", {"r": 2, "target_modules": TWO}),
    Row("HRA", "default", {"r": 2, "target_modules": TWO}),
    Row("IA3", "default", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    Row("LILY", "default", {"r": 2, "target_modules": SQUARE}),
    Row("LN_TUNING", "tuning", {"target_modules": ["input_layernorm"]}),
    Row("LOHA", "default", {"r": 2, "target_modules": TWO}),
    Row("LOKR", "default", {"r": 2, "target_modules": TWO}),
    Row("LOKR", "both", {"r": 2, "target_modules": TWO, "decompose_both": True, "decompose_factor": 2}),
    Row("MISS", "default", {"r": 4, "target_modules": TWO}),
    Row("MISS", "bat", {"r": 4, "target_modules": TWO, "init_weights": "bat"}),
    Row("MISS", "mini", {"r": 4, "mini_r": 2, "target_modules": TWO, "init_weights": "mini"}),
    Row("OFT", "default", {"oft_block_size": 4, "target_modules": TWO}),
    Row("OFT", "share", {"oft_block_size": 4, "target_modules": TWO, "block_share": True}),
    Row("SHIRA", "default", {"r": 2, "target_modules": TWO}, "outside the state dict"),
    Row("PROMPT_TUNING", "default", {"num_virtual_tokens": 3}),
    Row("MULTITASK_PROMPT_TUNING", "prompt", {"num_virtual_tokens": 3, "num_tasks": 2, "num_ranks": 1}),
    Row("OSF", "default", {"effective_rank": 2, "target_modules": TWO}),
    Row("P_TUNING", "tuning-mlp", {"num_virtual_tokens": 3, "encoder_hidden_size": 6}),
    Row("P_TUNING", "tuning-lstm", {"num_virtual_tokens": 3, "encoder_hidden_size": 6, "encoder_num_layers": 1, "encoder_reparameterization_type": "LSTM"}),
    Row("PEANUT", "default", {"r": 2, "target_modules": TWO}),
    Row("PEANUT", "deep", {"r": 2, "depth": 2, "target_modules": TWO}),
    Row("POLY", "default", {"r": 2, "n_tasks": 2, "n_skills": 2, "target_modules": TWO}),
    Row("PREFIX_TUNING", "default", {"num_virtual_tokens": 3}),
    Row("PREFIX_TUNING", "projection", {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 6}),
    Row("PSOFT", "default", {"r": 2, "target_modules": TWO}),
    Row("PVERA", "default", {"r": 2, "target_modules": SQUARE}),
    Row("PVERA", "no-projection", {"r": 2, "target_modules": SQUARE, "save_projection": False}),
    Row("RANDLORA", "default", {"r": 4, "target_modules": SQUARE}),
    Row("RANDLORA", "no-projection", {"r": 4, "target_modules": SQUARE, "save_projection": False}),
    Row("ROAD", "default", {"group_size": 4, "target_modules": TWO}),
    Row("SHADOW", "default", {"r": 2}),
    Row("SUPERTUNING", "default", {"target_modules": TWO}),
    Row("SUPERTUNING", "indices", {"target_modules": TWO, "save_precomputed_indices": True}),
    Row("SUPERTUNING", "lora", {"target_modules": TWO, "r": 2, "lora_alpha": 2}),
    Row("TINYLORA", "default", {"r": 2, "u": 4, "target_modules": TWO}),
    Row("TINYLORA", "projection", {"r": 2, "u": 4, "target_modules": TWO, "save_projection": False}),
    Row("TRAINABLE_TOKENS", "tokens", {"token_indices": [1, 2], "target_modules": ["embed_tokens"]}),
    Row("UNILORA", "default", {"r": 2, "theta_d_length": 16, "target_modules": SQUARE}),
    Row("UNILORA", "indices", {"r": 2, "theta_d_length": 16, "target_modules": SQUARE, "save_indices": True}),
    Row("VBLORA", "default", {"r": 2, "num_vectors": 8, "vector_length": 4, "topk": 2, "target_modules": SQUARE}),
    Row("VBLORA", "topk", {"r": 2, "num_vectors": 8, "vector_length": 4, "topk": 2, "target_modules": SQUARE, "save_only_topk_weights": True}, "computes .*_topk_indices"),
    Row("VERA", "default", {"r": 2, "target_modules": SQUARE}),
    Row("VERA", "no-projection", {"r": 2, "target_modules": SQUARE, "save_projection": False}),
    Row("XLORA", "default", {"hidden_size": 16}, "from their own directories"),
    Row("WAVEFT", "default", {"n_frequency": 8, "target_modules": TWO}),
]


def adapted(row: Row, scratch: Path) -> Any:
    """A tiny adapted model in which every trained value is random."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )
    base.name_or_path = "base"
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(row.tuner)]
    if row.tuner == "XLORA":
        mixed = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=TWO))
        mixed.save_pretrained(scratch / "mixed")
        base.config.use_cache = False
    adapters = {"adapters": {"one": str(scratch / "mixed")}} if row.tuner == "XLORA" else {}
    model = get_peft_model(base, config(task_type="CAUSAL_LM", **row.options, **adapters))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@contextmanager
def saved(row: Row, scratch: Path) -> Iterator[Any]:
    """The model, with its state, the base's config and PEFT's own directory in ``scratch``."""
    model = adapted(row, scratch)
    (scratch / "state").mkdir()
    torch.save(model.state_dict(), scratch / "state/pytorch_model.bin")
    base = model.get_base_model()
    base.config.architectures = ["LlamaForCausalLM"]
    (scratch / "config").mkdir()
    base.config.to_json_file(scratch / "config/config.json", use_diff=True)
    model.save_pretrained(scratch / "peft")
    for readme in (scratch / "peft").rglob("README.md"):
        readme.unlink()
    yield model


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_row(row: Row, tmp_path: Path) -> None:
    if row.needs:
        pytest.importorskip(row.needs, exc_type=ImportError)
    with saved(row, tmp_path):
        options: dict[str, Any] = {
            "config": tmp_path / "config",
            "adapter_config": tmp_path / "peft/adapter_config.json",
            "adapter": "default",
        }
        if row.outcome == IDENTICAL:
            extract_lora(tmp_path / "state", tmp_path / "out", **options)
            assert files_but_manifests(tmp_path / "out") == files(tmp_path / "peft")
            return
        with pytest.raises(UnsupportedLayout, match=row.outcome) as refused:
            extract_lora(tmp_path / "state", tmp_path / "out", **options)
        assert row.tuner in refused.value.fact
        assert "save_pretrained" in str(refused.value.hint)


def test_every_tuner_has_a_row() -> None:
    assert {row.tuner for row in ROWS} == {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
