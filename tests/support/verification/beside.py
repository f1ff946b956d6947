"""Directories beside the checkpoints that they were made of, and the comparison of the two."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ckpt_tools import open_checkpoint
from ckpt_tools.errors import counted
from ckpt_tools.transforms.recipe import Json
from ckpt_tools.verification.against import check_against
from ckpt_tools.verification.directory import Directory, list_directory
from ckpt_tools.verification.layout import read_weights
from ckpt_tools.verification.problem import KINDS, Findings
from tests.conftest import FIXTURES

ZERO, PEFT = FIXTURES / "zero", FIXTURES / "peft"
PLAIN = ZERO / "zero2-bf16-llama-3ranks"
TIED = ZERO / "zero3-bf16-qwen3-tied-2ranks"
SAVES = ZERO / "zero2-bf16-llama-two-saves-2ranks"
DORA = PEFT / "zero2-olmo2-dora"
EXPERTS = PEFT / "zero2-qwen3-moe-experts"
MANIFEST = "ckpt_tools_manifest.json"
SINGLE = "model.safetensors"
UP = "model.layers.0.mlp.up_proj.weight"


def read(directory: Path) -> Directory:
    """A directory whose headers are read, as `verify` reads it."""
    found = list_directory(directory, Findings())
    read_weights(found, Findings())
    return found


def against(directory: Path, checkpoint: Any, **options: Any) -> Findings:
    findings = Findings()
    check_against(read(directory), checkpoint, findings, **options)
    assert all(problem.kind in KINDS for problem in findings.problems)
    return findings


def told(findings: Findings) -> set[tuple[str, str | None]]:
    return {(problem.kind, problem.tensor) for problem in findings.problems}


def good(findings: Findings, tensors: int) -> bool:
    """Everything was compared, and nothing differs."""
    (checked,) = findings.checked
    assert not findings.problems, findings.problems
    assert not findings.skipped, findings.skipped
    assert checked.startswith(f"{counted(tensors, 'tensor')} against ")
    return checked.endswith(", bit for bit")


def written(directory: Path, state: Mapping[str, torch.Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(dict(state), directory / SINGLE, metadata={"format": "pt"})
    return directory


def record(
    directory: Path,
    recipes: Mapping[str, Json],
    *sources: Path,
    weights: str = "master",
    **more: Any,
) -> Path:
    """A manifest, as far as a comparison reads it."""
    listed = []
    for path in sources:
        opened = open_checkpoint(path)
        location = opened.location
        listed.append(
            {
                "path": str(location.directory),
                "format": location.format,
                "name": location.name,
                "part": location.part,
                "step": opened.step,
            }
        )
    tensors = {
        name: {"file": SINGLE} if recipe == name else {"file": SINGLE, "from": recipe}
        for name, recipe in recipes.items()
    }
    content = {
        "version": 1,
        "sources": listed,
        "options": {"weights": weights},
        "versions": {"torch": torch.__version__.partition("+")[0]},
        "tensors": tensors,
    }
    (directory / MANIFEST).write_text(json.dumps(content | more))
    return directory


def casts(names: Sequence[str]) -> dict[str, Json]:
    return {name: {"op": "cast", "of": name, "dtype": "bfloat16"} for name in names}


def mean_of_two(directory: Path) -> Path:
    paths = [SAVES / "checkpoint" / tag for tag in ("global_step2", "global_step4")]
    masters = [
        load_file(SAVES / d / "masters.safetensors") for d in ("truth-global_step2", "truth")
    ]
    state, recipes = {}, {}
    for name, first in masters[0].items():
        total = first.double() * 0.3 + masters[1][name].double() * 0.7
        state[name] = total.float().bfloat16()
        of: Json = [name, {"op": "stored", "source": 1, "name": name}]
        mean: Json = {"op": "mean", "of": of, "weights": [0.3, 0.7]}
        recipes[name] = {"op": "cast", "of": mean, "dtype": "bfloat16"}
    return record(written(directory, state), recipes, *paths)
