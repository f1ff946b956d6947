"""The JSON Schemas of docs/ describe what commands print and write, over real outputs of many fixtures."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_consolidate import run
from tests.conftest import FIXTURES
from tests.support.docs.blocks import ROOT

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: make venv")

SCHEMAS = sorted((ROOT / "docs").glob("*.schema.json"))
ZERO = FIXTURES / "zero"
PLAIN = ZERO / "zero2-bf16-llama-3ranks"
INTERVAL = ["interval", "--step-time", "12s", "--save-time", "90s", "--steps", "200", "--mtbf"]


@cache
def validator(name: str) -> Any:
    schema = json.loads((ROOT / "docs" / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def complaints(value: Any, name: str) -> list[str]:
    return [
        f"{error.json_path}: {error.message[:300]}" for error in validator(name).iter_errors(value)
    ]


def printed(*words: object) -> Any:
    """What a command prints with ``--json``."""
    return json.loads(run(*words, "--json").stdout)


def checkpoints() -> Iterator[Path]:
    """A checkpoint of every kind of fixture: one of each folder in three, and every shape of DeepSpeed's."""
    for kind in sorted(FIXTURES.iterdir()):
        found = sorted(kind.glob("*/checkpoint"))
        yield from found[:: 1 if kind.name == "layouts" else 3]


def test_what_inspect_prints() -> None:
    seen = 0
    for path in checkpoints():
        value = printed("inspect", path)
        # Several checkpoints to choose from are an error, and so is what is no checkpoint.
        assert not complaints(value, "error" if "error" in value else "inspect"), path
        seen += "error" not in value
    assert seen > 40


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["consolidate", PLAIN / "checkpoint", "{}", "--weights-only"],
        ["consolidate", PLAIN / "checkpoint", "{}", "--weights-only", "--dry-run"],
        [
            "consolidate",
            PLAIN / "checkpoint",
            "{}",
            "--config",
            PLAIN / "hf",
            "--max-shard-size",
            "2KB",
        ],
        [
            "consolidate",
            PLAIN / "checkpoint",
            "{}",
            "--weights-only",
            "--weights",
            "model",
            "--sha256",
        ],
        [
            *("average", PLAIN / "checkpoint", PLAIN / "truth" / "model.safetensors"),
            *("{}", "--weights-only"),
        ],
        [
            *("extract-lora", FIXTURES / "peft" / "zero2-olmo2-two-adapters" / "checkpoint", "{}"),
            *("--adapter", "all", "--adapter-config"),
            FIXTURES / "peft" / "zero2-olmo2-two-adapters" / "truth" / "adapter",
        ],
        [
            *("merge-lora", FIXTURES / "peft" / "zero2-olmo2-dora" / "checkpoint", "{}"),
            *("--config", FIXTURES / "peft" / "zero2-olmo2-dora" / "hf", "--adapter-config"),
            FIXTURES / "peft" / "zero2-olmo2-dora" / "truth" / "adapter",
        ],
        ["extract-attr", "policy", ZERO / "none", "{}"],
    ],
    ids=lambda words: " ".join(str(word) for word in (words[0], *words[3:]))[:60],
)
def test_what_conversions_print_and_their_manifests(words: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "out"

    value = printed(*(out if word == "{}" else word for word in words))

    assert not complaints(value, "error" if words[0] == "extract-attr" else "conversion")
    manifests = list(out.rglob("ckpt_tools_manifest.json"))
    assert bool(manifests) == (words[0] != "extract-attr" and "--dry-run" not in words)
    for path in manifests:
        assert not complaints(json.loads(path.read_text()), "manifest")
    assert not complaints(printed("verify", out), "verify")


def test_what_diff_prints(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    state = load_file(PLAIN / "truth" / "model.safetensors")
    first, second, third, fourth, *_ = state
    state[first] = torch.full_like(state[first], float("nan"))
    state[second] = state[second].half()
    state[third] = torch.zeros(3)
    state["new"] = torch.zeros(())
    del state[fourth]
    save_file(state, tmp_path / "model.safetensors")

    value = printed("diff", PLAIN / "checkpoint", tmp_path / "model.safetensors")

    assert not complaints(value, "diff")
    for key in ("changed", "recast", "reshaped", "added", "removed", "notes"):
        assert value[key], key
    assert not complaints(printed("diff", PLAIN / "checkpoint", PLAIN / "checkpoint"), "diff")
    assert not complaints(printed("diff", PLAIN / "checkpoint", tmp_path / "gone"), "error")


@pytest.mark.parametrize(
    "more",
    [
        ["9h"],
        ["9h", "--every", "7", "--keep", "3", "--checkpoint-size", "140GB"],
        ["9h", "--from", PLAIN / "checkpoint", "--restart-time", "5m"],
        ["1s"],
    ],
    ids=["plain", "disk", "measured", "for ever"],
)
def test_what_interval_prints(more: list[Any]) -> None:
    assert not complaints(printed(*INTERVAL, *more), "interval")


def test_what_verify_prints(tmp_path: Path) -> None:
    value = printed("verify", PLAIN / "truth", PLAIN / "hf", tmp_path / "gone")

    assert not complaints(value, "verify")
    assert [held["unchecked"] is None for held in value["directories"]] == [True, True, False]


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.name)
def test_a_schema_refuses_what_is_not_promised(path: Path) -> None:
    """A further key, and the lack of each key that is required, at the top of each object."""
    name = path.name.removesuffix(".schema.json")
    schema = json.loads(path.read_text())
    assert schema["additionalProperties"] is False
    assert any("not allowed" in text or "unexpected" in text for text in complaints({"x": 1}, name))
    found = complaints({}, name)
    assert sum("required" in text for text in found) == len(schema["required"])


def test_every_schema_is_named_by_a_page() -> None:
    pages = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    for path in SCHEMAS:
        assert f"({path.name})" in pages, path.name


def test_a_report_with_a_wrong_value_is_refused() -> None:
    value = printed("inspect", PLAIN / "checkpoint")
    for key, wrong in (
        ("step", "3"),
        ("trained", {"tensors": 1}),
        ("problems", [3]),
        ("files", -1),
    ):
        broken = copy.deepcopy(value)
        broken[key] = wrong
        assert complaints(broken, "inspect"), key
