"""Directories of a quantiser: a weight is plain or it is codes, and never both."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ckpt_tools.verification import verify
from tests.conftest import FIXTURES
from tests.support.verification.directories import (
    SINGLE,
    Damage,
    edit_json,
    edit_state,
    kinds,
    save_llama,
)

NAME = "model.layers.0.mlp.up_proj"
STORED = sorted((FIXTURES / "quantised").glob("[!q]*/model.safetensors"))


def _quantizer(directory: Path) -> None:
    edit_json(directory / "config.json", lambda c: c.update(quantization_config={"bits": 4}))


def leave_sides(directory: Path) -> None:
    """What merging into a quantised base left before."""
    _quantizer(directory)

    def add(state: dict[str, torch.Tensor]) -> None:
        state[f"{NAME}.weight.absmax"] = torch.ones(4)
        state[f"{NAME}.weight.quant_state.bitsandbytes__nf4"] = torch.ones(4, dtype=torch.uint8)
        state["model.layers.0.mlp.down_proj.qweight"] = torch.ones(4, 4, dtype=torch.int32)
        # Codes of another weight, so that the quantiser is in use.
        del state["model.layers.0.mlp.gate_proj.weight"]
        state["model.layers.0.mlp.gate_proj.qweight"] = torch.ones(4, 4, dtype=torch.int32)

    edit_state(directory / SINGLE, add)


def _dtype_of_codes(directory: Path) -> None:
    """What copying codes of 8-bit floats wrote before."""
    _quantizer(directory)
    edit_json(directory / "config.json", lambda c: c.update(dtype="float8_e4m3fn"))


DAMAGES = [
    Damage("config-dtype", _dtype_of_codes, save_llama, also=frozenset({"quantizer-unused"})),
    Damage("quantizer-leftover", leave_sides, save_llama),
    Damage("quantizer-unused", _quantizer, save_llama, severity="warning"),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
def test_damage_is_found(damage: Damage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage.must_be_found(tmp_path, monkeypatch)


@pytest.mark.parametrize("stored", STORED, ids=lambda path: path.parent.name)
def test_what_a_quantiser_stored_is_no_leftover_until_its_weight_is_plain(
    stored: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(stored.parent, tmp_path / "model")
    edit_json(directory / "config.json", lambda c: c.update(model_type="llama"))
    truth = load_file(directory / "truth.safetensors")
    (directory / "truth.safetensors").unlink()
    assert not kinds(verify(directory)) & {"quantizer-leftover", "quantizer-unused"}

    edit_state(directory / SINGLE, lambda state: state.update(truth))

    assert "quantizer-leftover" in kinds(verify(directory))
