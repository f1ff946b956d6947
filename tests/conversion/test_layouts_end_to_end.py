"""DeepSpeed layouts beyond plain ZeRO become hub directories that hold what the live engines held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ckpt_tools import consolidate
from ckpt_tools.errors import UsageError
from tests.support.readers.contract import FIXTURES, Case, assert_same

LAYOUTS = FIXTURES / "layouts"
NAMED = [
    "wrapped-zero2-bf16-llama-2ranks",
    "universal-zero3-bf16-qwen3-tied-2ranks",
    "universal-zero1-bf16-qwen2-autotp-2ranks",
    "autotp-zero2-bf16-qwen2-4ranks",
    "autotp-zero1-bf16-phi3-fused-2ranks",
    "autoep-zero3-bf16-mixtral-4ranks",
]
NUMBERED = ["pipeline-zero1-bf16-llama-4ranks", "pipeline-bf16-llama-tied-2ranks"]


def loaded(directory: Path) -> dict[str, torch.Tensor]:
    """What transformers makes of a directory; nothing may be missing, surplus or of another shape."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", output_loading_info=True
    )
    assert {kind: names for kind, names in info.items() if names} == {}
    return dict(model.state_dict())


@pytest.mark.parametrize("name", NAMED)
def test_transformers_loads_what_the_live_engine_held(name: str, tmp_path: Path) -> None:
    case = Case(LAYOUTS / name)
    consolidate(case.path, tmp_path / "out", config=case.directory / "hf")
    state = loaded(tmp_path / "out")
    assert set(state) == set(case.model)
    for tensor, truth in case.model.items():
        assert_same(state[tensor], truth, tensor)


@pytest.mark.parametrize("name", NUMBERED)
def test_a_pipeline_becomes_the_model_that_its_key_map_names(name: str, tmp_path: Path) -> None:
    case = Case(LAYOUTS / name)
    hf, rules = case.directory / "hf", case.directory / "key_map.json"
    consolidate(case.path, tmp_path / "out", config=hf, key_map=rules)
    state = loaded(tmp_path / "out")
    names = {"3.weight": "model.norm.weight", "0.weight": "model.embed_tokens.weight"}
    names |= {
        "4.weight": "lm_head.weight",
        "tied_modules.embed.weight": "model.embed_tokens.weight",
    }
    for tensor, truth in case.model.items():
        number, _, rest = tensor.partition(".")
        new = names.get(tensor) or f"model.layers.{int(number) - 1}.{rest}"
        assert_same(state[new], truth, tensor)
        assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"]) == (
            "tied" in name
        )


def test_masters_of_a_tensor_parallel_run_are_written_in_fp32(tmp_path: Path) -> None:
    case = Case(LAYOUTS / "autotp-zero2-bf16-qwen2-4ranks")
    consolidate(case.path, tmp_path / "out", config=case.directory / "hf", dtype="fp32")
    written: dict[str, Any] = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == set(case.masters)
    for tensor, truth in case.masters.items():
        assert_same(written[tensor], truth, tensor)


def test_a_key_map_is_recorded_with_the_output(tmp_path: Path) -> None:
    case = Case(LAYOUTS / "pipeline-zero0-fp32-llama-2ranks")
    rules = case.directory / "key_map.json"
    consolidate(case.path, tmp_path / "out", weights_only=True, key_map=rules)
    manifest = json.loads((tmp_path / "out" / "ckpt_tools_manifest.json").read_text())
    assert manifest["options"]["key_map"] == json.loads(rules.read_text())
    assert "model.layers.1.mlp.up_proj.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_a_pipeline_without_a_key_map_is_told_of_it(tmp_path: Path) -> None:
    case = Case(LAYOUTS / "pipeline-zero1-bf16-llama-4ranks")
    with pytest.raises(UsageError, match="--key-map FILE"):
        consolidate(case.path, tmp_path / "out", config=case.directory / "hf")


@pytest.mark.parametrize("content", ["", "[]", '{"0.weight": 3}'])
def test_a_file_that_is_no_key_map_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"key map|the rule"):
        consolidate(
            LAYOUTS / NUMBERED[0] / "checkpoint", tmp_path / "out", weights_only=True, key_map=path
        )
