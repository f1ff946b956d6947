"""The PEFT fixtures, and checkpoints of adapted models made on the spot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import FIXTURES

PREFIX = "base_model.model."
CASES = sorted(p.parent.name for p in (FIXTURES / "peft").glob("*/facts.json"))


def facts(case: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FIXTURES / "peft" / case / "facts.json").read_text())
    return found


def files(directory: Path) -> dict[str, bytes]:
    """Every file by its path."""
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


def files_but_manifests(directory: Path) -> dict[str, bytes]:
    """Every file but the manifests, of which there is one beside each file of weights."""
    found = files(directory)
    manifests = {path for path in found if Path(path).name == "ckpt_tools_manifest.json"}
    weights = {path for path in found if path.endswith(".safetensors")}
    assert sorted(Path(p).parent for p in manifests) == sorted(Path(p).parent for p in weights)
    return {path: content for path, content in found.items() if path not in manifests}


@contextmanager
def base_in_place(case: str, scratch: Path) -> Iterator[None]:
    """Work where the base that the adapter's config names is a directory, as when PEFT saved it."""
    config = json.loads((FIXTURES / "peft" / case / "hf/config.json").read_text())
    config["vocab_size"] = facts(case)["resized_from"] or config["vocab_size"]
    (scratch / "base").mkdir()
    (scratch / "base/config.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(scratch)
        yield


def lora_state(
    *, rows: int = 6, columns: int = 5, rank: int = 2, modules: tuple[str, ...] = ("q_proj",)
) -> dict[str, torch.Tensor]:
    """A state of adapted matrices and one that is not."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    state = {PREFIX + "norm.weight": random(columns)}
    for module in modules:
        name = PREFIX + f"layers.0.{module}"
        state[f"{name}.base_layer.weight"] = random(rows, columns)
        state[f"{name}.lora_A.default.weight"] = random(rank, columns)
        state[f"{name}.lora_B.default.weight"] = random(rows, rank)
    return state


def write_checkpoint(
    directory: Path, state: dict[str, torch.Tensor], config: dict[str, Any] | None = None
) -> Path:
    """A checkpoint that is a file of weights, with an adapter's config beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def adapter_config(**changes: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "owner/base",
    } | changes


def base_directory(case: str, directory: Path) -> Path:
    """The base of a fixture with the values that it was trained with, under plain names."""
    source = FIXTURES / "peft" / case
    state = load_file(source / "truth/model.safetensors")
    plain = {
        name.removeprefix(PREFIX).replace(".base_layer", ""): value
        for name, value in state.items()
        if "lora_" not in name
    }
    directory.mkdir()
    save_file(plain, directory / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(source / "hf/config.json", directory / "config.json")
    return directory
