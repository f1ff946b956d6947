"""torchao's quantised tensors, against what torchao's own ``dequantize()`` gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ckpt_tools import consolidate, inspect
from ckpt_tools.errors import UnsupportedLayout
from ckpt_tools.readers.containers.quantised_classes import dequantised
from ckpt_tools.readers.containers.subclasses import plain
from ckpt_tools.readers.containers.torch_file import TorchFile
from tests.support.readers.contract import assert_same

CASE = Path(__file__).resolve().parents[3] / "fixtures" / "torchao" / "quantised-classes"
FILE = CASE / "checkpoint" / "model.pt"
DCP = CASE.parent / "quantised-dcp" / "checkpoint"


@pytest.fixture
def value() -> Any:
    return TorchFile(FILE).load()["int8_groups_bfloat16.weight"]


@pytest.mark.parametrize("path", [FILE, DCP], ids=["file", "dcp"])
def test_the_weights_are_those_that_torchao_dequantises(path: Path, tmp_path: Path) -> None:
    report = consolidate(path, tmp_path / "out", weights_only=True, dtype="keep", verify=True)

    case = path if path.is_dir() else path.parent
    truth = load_file(case.parent / "truth" / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == truth.keys()
    for name, wanted in truth.items():
        assert_same(found[name], wanted, name)
    assert any("quantised by torchao" in warning for warning in report.warnings)


@pytest.mark.parametrize("path", [FILE, DCP], ids=["file", "dcp"])
def test_inspect_finds_nothing_odd(path: Path) -> None:
    assert inspect(path).problems == ()


@pytest.mark.parametrize(
    "change",
    [
        {"act_pre_scale": object()},  # the layer divides its input by it
        {"scale": None},
        {"block_size": [1, 5]},
        {"block_size": [2, 16]},
        {"zero_point": "scale"},
        {"qdata": "scale"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_dequantize_does_not_tell_alone_is_refused_by_its_class(
    value: Any, change: dict[str, Any]
) -> None:
    assert dequantised(value) is not None
    value.state |= {k: value.state["scale"] if v == "scale" else v for k, v in change.items()}
    assert dequantised(value) is None
    with pytest.raises(UnsupportedLayout, match="Int8Tensor") as caught:
        plain(value, FILE, "w")
    assert "dequantize()" in str(caught.value.hint)
