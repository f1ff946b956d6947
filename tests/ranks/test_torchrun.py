"""Any number of ranks and machines writes the same bytes, whatever the checkpoint's format."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import ckpt_tools
from tests.conftest import FIXTURES
from tests.support.outputs import contents
from tests.support.ranks.launching import (
    DRIVER,
    ended,
    free_port,
    launch,
    needs_namespaces,
    start,
)

CHAT = FIXTURES / "zero" / "zero3-bf16-olmo2-chat-2ranks"


@dataclass(frozen=True)
class Source:
    """A checkpoint, and which machine of two holds which of its files."""

    name: str
    checkpoint: Path
    second: Callable[[str], bool]
    limit: str = "8KB"

    def options(self) -> dict[str, Any]:
        """Without a config: asking for its model takes longest, and is the first rank's alone."""
        return {"max_shard_size": self.limit, "workers": 2, "weights_only": True}


def fixture(kind: str, name: str, second: Callable[[str], bool]) -> Source:
    return Source(name, FIXTURES / kind / name / "checkpoint", second)


ZERO = [
    fixture("zero", "zero1-bf16-llama-2ranks", lambda name: "pp_rank_1" in name),
    fixture("zero", "zero2-bf16-llama-3ranks", lambda name: "pp_rank_0" not in name),
    fixture("zero", CHAT.name, lambda name: "pp_rank_1" in name),
]
DCP = [
    fixture("dcp", "fsdp2-model-3ranks", lambda name: name.startswith("__1")),
    fixture("dcp", "fsdp-tp-4ranks", lambda name: name == ".metadata"),
    # Compressed: every rank unpacks what it needs.
    fixture("dcp", "zstd-2ranks", lambda name: name.startswith("__1")),
]
FEW, MANY = "three-tensors", "three-thousand-tensors"


def tensors_of(name: str) -> dict[str, torch.Tensor]:
    """Some 24 MB, in tensors of very different sizes."""
    if name == FEW:
        shapes = [(3000, 2000), (7,), (0, 5)]
    else:
        shapes = [(1 + 37 * i % 4001,) for i in range(3000)]
    values = torch.arange(1, 1 + sum(map(math.prod, shapes)), dtype=torch.float32)
    parts = torch.split(values, list(map(math.prod, shapes)))
    return {f"t{i}": part.view(s) for i, (part, s) in enumerate(zip(parts, shapes, strict=True))}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """ZeRO 1, 2, 3, DCP, and a directory of safetensors shards."""
    shards = tmp_path_factory.mktemp("shards") / "model"
    ckpt_tools.consolidate(
        CHAT / "checkpoint", shards, config=CHAT / "hf", max_shard_size="20KB", card=False
    )
    made = [Source("safetensors", shards, lambda name: name.startswith("model-00002"))]
    for name in (FEW, MANY):
        (shards.parent / name).mkdir()
        save_file(tensors_of(name), shards.parent / name / "model.safetensors", {"format": "pt"})
        made.append(Source(name, shards.parent / name, bool, "9MB"))
    return [*ZERO, *DCP, *made]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, sources: list[Source]) -> Path:
    """What one process writes of each."""
    out = tmp_path_factory.mktemp("alone")
    for source in sources:
        ckpt_tools.consolidate(source.checkpoint, out / source.name, **source.options())
    return out


def cases(sources: list[Source], out: Path, path: Path, **options: object) -> Path:
    """The conversions as the driver reads them."""
    listed = [
        {
            "function": "consolidate",
            "arguments": [str(source.checkpoint), str(out / source.name)],
            "options": {**source.options(), **options},
        }
        for source in sources
    ]
    path.write_text(json.dumps(listed))
    return path


def others(sources: list[Source]) -> dict[str, tuple[str, list[Any]]]:
    """A mean of two checkpoints, and one that is named by its file."""
    at = {source.name: source.checkpoint for source in sources}
    mean = [at[ZERO[0].name], at[ZERO[1].name]]
    return {
        "mean": ("average", [mean]),
        "file": ("consolidate", [at[FEW] / "model.safetensors"]),
    }


def json_ready(argument: Any) -> Any:
    return json.loads(json.dumps(argument, default=str))


def assert_same(out: Path, alone: Path, sources: list[Source]) -> None:
    assert sorted(path.name for path in out.iterdir()) == sorted(s.name for s in sources)
    for source in sources:
        assert contents(out / source.name) == contents(alone / source.name), source.name


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_the_number_of_ranks(
    sources: list[Source], alone: Path, tmp_path: Path
) -> None:
    ranks = 3
    script = cases(sources, tmp_path / "out", tmp_path / "cases.json")

    done = launch([DRIVER, script], ranks=ranks)

    assert done.status == 0, done.stdout + done.stderr
    assert "error" not in done.stdout, done.stdout
    assert_same(tmp_path / "out", alone, sources)
    reports = [line.split(": ", 1)[1] for line in done.stdout.splitlines() if "rank " in line]
    assert len(reports) == ranks * len(sources)
    assert len(set(reports)) == len(sources), "every rank returns the same report"
    for name in (FEW, MANY):
        wrote = shares(done.stdout, [source.name for source in sources].index(name))
        total = sum(tensor.nbytes for tensor in tensors_of(name).values())
        assert len(wrote) == ranks
        assert sum(wrote) == total
        assert max(wrote) - min(wrote) < 0.05 * total / ranks, wrote


def shares(said: str, case: int) -> list[int]:
    """Bytes that each rank wrote of a case."""
    found: dict[str, list[int]] = {}
    for line in said.splitlines():
        if line.startswith("share "):
            _, rank, nbytes = line.split()
            found.setdefault(rank, []).append(int(nbytes))
    return [counts[case] for counts in found.values()]


@pytest.fixture(scope="module", params=["shared", "node-local"])
def two_machines(
    request: pytest.FixtureRequest,
    sources: list[Source],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, str]:
    """What two machines of two ranks write, from one file system or each from its own."""
    base = tmp_path_factory.mktemp("machines")
    out, port = base / "out", free_port()
    if request.param == "shared":
        script = cases(sources, out, base / "cases.json")
        nodes = [
            start([DRIVER, script], ranks=2, nodes=2, node=node, port=port) for node in range(2)
        ]
    else:
        # Every checkpoint at one path, where each machine has its own files only.
        seen = base / "seen"
        seen.mkdir()
        for node in range(2):
            for source in sources:
                copy = base / f"disk{node}" / source.name
                shutil.copytree(source.checkpoint, copy)
                for path in copy.rglob("*"):
                    if path.is_file() and source.second(path.name) != bool(node):
                        path.unlink()
        moved = [replace(s, checkpoint=seen / s.name) for s in sources]
        script = cases(moved, out, base / "cases.json", node_local=True)
        listed = json.loads(script.read_text()) + [
            {"function": name, "arguments": [*map(json_ready, arguments), str(out / kind)]}
            | {"options": {"weights_only": True, "node_local": True}}
            for kind, (name, arguments) in others(moved).items()
        ]
        script.write_text(json.dumps(listed))
        nodes = [
            start(
                [DRIVER, script],
                ranks=2,
                nodes=2,
                node=node,
                port=port,
                binds={base / f"disk{node}": seen},
            )
            for node in range(2)
        ]
    for done in map(ended, nodes):
        assert done.status == 0, done.stdout + done.stderr
        assert "error" not in done.stdout, done.stdout
    return out, request.param


@pytest.mark.slow
@needs_namespaces
def test_two_machines_write_the_same_bytes(
    two_machines: tuple[Path, str], sources: list[Source], alone: Path, tmp_path: Path
) -> None:
    out, kind = two_machines
    if kind == "shared":
        assert_same(out, alone, sources)
        return
    # Read under another path, which manifest, card and tokenizer search know; the weights are the same.
    for source in sources:
        ours, theirs = contents(out / source.name), contents(alone / source.name)
        weights = {name for name in theirs if name.startswith("model") or name == "config.json"}
        assert {name: ours[name] for name in weights} == {name: theirs[name] for name in weights}
        tensors = [json.loads(c["ckpt_tools_manifest.json"])["tensors"] for c in (ours, theirs)]
        assert tensors[0] == tensors[1]
    for name, (function, arguments) in others(sources).items():
        getattr(ckpt_tools, function)(*arguments, tmp_path / name, weights_only=True)
        file = "model.safetensors"
        assert (out / name / file).read_bytes() == (tmp_path / name / file).read_bytes()


@pytest.mark.slow
def test_the_command_line_under_torchrun_prints_once(tmp_path: Path) -> None:
    options: list[str | Path] = [tmp_path / "out", "--config", CHAT / "hf", "--json"]
    done = launch(["-m", "ckpt_tools", "consolidate", CHAT / "checkpoint", *options], ranks=2)

    assert done.status == 0, done.stderr
    assert json.loads(done.stdout)["tensors"] == 25
    ckpt_tools.consolidate(CHAT / "checkpoint", tmp_path / "alone", config=CHAT / "hf")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


@pytest.mark.slow
def test_adapters_merges_and_means_are_shared_too(tmp_path: Path) -> None:
    lora = FIXTURES / "zero" / "zero2-bf16-olmo2-lora-2ranks"
    pair = [CHAT / "checkpoint", CHAT / "checkpoint"]
    calls: list[tuple[str, list[Any], dict[str, Any]]] = [
        ("extract_lora", [lora / "checkpoint"], {"base_model": "base", "lora_alpha": 16}),
        ("merge_lora", [lora / "checkpoint"], {"lora_alpha": 16, "weights_only": True}),
        ("average", [pair], {"weights_only": True}),
    ]
    listed = []
    for name, arguments, options in calls:
        getattr(ckpt_tools, name)(*arguments, tmp_path / "alone" / name, **options)
        texts = json.loads(json.dumps([arguments, options], default=str))
        out = str(tmp_path / "out" / name)
        listed.append({"function": name, "arguments": [*texts[0], out], "options": texts[1]})
    (tmp_path / "cases.json").write_text(json.dumps(listed))

    done = launch([DRIVER, tmp_path / "cases.json"], ranks=3)

    assert done.status == 0, done.stdout + done.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
