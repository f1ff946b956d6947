"""Safetensors files: what the real writer wrote is found, and what the format forbids is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tools.errors import CkptError, DamagedCheckpoint, UnsupportedLayout
from ckpt_tools.readers.containers.safetensors_file import read_safetensors
from tests.readers.containers.test_torch_file import ZOO
from tests.support.readers.contract import assert_same

SAVED = {kind: tensor.detach().clone().contiguous() for kind, tensor in ZOO.items()}
Header = dict[str, Any]


def test_every_tensor_of_the_zoo_is_found(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(SAVED, path, metadata={"format": "pt"})
    file = read_safetensors(path)
    assert set(file.tensors) == set(SAVED)
    assert file.size == path.stat().st_size
    assert file.metadata == {"format": "pt"}
    for kind, truth in SAVED.items():
        assert_same(file.tensors[kind].load(), truth, kind)


def test_tensors_come_in_the_order_in_which_they_lie(tmp_path: Path) -> None:
    path = write(tmp_path, {"z": ("U8", [1], [0, 1]), "a": ("U8", [2], [1, 3])}, bytes(3))
    assert list(read_safetensors(path).tensors) == ["z", "a"]


def test_a_file_without_tensors_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({}, path)
    assert load_file(path) == {}
    assert read_safetensors(path).tensors == {}


def write(tmp_path: Path, entries: Header | str, data: bytes) -> Path:
    """A file with a header of our choosing; an entry is dtype, shape and offsets, or whatever is given."""
    header = entries
    if isinstance(entries, dict):
        header = json.dumps(
            {
                name: dict(zip(("dtype", "shape", "data_offsets"), entry, strict=True))
                if isinstance(entry, tuple)
                else entry
                for name, entry in entries.items()
            }
        )
    assert isinstance(header, str)
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header.encode()).to_bytes(8, "little") + header.encode() + data)
    return path


def refusal(path: Path) -> CkptError:
    with pytest.raises(CkptError) as caught:
        read_safetensors(path)
    assert caught.value.path == path
    return caught.value


FORBIDDEN: dict[str, Header] = {
    "a hole at the start": {"a": ("F32", [1], [4, 8])},
    "a hole between": {"a": ("U8", [2], [0, 2]), "b": ("U8", [4], [4, 8])},
    "bytes left over": {"a": ("F32", [1], [0, 4])},
    "an overlap": {"a": ("F32", [1], [0, 4]), "b": ("U8", [6], [2, 8])},
    "the same bytes twice": {"a": ("F32", [2], [0, 8]), "b": ("F32", [2], [0, 8])},
    "half of the bytes twice": {"a": ("F32", [1], [0, 4]), "b": ("F32", [1], [0, 4])},
    "beyond the end": {"a": ("F32", [4], [0, 16])},
    "more bytes than the shape": {"a": ("F32", [1], [0, 8])},
    "fewer bytes than the shape": {"a": ("F32", [3], [0, 8])},
    "offsets the wrong way round": {"a": ("U8", [0], [8, 0])},
    "negative offsets": {"a": ("U8", [16], [-8, 8])},
    "a negative size": {"a": ("U8", [-8], [0, 8])},
    "two negative sizes": {"a": ("U8", [-2, -4], [0, 8])},
    "a size that is a text": {"a": ("U8", ["8"], [0, 8])},
    "a size that is a fraction": {"a": ("U8", [8.0], [0, 8])},
    "a shape that is a number": {"a": ("U8", 8, [0, 8])},
    "three offsets": {"a": ("U8", [8], [0, 4, 8])},
    "offsets that are texts": {"a": ("U8", [8], ["0", "8"])},
    "no offsets": {"a": {"dtype": "U8", "shape": [8]}},
    "no shape": {"a": {"dtype": "U8", "data_offsets": [0, 8]}},
    "an entry that is a short list": {"a": ["U8", [8]]},
    "an entry that is null": {"a": None},
}


@pytest.mark.parametrize("kind", FORBIDDEN)
def test_what_the_format_forbids_is_refused(kind: str, tmp_path: Path) -> None:
    error = refusal(write(tmp_path, FORBIDDEN[kind], bytes(8)))
    assert isinstance(error, DamagedCheckpoint)
    assert error.exit_code == 4
    assert error.hint == "The file is truncated or damaged. Copy or download it anew."


def test_the_tensor_that_does_not_fit_is_named(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, FORBIDDEN["a hole between"], bytes(8)))
    assert error.tensor == "b"


@pytest.mark.parametrize("dtype", ["F8_E8M7", "", None, [], "f32"])
def test_a_dtype_that_is_not_known_is_refused_and_shown(dtype: Any, tmp_path: Path) -> None:
    error = refusal(write(tmp_path, {"a": (dtype, [8], [0, 8])}, bytes(8)))
    if isinstance(dtype, str):
        assert isinstance(error, UnsupportedLayout)
        assert error.fact == f"unknown dtype {dtype!r}"
        assert error.tensor == "a"


@pytest.mark.parametrize(
    "header", ["[]", "null", "7", '{"a": ', "", "not json", "[" * 100_000, '{"a":' * 100_000]
)
def test_a_header_that_is_no_mapping_is_refused(header: str, tmp_path: Path) -> None:
    error = refusal(write(tmp_path, header, b""))
    assert isinstance(error, DamagedCheckpoint)
    assert error.fact.startswith("not a complete safetensors file (header: ")


@pytest.mark.parametrize(
    "data",
    [b"", b"\0\0\0", bytes(8), b"\xff" * 8, b"\xff" * 64, (1 << 40).to_bytes(8, "little") + b"{}"],
)
def test_a_length_that_the_file_does_not_have_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    assert isinstance(refusal(path), DamagedCheckpoint)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.int64)}, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert isinstance(refusal(path), DamagedCheckpoint), size


def test_a_file_with_a_byte_too_many_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3)}, path)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"\0")
    assert refusal(path).fact == f"its header describes {size:,} bytes, the file has {size + 1:,}"


def test_a_file_that_cannot_be_opened_says_why(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "gone.safetensors").fact
