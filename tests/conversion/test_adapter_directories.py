"""A directory that PEFT wrote, as the checkpoint of the commands that adapters have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tools import average, consolidate, extract_lora, inspect, merge_lora, verify
from ckpt_tools.analysis.inspection import Group
from ckpt_tools.errors import MissingAsset, NotACheckpoint
from tests.support.adapted import base_directory

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapter(fixtures: Path, tmp_path: Path) -> Path:
    """PEFT's own directory, with a base on this machine."""
    base_directory("zero3-olmo2-lora", tmp_path / "base")
    truth = fixtures / "peft/zero3-olmo2-lora/truth/adapter"
    (tmp_path / "checkpoint-9").mkdir()
    for file in truth.iterdir():
        (tmp_path / "checkpoint-9" / file.name).write_bytes(file.read_bytes())
    _name_base(tmp_path / "checkpoint-9", str(tmp_path / "base"))
    return tmp_path / "checkpoint-9"


def _name_base(adapter: Path, base: str) -> None:
    path = adapter / "adapter_config.json"
    config: dict[str, Any] = json.loads(path.read_bytes())
    path.write_text(json.dumps({**config, "base_model_name_or_path": base}))


def test_extract_lora_casts_it_and_names_its_base(adapter: Path, tmp_path: Path) -> None:
    extract_lora(adapter, tmp_path / "out", dtype="fp16", base_model="owner/name")
    before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value.half()) for name, value in before.items())
    config = json.loads((tmp_path / "out/adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == "owner/name"


def test_extract_lora_leaves_out_what_peft_does_not_read(adapter: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    head = "base_model.model.lm_head."
    tensors |= {
        f"{head}weight": torch.ones(2, 2),
        f"{head}modules_to_save.weight": torch.ones(2, 2),
        f"{head}original_module.weight": torch.zeros(2, 2),
    }
    save_file(tensors, adapter / WEIGHTS)
    extract_lora(adapter, tmp_path / "out")
    after = load_file(tmp_path / "out" / WEIGHTS)
    assert {name for name in after if name.startswith(head)} == {f"{head}weight"}


def test_merge_lora_takes_the_base_that_its_config_names(adapter: Path, tmp_path: Path) -> None:
    merge_lora(adapter, tmp_path / "out")
    merge_lora(tmp_path / "base", tmp_path / "named", adapter_dir=adapter)
    merge_lora(adapter, tmp_path / "given", base=tmp_path / "base")
    merged = load_file(tmp_path / "named/model.safetensors")
    for out in ("out", "given"):
        found = load_file(tmp_path / out / "model.safetensors")
        assert found.keys() == merged.keys()
        assert all(torch.equal(found[name], value) for name, value in merged.items())


def test_merge_lora_of_a_state_without_its_base_takes_it_too(
    fixtures: Path, tmp_path: Path
) -> None:
    case = fixtures / "peft/zero3-olmo2-lora-frozen-excluded"
    config = json.loads((case / "truth/adapter/adapter_config.json").read_bytes())
    config["base_model_name_or_path"] = str(case / "base")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    options: Any = {"adapter_config": tmp_path, "config": case / "hf"}
    merge_lora(case / "checkpoint", tmp_path / "out", **options)
    merge_lora(case / "checkpoint", tmp_path / "given", base=case / "base", **options)
    ours, theirs = (load_file(tmp_path / out / "model.safetensors") for out in ("out", "given"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_base_of_the_hub_is_asked_for(adapter: Path, tmp_path: Path) -> None:
    _name_base(adapter, "owner/name")
    with pytest.raises(MissingAsset, match="an adapter without its base") as raised:
        merge_lora(adapter, tmp_path / "out")
    assert "--base DIR" in str(raised.value.hint)


def test_commands_for_models_name_the_command_for_adapters(adapter: Path, tmp_path: Path) -> None:
    for refused in (
        lambda: consolidate(adapter, tmp_path / "out"),
        lambda: average([adapter, adapter], tmp_path / "out"),
    ):
        with pytest.raises(NotACheckpoint, match="an adapter that PEFT saved") as raised:
            refused()
        assert "merge-lora BASE OUT --adapter-dir" in str(raised.value.hint)
        assert f"extract-lora {adapter} OUT" in str(raised.value.hint)
    extract_lora(adapter, tmp_path / "out", dtype="fp32", base_model="org/base")


@pytest.mark.slow
def test_its_tokenizer_is_one_that_transformers_4_reads_too(
    adapter: Path, fixtures: Path, tmp_path: Path
) -> None:
    hf = fixtures / "zero/zero3-bf16-olmo2-chat-2ranks/hf"
    problems = []
    for out, compat in (("5", None), ("4", "transformers-4")):
        extract_lora(adapter, tmp_path / out, tokenizer=hf, compat=compat)
        found = verify(tmp_path / out, readers=("transformers-4",)).problems
        problems.append([each.kind for each in found if each.kind.startswith("transformers-4")])
    assert problems == [["transformers-4-refuses"], []]
    assert (tmp_path / "4/tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()


def test_inspect_describes_an_adapter(adapter: Path) -> None:
    found = inspect(adapter)
    state = load_file(adapter / WEIGHTS)
    elements = sum(value.numel() for value in state.values())
    assert (found.title, found.problems) == ("PEFT adapter", ())
    assert found.adapters == {"default": Group(len(state), elements, elements * 2)}
    assert found.attributes == {}
    (adapter / WEIGHTS).write_bytes(b"short")
    assert WEIGHTS in inspect(adapter).problems[0]


@pytest.mark.parametrize("option", ["like", "base"])
def test_a_directory_without_weights_is_refused_by_the_name_of_its_option(
    option: str, adapter: Path, fixtures: Path, tmp_path: Path
) -> None:
    hf = fixtures / "peft/zero3-olmo2-lora/hf"
    ways: dict[str, Callable[[Path], Any]] = {
        "like": lambda named: consolidate(tmp_path / "base", tmp_path / "out", like=named),
        "base": lambda named: merge_lora(adapter, tmp_path / "out", base=named),
    }
    with pytest.raises(MissingAsset, match=f"--{option} names a directory without weights"):
        ways[option](hf)
    ways[option](tmp_path / "base")
    _name_base(adapter, str(hf))
    with pytest.raises(
        MissingAsset, match="the adapter's config names a directory without weights"
    ):
        merge_lora(adapter, tmp_path / "other")
