"""DeepSpeed layouts beyond plain ZeRO become hub directories that hold what the live engines held."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

from ckpt_tools import consolidate
from ckpt_tools.errors import CkptError, UnsupportedLayout, UsageError
from tests.support import damage
from tests.support.readers.contract import FIXTURES, Case, assert_same

LAYOUTS = FIXTURES / "layouts"
# AutoTP that does not record how slices are cut: the shapes of the model say it.
UNRECORDED = "old-0.16.9-autotp-zero1-bf16-llama-2ranks"
NAMED = [
    "wrapped-zero2-bf16-llama-2ranks",
    "universal-zero3-bf16-qwen3-tied-2ranks",
    "universal-zero1-bf16-qwen2-autotp-2ranks",
    "autotp-zero2-bf16-qwen2-4ranks",
    "autotp-zero1-bf16-phi3-fused-2ranks",
    "autoep-zero3-bf16-mixtral-4ranks",
    UNRECORDED,
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


def test_unrecorded_slices_are_joined_by_the_shapes_of_the_model(tmp_path: Path) -> None:
    case = Case(LAYOUTS / UNRECORDED)
    report = consolidate(case.path, tmp_path / "out", config=case.directory / "hf", dtype="fp32")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == set(case.masters)
    for tensor, truth in case.masters.items():
        assert_same(written[tensor], truth, tensor)
    said = "by the shapes of the model: 4 cut by columns, 10 cut by rows, 10 whole on each rank"
    assert any(said in warning for warning in report.warnings)
    with pytest.raises(UnsupportedLayout, match="does not record how its slices are cut"):
        consolidate(case.path, tmp_path / "other", weights_only=True)


def test_the_padding_of_a_vocabulary_is_cut_where_a_key_map_says_so(tmp_path: Path) -> None:
    """Nothing records it; the refusal's next step is followed."""
    case = Case(LAYOUTS / UNRECORDED)
    rows = len(case.model["lm_head.weight"])
    config = json.loads((case.directory / "hf" / "config.json").read_text())
    small, padded, key_map = (tmp_path / name for name in ("small.json", "padded.json", "map.json"))
    small.write_text(json.dumps(config | {"vocab_size": rows - 7}))
    with pytest.raises(UnsupportedLayout, match="the vocabulary is padded") as caught:
        consolidate(case.path, tmp_path / "out", config=small)
    assert f"vocab_size is {rows}." in str(caught.value.hint)

    padded.write_text(json.dumps(config | {"vocab_size": rows}))
    cut = {
        name: {"name": name, "rows": rows - 7}
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    key_map.write_text(json.dumps(cut | {"*": "*"}))
    consolidate(case.path, tmp_path / "out", config=padded, key_map=key_map)
    state = loaded(tmp_path / "out")
    for tensor, truth in case.model.items():
        assert_same(state[tensor], truth[: rows - 7] if tensor in cut else truth, tensor)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == rows - 7


def unrecorded_copy(tmp_path: Path) -> Path:
    copied = tmp_path / "copy"
    shutil.copytree(LAYOUTS / UNRECORDED, copied)
    return copied


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"intermediate_size": 27}, "do not make up"),
        ({"num_hidden_layers": 2}, "the checkpoint lacks"),
        ({"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}, "no tensor of this name"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_slices_are_not_joined_by_the_shapes_of_a_model_that_they_do_not_fit(
    change: dict[str, Any], fact: str, tmp_path: Path
) -> None:
    copied = unrecorded_copy(tmp_path)
    config = copied / "hf" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(CkptError, match=fact):
        consolidate(copied / "checkpoint", tmp_path / "out", config=config)


@pytest.mark.parametrize("weights", ["master", "model"])
def test_a_weight_that_differs_between_tensor_parallel_ranks_is_refused(
    weights: Literal["master", "model"], tmp_path: Path
) -> None:
    """Both with a record of slices and without one."""
    for name in (UNRECORDED, "autotp-zero1-bf16-qwen2-2ranks"):
        copied = tmp_path / name
        shutil.copytree(LAYOUTS / name, copied)
        if weights == "model":
            path = next(copied.rglob("mp_rank_01_model_states.pt"))
            damage.edit(path, lambda c: c["module"]["model.norm.weight"].add_(1))
        else:
            # One file of each kind: the masters of rank 1, and the weight that its engine made of them.
            for path in copied.rglob("*mp_rank_01_optim_states.pt"):
                damage.edit(path, lambda c: _shifted(c["optimizer_state_dict"]))
            path = next(copied.rglob("mp_rank_01_model_states.pt"))
            damage.edit(path, lambda c: c["module"]["model.norm.weight"].add_(1))
        with pytest.raises(UnsupportedLayout, match="hold different values of the same elements"):
            consolidate(
                copied / "checkpoint", tmp_path / "out", config=copied / "hf", weights=weights
            )


def _shifted(state: dict[str, Any]) -> None:
    """Add one to the master of the norm, which is one where the tests begin."""
    for group, mappings in enumerate(state["param_slice_mappings"]):
        address = mappings.get("model.norm.weight")
        if address is not None:
            flat = state["single_partition_of_fp32_groups"][group].data
            flat[address.start : address.start + address.numel] += 1


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
