"""A save from memory is the directory that a conversion of the framework's own checkpoint makes.

Under real torchrun, with real frameworks: each case trains two steps, saves itself in both ways, and the two
are compared byte for byte in another process.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import ckpt_tools
from tests.support.outputs import contents
from tests.support.ranks.launching import ended, start
from tests.support.training.frameworks import ENVIRONMENT

MANIFEST = "ckpt_tools_manifest.json"

# test_side_by_side compares further cases with the saves of open-instruct.
TWO_RANKS = [
    "fsdp2:small",
    "ddp:small",
    "zero3:policy_and_value",
    "zero3:qwen3_tied",
    "fsdp2:policy_and_value",
    "fsdp2:qwen3_tied",
    "fsdp2:buffers",
    "ddp:olmo2_chat",
    "ddp:olmo2_lora",
    "fsdp1-flat:qwen3_tied",
    # What Accelerate sets for the whole process comes last.
    "accelerate:olmo2_chat",
    "accelerate-zero2:olmo2_lora",
    "accelerate-zero3:olmo2_chat",
    "accelerate-fsdp1:llama",
    "accelerate-fsdp1-bf16:llama",
    "accelerate-fsdp2:olmo2_chat",
]
# Hardly any tensor divides by three.
THREE_RANKS = [
    "zero0:llama:fp32",
    "zero0-flat:llama:fp32",
    "zero1-bf16-optimizer:llama:fp32",
    "zero2:llama:fp32",
    "zero2-round-robin:llama:fp32",
    "zero3:buffers",
    "zero3:llama:fp32",
    "zero3:llama:keep",
    "zero3-fp32:llama",
    "zero3-offload:llama:fp32",
    "zero3:olmo2_lora_fp32_adapter",
    "ddp:buffers",
    "fsdp1:llama",
    "fsdp2:llama:bf16",
]
FOUR_RANKS = ["hsdp:llama", "fsdp-tp:two_heads"]
ALONE = ["alone:olmo2_chat", "alone:policy_and_value", "alone:olmo2_lora", "compiled:llama"]


def trained(factory: pytest.TempPathFactory, name: str, ranks: int, cases: list[str]) -> Path:
    """Train and save every case in one torchrun, of whichever process of the tests comes first."""
    root = factory.getbasetemp()
    out = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / f"training-{name}"
    done = out.with_suffix(".done")
    with FileLock(out.with_suffix(".lock")):
        if not done.exists():
            command = ["-m", "tests.support.training.worker", str(out), *cases]
            run = ended(start(command, ranks=ranks, environment=ENVIRONMENT))
            assert run.status == 0, run.stdout + run.stderr
            done.touch()
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory, "two", 2, TWO_RANKS)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory, "three", 3, THREE_RANKS)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory, "four", 4, FOUR_RANKS)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory, "alone", 1, ALONE)


def converted(case: Path) -> Path:
    """What a conversion makes of the framework's own checkpoint."""
    options: dict[str, Any] = json.loads((case / "options.json").read_text())
    hf, out = case / "hf", case / "converted"
    if (hf / "config.json").exists():
        options["config"] = hf
    if (hf / "tokenizer.json").exists():
        options["tokenizer"] = hf
    if "adapter" in options:
        ckpt_tools.extract_lora(case / "checkpoint", out, adapter_config=hf, **options)
    else:
        ckpt_tools.consolidate(case / "checkpoint", out, **options)
    return out


def check(case: Path) -> None:
    """The save and the conversion are alike; the manifest alone says where each is from."""
    save, conversion = contents(case / "live"), contents(converted(case))
    manifests = [json.loads(files.pop(MANIFEST)) for files in (save, conversion)]
    assert save == conversion
    for manifest in manifests:
        manifest["tensors"] = {
            n: (t["file"], t["xxh3_128"]) for n, t in manifest["tensors"].items()
        }
        for key in ("sources", "request", "xxh3_128"):
            del manifest[key]
    assert manifests[0] == manifests[1]
    assert not list(case.glob("live.partial-*"))


@pytest.mark.slow
@pytest.mark.parametrize("case", TWO_RANKS)
def test_two_ranks(two: Path, case: str) -> None:
    check(two / case.replace(":", "-"))


@pytest.mark.slow
@pytest.mark.parametrize("case", THREE_RANKS)
def test_three_ranks(three: Path, case: str) -> None:
    check(three / case.replace(":", "-"))


@pytest.mark.slow
@pytest.mark.parametrize("case", FOUR_RANKS)
def test_four_ranks(four: Path, case: str) -> None:
    check(four / case.replace(":", "-"))


@pytest.mark.slow
@pytest.mark.parametrize("case", ALONE)
def test_a_process_alone(alone: Path, case: str) -> None:
    check(alone / case.replace(":", "-"))
