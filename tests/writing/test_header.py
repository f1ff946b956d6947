"""What safetensors cannot read is never written."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from ckpt_tools.errors import DamagedCheckpoint, UnsupportedLayout
from ckpt_tools.tensors.catalogue import Stored
from ckpt_tools.tensors.dtypes import FLOAT32
from ckpt_tools.writing import header
from ckpt_tools.writing.header import file_header

TOO_LARGE = [(1 << 70, 0), (0, 1 << 70), (1 << 40, 1 << 40, 0), (1 << 63, 0)]


@pytest.mark.parametrize("shape", TOO_LARGE)
def test_a_shape_that_no_library_can_load_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedLayout, match="cannot hold the shape") as caught:
        file_header({"a": (FLOAT32, shape)}, {})
    assert caught.value.tensor == "a"
    with pytest.raises(DamagedCheckpoint, match="no tensor can have the shape"):
        Stored(FLOAT32, shape, [])


@pytest.mark.parametrize("shape", [(True,), (2.0,), (-1, 0), ("2",)])
def test_sizes_are_whole_numbers(shape: tuple[int, ...]) -> None:
    with pytest.raises(DamagedCheckpoint, match="no tensor can have the shape"):
        Stored(FLOAT32, shape, [])


@pytest.mark.parametrize(
    "shape", [(), (0,), (0, 1 << 40, 1 << 40), ((1 << 63) - 1, 0), (1 << 31, 1 << 31, 0), (0, 0, 7)]
)
def test_every_other_empty_shape_is_read_by_the_library(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    text, _ = file_header({"a": (FLOAT32, shape)}, {"format": "pt"})
    path = tmp_path / "x.safetensors"
    path.write_bytes(text + bytes(4 if shape == () else 0))

    with safe_open(path, "pt") as opened:
        assert tuple(opened.get_tensor("a").shape) == shape


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"])
def test_a_name_that_the_format_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedLayout):
        file_header({name: (FLOAT32, (1,))}, {})


def test_a_header_over_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "_MAX_HEADER", 100)

    with pytest.raises(UnsupportedLayout, match="the header of a file would have"):
        file_header({f"a{i}": (FLOAT32, (1,)) for i in range(10)}, {})
