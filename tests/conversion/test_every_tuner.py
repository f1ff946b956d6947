"""extract-lora of every tuner that PEFT registers: PEFT's own directory, byte for byte, or a refusal by name.

``ROWS`` is the table of docs/adapters.md. A PEFT with a tuner that has no row fails here.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ckpt_tools import extract_lora, verify
from ckpt_tools.errors import UnsupportedLayout
from ckpt_tools.training import save
from tests.support.adapted import files, files_but_manifests

DOCS = Path(__file__).parents[2] / "docs"
IDENTICAL = "identical"
BEFORE, AFTER = "<!-- tuners -->\n", "<!-- end of tuners -->"
OUTSIDE = "PEFT keeps shira_indices outside the state dict"
MIXED = "PEFT reads the adapters that it mixes from their own directories"
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
    Row("LORA", "lora_bias", {"r": 2, "target_modules": TWO, "lora_bias": True}),
    Row(
        "LORA", "parameter", {"r": 2, "target_parameters": ["q_proj.weight"], "target_modules": []}
    ),
    Row("LORA", "tokens", {"r": 2, "target_modules": TWO, "trainable_token_indices": [1, 2]}),
    Row("LORA", "saved", {"r": 2, "target_modules": TWO, "modules_to_save": ["lm_head"]}),
    Row("LORA", "embedding", {"r": 2, "target_modules": ["embed_tokens"]}),
    Row("LORA", "pissa", {"r": 2, "target_modules": TWO, "init_lora_weights": "pissa"}),
    Row("LORA", "olora", {"r": 2, "target_modules": TWO, "init_lora_weights": "olora"}),
    Row(
        "ADALORA",
        "default",
        {
            "init_r": 4,
            "target_r": 2,
            "total_step": 10,
            "tinit": 1,
            "tfinal": 1,
            "target_modules": TWO,
        },
    ),
    Row(
        "ADAMSS",
        "default",
        {"r": 4, "num_subspaces": 2, "subspace_rank": 1, "target_modules": TWO},
        "PEFT clusters the values of the base's weights",
        "sklearn",
    ),
    Row("ADAPTION_PROMPT", "default", {"adapter_len": 3, "adapter_layers": 1}),
    Row("BEFT", "default", {"target_modules": TWO}),
    Row("BOFT", "default", {"boft_block_size": 4, "target_modules": TWO}),
    Row(
        "BOFT",
        "num",
        {
            "boft_block_size": 0,
            "boft_block_num": 2,
            "boft_n_butterfly_factor": 1,
            "target_modules": TWO,
        },
    ),
    Row("C3A", "default", {"block_size": 4, "target_modules": TWO}),
    Row("CARTRIDGE", "default", {"num_virtual_tokens": 3}),
    Row("CARTRIDGE", "frozen", {"num_virtual_tokens": 3, "num_frozen_tokens": 0}),
    Row(
        "CPT",
        "default",
        {"cpt_token_ids": [1, 2, 3], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]},
    ),
    Row("DEFT", "default", {"r": 2, "target_modules": TWO}),
    Row("DEFT", "qr", {"r": 2, "target_modules": TWO, "decomposition_method": "qr", "para": True}),
    Row("DELORA", "default", {"r": 2, "target_modules": TWO}),
    Row("FOURIERFT", "default", {"n_frequency": 8, "target_modules": TWO}),
    Row(
        "FROD",
        "default",
        {"target_modules": TWO},
        "PEFT decomposes the values of the base's weights",
    ),
    Row(
        "FROD",
        "projection",
        {"target_modules": TWO, "save_projection": True},
        "PEFT decomposes the values of the base's weights",
    ),
    Row(
        "FROD",
        "no-projection",
        {"target_modules": TWO, "save_projection": False},
        "PEFT decomposes the values of the base's weights",
    ),
    Row("GLORA", "default", {"r": 2, "target_modules": TWO}),
    Row("GRALORA", "default", {"r": 4, "gralora_k": 2, "target_modules": TWO}),
    Row("GRALORA", "hybrid", {"r": 4, "hybrid_r": 2, "gralora_k": 2, "target_modules": TWO}),
    Row("HIRA", "default", {"r": 2, "target_modules": TWO}),
    Row("HRA", "default", {"r": 2, "target_modules": TWO}),
    Row(
        "IA3",
        "default",
        {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    Row("LILY", "default", {"r": 2, "target_modules": SQUARE}),
    Row("LN_TUNING", "default", {"target_modules": ["input_layernorm"]}),
    Row("LOHA", "default", {"r": 2, "target_modules": TWO}),
    Row("LOKR", "default", {"r": 2, "target_modules": TWO}),
    Row(
        "LOKR",
        "both",
        {"r": 2, "target_modules": TWO, "decompose_both": True, "decompose_factor": 2},
    ),
    Row("MISS", "default", {"r": 4, "target_modules": TWO}),
    Row("MISS", "bat", {"r": 4, "target_modules": TWO, "init_weights": "bat"}),
    Row("MISS", "mini", {"r": 4, "mini_r": 2, "target_modules": TWO, "init_weights": "mini"}),
    Row("OFT", "default", {"oft_block_size": 4, "target_modules": TWO}),
    Row("OFT", "share", {"oft_block_size": 4, "target_modules": TWO, "block_share": True}),
    Row(
        "SHIRA",
        "seed",
        {"r": 2, "random_seed": 1, "target_modules": TWO},
        OUTSIDE,
    ),
    Row(
        "SHIRA",
        "default",
        {"r": 2, "target_modules": TWO},
        OUTSIDE,
    ),
    Row("PROMPT_TUNING", "default", {"num_virtual_tokens": 3}),
    Row(
        "MULTITASK_PROMPT_TUNING",
        "prompt",
        {"num_virtual_tokens": 3, "num_tasks": 2, "num_ranks": 1},
    ),
    Row("OSF", "default", {"effective_rank": 2, "target_modules": TWO}),
    Row("P_TUNING", "mlp", {"num_virtual_tokens": 3, "encoder_hidden_size": 6}),
    Row(
        "P_TUNING",
        "tuning-lstm",
        {
            "num_virtual_tokens": 3,
            "encoder_hidden_size": 6,
            "encoder_num_layers": 1,
            "encoder_reparameterization_type": "LSTM",
        },
    ),
    Row("PEANUT", "default", {"r": 2, "target_modules": TWO}),
    Row("PEANUT", "deep", {"r": 2, "depth": 2, "target_modules": TWO}),
    Row("POLY", "default", {"r": 2, "n_tasks": 2, "n_skills": 2, "target_modules": TWO}),
    Row("PREFIX_TUNING", "default", {"num_virtual_tokens": 3}),
    Row(
        "PREFIX_TUNING",
        "projection",
        {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 6},
    ),
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
    Row(
        "TINYLORA", "projection", {"r": 2, "u": 4, "target_modules": TWO, "save_projection": False}
    ),
    Row(
        "TRAINABLE_TOKENS", "default", {"token_indices": [1, 2], "target_modules": ["embed_tokens"]}
    ),
    Row("UNILORA", "default", {"r": 2, "theta_d_length": 16, "target_modules": SQUARE}),
    Row(
        "UNILORA",
        "indices",
        {"r": 2, "theta_d_length": 16, "target_modules": SQUARE, "save_indices": True},
    ),
    Row(
        "VBLORA",
        "default",
        {"r": 2, "num_vectors": 8, "vector_length": 4, "topk": 2, "target_modules": SQUARE},
    ),
    Row(
        "VBLORA",
        "topk",
        {
            "r": 2,
            "num_vectors": 8,
            "vector_length": 4,
            "topk": 2,
            "target_modules": SQUARE,
            "save_only_topk_weights": True,
        },
        "PEFT computes tensors when it saves",
    ),
    Row("VERA", "default", {"r": 2, "target_modules": SQUARE}),
    Row("VERA", "no-projection", {"r": 2, "target_modules": SQUARE, "save_projection": False}),
    Row(
        "XLORA",
        "default",
        {"hidden_size": 16},
        MIXED,
    ),
    Row("WAVEFT", "default", {"n_frequency": 8, "target_modules": TWO}),
]


def adapted(row: Row, scratch: Path) -> Any:
    """A tiny adapted model."""
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
    return get_peft_model(base, config(task_type="CAUSAL_LM", **row.options, **adapters)).eval()


def trained(row: Row, scratch: Path) -> Any:
    """The model after training: every trained value is random."""
    model = adapted(row, scratch)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save_as_peft(model: Any, directory: Path) -> dict[str, bytes]:
    model.save_pretrained(directory)
    for readme in directory.rglob("README.md"):
        readme.unlink()
    return files(directory)


def save_states(model: Any, scratch: Path) -> list[Path]:
    """The state as torch writes it, and as safetensors does, which holds shared tensors once."""
    whole, once = scratch / "whole", scratch / "once"
    whole.mkdir()
    once.mkdir()
    torch.save(model.state_dict(), whole / "pytorch_model.bin")
    kept = {(t.data_ptr(), t.shape, t.stride()): n for n, t in reversed(model.state_dict().items())}
    state = {name: model.state_dict()[name].clone() for name in kept.values()}
    save_file({n: t.contiguous() for n, t in state.items()}, once / "model.safetensors")
    return [whole, once]


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_row(row: Row, tmp_path: Path) -> None:
    if row.needs:
        pytest.importorskip(row.needs, exc_type=ImportError)
    model = trained(row, tmp_path)
    states = save_states(model, tmp_path)
    config = model.get_base_model().config
    config.architectures = ["LlamaForCausalLM"]
    (tmp_path / "base").mkdir()
    config.to_json_file(tmp_path / "base/config.json")
    if row.outcome == IDENTICAL:
        # Before PEFT saves: saving changes the tensors of CPT.
        save(model, tmp_path / "live", adapter="default", verify=True)
    truth = save_as_peft(model, tmp_path / "peft")
    options: dict[str, Any] = {
        "config": tmp_path / "base",
        "adapter_config": tmp_path / "peft/adapter_config.json",
        "adapter": "default",
    }

    if row.outcome == IDENTICAL:
        for state in states:
            out = tmp_path / f"{state.name}-out"
            extract_lora(state, out, verify=True, **options)
            assert files_but_manifests(out) == truth
        assert files_but_manifests(tmp_path / "live") == truth
    else:
        for state in states:
            with pytest.raises(UnsupportedLayout, match=re.escape(row.outcome)) as refused:
                extract_lora(state, tmp_path / "out", **options)
            assert row.tuner in refused.value.fact
        assert "save_pretrained" in str(refused.value.hint)


@pytest.mark.parametrize("row", [row for row in ROWS if row.outcome != IDENTICAL], ids=str)
def test_the_next_step_of_a_refusal_gives_the_directory(row: Row, tmp_path: Path) -> None:
    if row.needs:
        pytest.importorskip(row.needs, exc_type=ImportError)
    if row.tuner == "SHIRA" and "random_seed" not in row.options:
        pytest.skip("the hint names the training process")
    model = trained(row, tmp_path)
    truth = save_as_peft(model, tmp_path / "peft")
    again = adapted(row, tmp_path)
    again.load_state_dict(model.state_dict())

    assert save_as_peft(again, tmp_path / "again") == truth


def test_every_tuner_has_a_row() -> None:
    assert {row.tuner for row in ROWS} == {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}


def table() -> str:
    """The table of the page."""
    lines = ["| tuner | configuration | result |", "|---|---|---|"]
    for row in ROWS:
        options = [f"`{k}={v!r}`" for k, v in row.options.items() if v not in (TWO, SQUARE)]
        result = row.outcome if row.outcome == IDENTICAL else f"refused: {row.outcome}"
        lines.append(f"| {row.tuner} | {', '.join(options) or 'default'} | {result} |")
    return "\n".join(lines) + "\n"


def test_the_page_has_the_table() -> None:
    page = (DOCS / "adapters.md").read_text()
    assert page.partition(BEFORE)[2].partition(AFTER)[0].strip() == table().strip()


@pytest.mark.slow
def test_verify_computes_a_prompt_again(tmp_path: Path) -> None:
    (row,) = (row for row in ROWS if str(row) == "P_TUNING-mlp")
    model = trained(row, tmp_path)
    (state, _) = save_states(model, tmp_path)
    config = model.get_base_model().config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "base")
    save_as_peft(model, tmp_path / "peft")
    extract_lora(
        state, tmp_path / "out", config=tmp_path / "base", adapter_config=tmp_path / "peft"
    )

    assert not verify(tmp_path / "out", against=state).errors
    with torch.no_grad():
        model.prompt_encoder["default"].mlp_head[0].weight.mul_(2)
    torch.save(model.state_dict(), state / "pytorch_model.bin")
    errors = verify(tmp_path / "out", against=state).errors
    assert "prompt_embeddings" in {error.tensor for error in errors}
