"""Files of ``torch.save`` that are laid out before they are written: torch and zipfile read them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tools.errors import UnsupportedLayout
from ckpt_tools.readers.containers.weight_files import read_weight_files
from ckpt_tools.tensors.catalogue import Catalogue, Stored
from ckpt_tools.tensors.dtypes import BY_NAME
from ckpt_tools.writing.bytes import Outputs, lay_out, write
from ckpt_tools.writing.closing import close_files
from ckpt_tools.writing.layout import Plan, plan
from ckpt_tools.writing.torch_container import Archive, archive
from ckpt_tools.writing.units import Units

# Every dtype that torch has a storage class for, and those that it writes beside an untyped storage.
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.float8_e5m2, torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool),
]


def zoo() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = {
        f"of.{str(dtype).removeprefix('torch.')}": torch.randint(0, 2, (3, 5)).to(dtype)
        for dtype in DTYPES
    }
    found |= {
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "one": torch.ones(1, dtype=torch.int8),
        "odd": torch.randn(7, 3, 1),
        "weiß.名": torch.randn(64),
        "long": torch.randn(5000),
    }
    return found


def source(directory: Path, tensors: dict[str, torch.Tensor], ties: dict[str, str]) -> Catalogue:
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    held = read_weight_files(directory / "model.safetensors").tensors
    return Catalogue({name: held[name] for name in tensors}, ties)


def written(layout: Plan, directory: Path, *, workers: int = 2, block: int = 4096) -> None:
    directory.mkdir()
    lay_out(layout, directory)
    layout.__dict__["block_bytes"] = block
    units = Units(layout)
    with Outputs(layout, directory) as outputs:
        write(units, outputs, [range(len(units))], workers=workers)
    close_files(layout, directory, workers)


def test_torch_loads_what_was_saved(tmp_path: Path) -> None:
    tensors = zoo()
    written(
        plan(source(tmp_path / "s", tensors, {"second": "odd"}), format="bin"), tmp_path / "out"
    )
    path = tmp_path / "out" / "pytorch_model.bin"

    for options in ({}, {"mmap": True}):
        found = torch.load(path, weights_only=True, **options)
        assert list(found) != [] and found.keys() == tensors.keys() | {"second"}
        for name, truth in tensors.items():
            assert (found[name].dtype, found[name].shape) == (truth.dtype, truth.shape), name
            assert found[name].stride() == truth.stride()
            one, other = (t.reshape(-1).view(torch.uint8) for t in (found[name], truth))
            assert torch.equal(one, other), name
        assert found["second"].data_ptr() == found["odd"].data_ptr()
        assert type(found) is dict and not any(t.requires_grad for t in found.values())
    with zipfile.ZipFile(path) as archived:
        assert archived.testzip() is None
        assert {info.date_time[:3] for info in archived.infolist()} == {(1980, 1, 1)}


def test_our_reader_finds_every_tensor_aligned_and_every_tie(tmp_path: Path) -> None:
    written(plan(source(tmp_path / "s", zoo(), {"second": "odd"}), format="bin"), tmp_path / "out")
    held = read_weight_files(tmp_path / "out" / "pytorch_model.bin")

    assert held.tensors.keys() == zoo().keys()
    assert held.ties == {"second": "odd"}
    offsets = [f.offset for tensor in held.tensors.values() for f in tensor.fragments]
    assert offsets and all(offset % 64 == 0 for offset in offsets)


def test_torch_itself_lays_out_the_same_records(tmp_path: Path) -> None:
    """The names and contents of all records that torch writes too are those that torch writes."""
    tensors = zoo()
    written(plan(source(tmp_path / "s", tensors, {}), format="bin"), tmp_path / "out")
    torch.save(tensors, tmp_path / "pytorch_model.bin")

    with (
        zipfile.ZipFile(tmp_path / "out" / "pytorch_model.bin") as ours,
        zipfile.ZipFile(tmp_path / "pytorch_model.bin") as theirs,
    ):
        assert set(ours.namelist()) < set(theirs.namelist())
        for name in set(ours.namelist()) - {"pytorch_model/data.pkl"}:
            assert ours.read(name) == theirs.read(name), name


def test_the_bytes_do_not_depend_on_workers_and_blocks(tmp_path: Path) -> None:
    tensors = source(tmp_path / "s", zoo(), {"second": "odd"})
    found = set()
    for number, (workers, block) in enumerate([(1, 1 << 20), (3, 64), (2, 1000)]):
        layout = plan(tensors, format="bin", max_shard_size=9000)
        out = tmp_path / f"out{number}"
        written(layout, out, workers=workers, block=block)
        found.add(tuple(p.read_bytes() for p in sorted(out.iterdir())))
        assert {p.name for p in out.glob("*.bin")} == {
            f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)
        }
    assert len(found) == 1


def test_a_file_without_tensors_is_an_empty_dict(tmp_path: Path) -> None:
    written(plan({}, format="bin"), tmp_path / "out")

    assert torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True) == {}


def sparse(path: Path, header: bytes, closing: Archive) -> None:
    with path.open("wb") as stream:
        stream.truncate(closing.size)
        stream.write(header)
        for offset, content in closing.parts([0] * len(closing.ranges)):
            stream.seek(offset)
            stream.write(content)


def test_records_and_files_over_4_gib_are_read_by_torch_and_zipfile(tmp_path: Path) -> None:
    """Sparse files: sizes and places need 64 bits, and the data is holes."""
    path, gib = tmp_path / "large.bin", 1 << 30
    layouts = {
        "small": (BY_NAME["int8"], (3,)),
        "large": (BY_NAME["int8"], (5, gib)),
        "after": (BY_NAME["bfloat16"], (7,)),
    }
    header, starts, closing = archive("large", layouts, {})
    sparse(path, header, closing)
    with path.open("r+b") as stream:
        stream.seek(starts["after"])
        stream.write(b"\x80\x3f" * 7)
        stream.seek(starts["large"] + 5 * gib - 1)
        stream.write(b"\x07")

    assert path.stat().st_blocks * 512 < 1 << 20
    found = torch.load(path, weights_only=True, mmap=True)
    assert found["large"].shape == (5, gib) and found["large"][4, -1] == 7
    assert torch.equal(found["after"], torch.ones(7, dtype=torch.bfloat16))
    with zipfile.ZipFile(path) as archived:
        sizes = {info.filename: info.file_size for info in archived.infolist()}
        assert sizes["large/data/1"] == 5 * gib
    held = read_weight_files(path).tensors
    assert [f.offset for f in held["after"].fragments] == [starts["after"]]


@pytest.mark.slow
def test_more_records_than_16_bits_count(tmp_path: Path) -> None:
    path = tmp_path / "many.bin"
    layouts = {f"t{number}": (BY_NAME["int8"], (1,)) for number in range(66_000)}
    header, _, closing = archive("many", layouts, {})
    sparse(path, header, closing)

    assert len(torch.load(path, weights_only=True, mmap=True)) == 66_000
    with zipfile.ZipFile(path) as archived:
        assert len(archived.infolist()) == 66_003


def test_a_dtype_that_is_not_written_is_refused() -> None:
    tensor = Stored(BY_NAME["complex32"], (0,), ())
    with pytest.raises(UnsupportedLayout, match="complex32"):
        plan({"x": tensor}, format="bin")


def test_safetensors_are_as_before(tmp_path: Path) -> None:
    tensors = source(tmp_path / "s", zoo(), {"second": "odd"})
    written(plan(tensors), tmp_path / "out")

    assert load_file(tmp_path / "out" / "model.safetensors").keys() == zoo().keys()
