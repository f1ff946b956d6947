"""A format is one module: a made-up one, dropped among the readers, works with everything."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ckpt_tools import average, consolidate, inspect, open_checkpoint, readers
from ckpt_tools.errors import DamagedCheckpoint, NotACheckpoint, UsageError
from tests.conftest import FIXTURES
from tests.conversion.test_end_to_end import bits, different, written

LIVE = FIXTURES / "zero" / "zero3-bf16-olmo2-chat-2ranks"

# What somebody would add: `cabinet.json` says in which drawers each tensor lies.
READER = '''
"""Cabinets: raw bytes in drawers, and a list of what lies where."""

import json

from ckpt_tools.tensors.catalogue import FlatRange, Fragment, Stored
from ckpt_tools.tensors.checkpoint import Checkpoint, Location, Weight
from ckpt_tools.tensors.dtypes import BY_NAME

NAME = "cabinet"


def find(path, tag=None):
    return [Location(NAME, path, path.name, (path,))] if (path / "cabinet.json").is_file() else []


def read(location):
    contents = json.loads((location.directory / "cabinet.json").read_text())
    weights = {}
    for name, entry in contents["tensors"].items():
        fragments = [
            Fragment(location.directory / drawer, offset, FlatRange(start, stop))
            for drawer, offset, start, stop in entry["drawers"]
        ]
        shape = tuple(entry["shape"])
        stored = Stored(BY_NAME[entry["dtype"]], shape, fragments)
        weights[name] = Weight("parameter", shape, BY_NAME[entry["trained_in"]], master=stored)
    return Checkpoint(
        location=location,
        title="Cabinet",
        weights=weights,
        ties={},
        files={path: path.stat().st_size for path in location.directory.iterdir()},
        step=contents["step"],
        world_size=contents["drawers"],
        framework="joinery 1.0",
    )
'''


def masters() -> dict[str, torch.Tensor]:
    """What a real run held, and a tensor of each awkward kind."""
    return load_file(LIVE / "truth" / "masters.safetensors") | {
        "extra.scalar": torch.tensor(1.0),
        "extra.empty": torch.empty(0, 3),
        "extra.count": torch.tensor([7, -7]),
    }


def trained() -> dict[str, torch.Tensor]:
    """The same in the dtypes of training, as the live engine had them where there was one."""
    live = load_file(LIVE / "truth" / "model.safetensors")
    return {name: live.get(name, tensor) for name, tensor in masters().items()}


def make_cabinet(directory: Path, *, drawers: int = 3) -> Path:
    """Cut each tensor among drawers, whose first bytes are somebody else's."""
    directory.mkdir()
    contents = [bytearray(b"wood" * (i + 1)) for i in range(drawers)]
    entries, model = {}, trained()
    for name, tensor in masters().items():
        data, size, places = bits(tensor).numpy().tobytes(), tensor.element_size(), []
        for i, drawer in enumerate(contents):
            start, stop = tensor.numel() * i // drawers, tensor.numel() * (i + 1) // drawers
            places.append((f"drawer-{i}", len(drawer), start, stop))
            drawer += data[start * size : stop * size]
        entries[f"module.{name}"] = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "trained_in": str(model[name].dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "drawers": places,
        }
    for i, drawer in enumerate(contents):
        (directory / f"drawer-{i}").write_bytes(drawer)
    listing = {"step": 12, "drawers": drawers, "tensors": entries}
    (directory / "cabinet.json").write_text(json.dumps(listing))
    return directory


@pytest.fixture
def cabinet(tmp_path: Path) -> Path:
    return make_cabinet(tmp_path / "cabinet")


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The module lies among the readers, in a directory of its own that belongs to their package."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "cabinets.py").write_text(READER)
    monkeypatch.setattr(readers, "__path__", [*readers.__path__, str(tmp_path / "more")])
    readers.readers.cache_clear()
    yield
    readers.readers.cache_clear()
    del sys.modules["ckpt_tools.readers.cabinets"]
    del readers.cabinets  # type: ignore[attr-defined]


def test_without_the_module_it_is_no_checkpoint(cabinet: Path) -> None:
    with pytest.raises(NotACheckpoint):
        open_checkpoint(cabinet)


@pytest.mark.usefixtures("added")
def test_it_is_opened_and_read_without_being_named(cabinet: Path) -> None:
    checkpoint = open_checkpoint(cabinet)

    assert checkpoint.title == "Cabinet"
    assert (
        different(
            {name.removeprefix("module."): checkpoint[name].load() for name in checkpoint},
            masters(),
        )
        == []
    )


@pytest.mark.usefixtures("added")
def test_it_is_inspected(cabinet: Path) -> None:
    found = inspect(cabinet)

    assert (found.format, found.title, found.framework) == ("cabinet", "Cabinet", "joinery 1.0")
    assert (found.step, found.world_size) == (12, 3)
    assert found.training_dtype == "bfloat16"
    assert found.parameters == sum(tensor.numel() for tensor in masters().values())
    assert found.problems == ()


@pytest.mark.usefixtures("added")
def test_it_is_consolidated(cabinet: Path, tmp_path: Path) -> None:
    report = consolidate(cabinet, tmp_path / "auto", weights_only=True)
    consolidate(
        cabinet, tmp_path / "keep", weights_only=True, dtype="keep", source_format="cabinet"
    )

    assert (report.source, report.step, report.world_size) == ("Cabinet", 12, 3)
    assert different(written(tmp_path / "auto"), trained()) == []
    assert different(written(tmp_path / "keep"), masters()) == []


@pytest.mark.usefixtures("added")
def test_other_commands_work_on_it_too(cabinet: Path, tmp_path: Path) -> None:
    """The mean with itself, halves being exact, and a part of it."""
    average([cabinet, cabinet], tmp_path / "mean", dtype="fp32", weights_only=True)
    consolidate(cabinet, tmp_path / "part", attribute="model", weights_only=True)

    floating = {n: t.float() if t.is_floating_point() else t for n, t in masters().items()}
    assert different(written(tmp_path / "mean"), floating) == []
    part = {n.removeprefix("model."): t for n, t in trained().items() if n.startswith("model.")}
    assert different(written(tmp_path / "part"), part) == []


@pytest.mark.usefixtures("added")
def test_damage_to_it_is_damage(cabinet: Path, tmp_path: Path) -> None:
    """Of a hole in what it says, of what is not as it says, and of a file that is too short."""
    whole = json.loads((cabinet / "cabinet.json").read_text())
    name = "module.lm_head.weight"

    def refusal(entry: dict[str, object]) -> str:
        tensors = whole["tensors"] | {name: whole["tensors"][name] | entry}
        (cabinet / "cabinet.json").write_text(json.dumps(whole | {"tensors": tensors}))
        with pytest.raises(DamagedCheckpoint) as caught:
            consolidate(cabinet, tmp_path / "out", weights_only=True)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    assert "its fragments hold" in refusal({"drawers": whole["tensors"][name]["drawers"][:2]})
    assert "its metadata does not have the form of cabinet" in refusal({"dtype": "float33"})
    (cabinet / "drawer-2").write_bytes((cabinet / "drawer-2").read_bytes()[:-1000])
    assert "the file ends" in refusal({})


@pytest.mark.usefixtures("added")
def test_the_formats_to_choose_from_include_it(cabinet: Path) -> None:
    with pytest.raises(UsageError, match=r"--source-format with one of: .*cabinet, .*deepspeed"):
        open_checkpoint(cabinet, source_format="wardrobe")


@pytest.mark.slow
def test_the_command_line_needs_the_one_file_and_no_edit(cabinet: Path, tmp_path: Path) -> None:
    """A copy of the package with one file more."""
    package = Path(readers.__file__).parents[1]
    copy = tmp_path / "site" / "ckpt_tools"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "readers" / "cabinets.py").write_text(READER)

    def run(*arguments: object) -> dict[str, object]:
        done = subprocess.run(
            [sys.executable, "-m", "ckpt_tools", *map(str, arguments), "--json"],
            env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert isinstance(told, dict)
        return told

    assert run("inspect", cabinet)["title"] == "Cabinet"
    assert run("consolidate", cabinet, tmp_path / "out", "--weights-only")["source"] == "Cabinet"
    assert different(written(tmp_path / "out"), trained()) == []
