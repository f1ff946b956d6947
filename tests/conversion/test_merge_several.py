"""Several adapters with weights, merged at once: what PEFT's add_weighted_adapter and a merge make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ckpt_tools import merge_lora
from ckpt_tools.errors import MissingAsset, UnsupportedLayout, UsageError


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)
        self.conv = nn.Conv1d(6, 4, 3)


# The second adapter has other targets than the first.
TARGETS = {"default": ["embed", "up", "conv"], "second": ["embed", "up", "down"]}


def _adapted(tmp_path: Path, ranks: tuple[int, int], **config: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model: Any = _Model()
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    first, second = (
        LoraConfig(r=rank, lora_alpha=5, target_modules=targets, **config)
        for rank, targets in zip(ranks, TARGETS.values(), strict=True)
    )
    adapted = get_peft_model(model, first)
    adapted.add_adapter("second", second)
    for name, value in adapted.named_parameters():
        if "lora_" in name:
            value.data = torch.randn_like(value)
    adapted.save_pretrained(str(tmp_path / "adapters"))
    (tmp_path / "run").mkdir()
    state = {name: value.clone() for name, value in adapted.state_dict().items()}
    save_file(state, tmp_path / "run/model.safetensors", metadata={"format": "pt"})
    return adapted


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -0.5)], ids=["both", "taken-away"])
@pytest.mark.parametrize(
    ("how", "ranks"), [("cat", (2, 3)), ("linear", (2, 2))], ids=["cat", "linear"]
)
def test_they_are_combined_as_peft_does(
    how: Any, ranks: tuple[int, int], weights: tuple[float, float], tmp_path: Path
) -> None:
    adapted = _adapted(tmp_path, ranks)
    text = ",".join(f"{n}={w:g}" for n, w in zip(TARGETS, weights, strict=True))
    options: Any = {"adapter": text, "combination": how, "weights_only": True}
    adapters = tmp_path / "adapters"
    report = merge_lora(tmp_path / "base", tmp_path / "out", adapter_dir=adapters, **options)
    merge_lora(tmp_path / "run", tmp_path / "live", adapter_config=adapters, **options)

    adapted.add_weighted_adapter([*TARGETS], [*weights], "both", combination_type=how)
    theirs = adapted.merge_and_unload(adapter_names=["both"]).state_dict()
    ours = load_file(tmp_path / "out/model.safetensors")
    live = load_file(tmp_path / "live/model.safetensors")
    assert ours.keys() == theirs.keys() == live.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5)
        assert torch.equal(ours[name], live[name]), name
    assert any(f"combined as PEFT's '{how}'" in note for note in report.notes)


def test_rslora_adds_the_updates_and_pefts_own_does_not(tmp_path: Path) -> None:
    """PEFT keeps ``use_rslora`` in the config of the combined adapter, so its scale is sqrt(r) and not 1."""
    adapted = _adapted(tmp_path, (1, 3), use_rslora=True)
    # Powers of two are exact in every sum and product but that with the scales.
    for name, value in adapted.named_parameters():
        if "lora_" in name:
            value.data = torch.full_like(value, 0.5)
    adapted.save_pretrained(str(tmp_path / "adapters"))
    options: Any = {"adapter": "default=1,second=2", "weights_only": True}
    report = merge_lora(
        tmp_path / "base", tmp_path / "out", adapter_dir=tmp_path / "adapters", **options
    )
    assert any("larger by sqrt(r)" in note for note in report.notes)

    base = load_file(tmp_path / "base/model.safetensors")["up.weight"].double()
    # Each update is alpha / sqrt(r) times r products of 0.25.
    update = 1 * 5 / 1**0.5 * 1 * 0.25 + 2 * 5 / 3**0.5 * 3 * 0.25
    ours = load_file(tmp_path / "out/model.safetensors")["up.weight"].double()
    torch.testing.assert_close(ours, base + update, rtol=0, atol=1e-5)

    adapted.add_weighted_adapter([*TARGETS], [1.0, 2.0], "both", combination_type="cat")
    theirs = adapted.merge_and_unload(adapter_names=["both"]).state_dict()["up.weight"].double()
    torch.testing.assert_close(theirs, base + 2 * update, rtol=0, atol=1e-5)


def _refused(error: type[Exception], match: str, tmp_path: Path, **options: Any) -> Any:
    with pytest.raises(error, match=match) as raised:
        merge_lora(
            tmp_path / "base",
            tmp_path / "out",
            adapter_dir=tmp_path / "adapters",
            weights_only=True,
            **{"adapter": "default=0.7,second=0.3", **options},
        )
    assert not (tmp_path / "out").exists()
    return raised.value


def test_what_cannot_be_combined_is_refused(tmp_path: Path) -> None:
    _adapted(tmp_path, (2, 3))
    found = _refused(UsageError, "different ranks at embed", tmp_path, combination="linear")
    assert "--combination cat" in found.hint
    _refused(UsageError, "not an adapter with its weight", tmp_path, adapter="default=x,second=1")
    _refused(UsageError, "not an adapter with its weight", tmp_path, adapter="second=1,second=1")
    found = _refused(
        MissingAsset, "holds no adapter 'third'", tmp_path, adapter="default=1,third=1"
    )
    assert found.hint == "It holds: default, second."


def test_dora_is_not_combined(tmp_path: Path) -> None:
    _adapted(tmp_path, (2, 2), use_dora=True)
    found = _refused(UnsupportedLayout, "'default' is not plain LoRA", tmp_path)
    assert "one adapter after the other" in found.hint


@pytest.mark.parametrize("config", [{"modules_to_save": ["down"]}, {"bias": "lora_only"}], ids=str)
def test_what_replaces_the_base_is_not_combined(config: dict[str, Any], tmp_path: Path) -> None:
    """A directory holds it under a name of the base, and the sum of the updates would leave it out."""
    from peft import LoraConfig, get_peft_model

    model: Any = _Model()
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["up"], **config))
    adapted.save_pretrained(str(tmp_path / "adapters"))
    found = _refused(UnsupportedLayout, "'default' is not plain", tmp_path, adapter="default=0.5")
    assert "one adapter after the other" in found.hint
