"""Files of ``torch.save``: the bytes that are found are the tensor's, and nothing else passes."""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tools.errors import CkptError, DamagedCheckpoint, UnsupportedLayout
from ckpt_tools.readers.containers.restricted_pickle import TensorRef
from ckpt_tools.readers.containers.torch_file import TorchFile, stored
from tests.support import damage
from tests.support.readers.contract import assert_same


def bit_pattern(dtype: torch.dtype, count: int) -> torch.Tensor:
    """``count`` elements with every byte another one, whatever they mean in ``dtype``."""
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.arange(1, count * size + 1, dtype=torch.uint8).view(dtype)


BASE = torch.arange(24.0).view(4, 6)
ZOO: dict[str, torch.Tensor] = {
    "0-d": torch.tensor(1.0),
    "empty": torch.empty(0),
    "empty in the middle": torch.empty(3, 0, 2),
    "one element": torch.tensor([[[-0.0]]]),
    "odd count": torch.arange(7, dtype=torch.float16),
    "bfloat16": bit_pattern(torch.bfloat16, 5),
    "float64": bit_pattern(torch.float64, 3),
    "float8_e4m3fn": bit_pattern(torch.float8_e4m3fn, 5),
    "float8_e5m2": bit_pattern(torch.float8_e5m2, 5),
    "int64": bit_pattern(torch.int64, 3),
    "int32": bit_pattern(torch.int32, 3),
    "int16": bit_pattern(torch.int16, 3),
    "int8": bit_pattern(torch.int8, 3),
    "uint8": bit_pattern(torch.uint8, 3),
    "uint16": bit_pattern(torch.uint16, 3),
    "uint32": bit_pattern(torch.uint32, 3),
    "uint64": bit_pattern(torch.uint64, 3),
    "bool": torch.tensor([True, False, True]),
    "complex64": bit_pattern(torch.complex64, 2),
    "a row of a matrix": BASE[2],
    "the rows after the first": BASE[1:],
    "an element of a matrix": BASE[3, 5],
    "a whole matrix that shares": BASE,
    "a parameter": torch.nn.Parameter(torch.arange(3.0)),
    "a name with.dots/and slashes": torch.arange(2.0),
    "NaN with a payload": torch.tensor([0x7FC12345, -1], dtype=torch.int32).view(torch.float32),
    "axes of one": torch.arange(3.0).as_strided((1, 3, 1), (77, 1, 99)),
}
STRIDED: dict[str, torch.Tensor] = {
    "transposed": BASE.t(),
    "a column": BASE[:, 1],
    "every second": torch.arange(8.0)[::2],
    "expanded": torch.tensor([1.0]).expand(3),
    "channels last": torch.zeros(1, 2, 3, 3).contiguous(memory_format=torch.channels_last),
}
CONTAINERS = {"zip": True, "legacy": False}


def save(path: Path, content: Any, *, container: str = "zip") -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=CONTAINERS[container])
    return path


def at_offsets(path: Path, ref: TensorRef) -> torch.Tensor:
    """The bytes at the place that was found, as torch sees them; no reader of ours takes part."""
    assert ref.storage.path == path
    if not ref.numel:
        return torch.empty(ref.shape, dtype=ref.dtype.torch)
    data = path.read_bytes()[ref.byte_offset :][: ref.numel * ref.dtype.itemsize]
    return torch.frombuffer(bytearray(data), dtype=ref.dtype.torch).view(ref.shape)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", ZOO)
def test_the_bytes_at_the_offset_are_the_tensor_that_was_saved(
    kind: str, container: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "x.pt", {kind: ZOO[kind]}, container=container)
    (found,) = TorchFile(path).load().items()
    assert found[0] == kind
    assert found[1].is_contiguous == ZOO[kind].is_contiguous()
    assert_same(at_offsets(path, found[1]), ZOO[kind], kind)


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_whole_zoo_in_one_file(container: str, tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", ZOO, container=container)
    file = TorchFile(path)
    found = file.load()
    assert file.is_zip == (container == "zip")
    assert list(found) == list(ZOO)
    for kind, ref in found.items():
        assert_same(at_offsets(path, ref), ZOO[kind], kind)
        assert_same(stored(ref).load(), ZOO[kind], kind)


@pytest.mark.parametrize("container", CONTAINERS)
def test_tensors_that_share_storage_have_the_same_place(container: str, tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"a": BASE, "b": BASE, "row": BASE[1]}, container=container)
    found = TorchFile(path).load()
    assert found["a"].byte_offset == found["b"].byte_offset
    assert found["row"].byte_offset == found["a"].byte_offset + 6 * 4


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", STRIDED)
def test_a_tensor_that_is_not_one_run_is_read_by_its_strides(
    kind: str, container: str, tmp_path: Path
) -> None:
    assert not STRIDED[kind].is_contiguous()
    path = save(tmp_path / "x.pt", STRIDED[kind], container=container)
    ref = TorchFile(path).load()
    assert not ref.is_contiguous
    assert_same(stored(ref).load(), STRIDED[kind].contiguous(), kind)


def test_an_expanded_tensor_of_any_size_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", torch.zeros(1).expand(1 << 20, 1 << 20))
    with pytest.raises(UnsupportedLayout, match="repeats its elements"):
        stored(TorchFile(path).load())


def test_another_number_of_elements_than_recorded_is_refused(tmp_path: Path) -> None:
    ref = TorchFile(save(tmp_path / "x.pt", torch.arange(6.0))).load()
    assert stored(ref, (2, 3)).load().tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(DamagedCheckpoint, match=r"6 elements, but \(7,\) was recorded"):
        stored(ref, (7,))


def test_objects_beside_tensors_are_read(tmp_path: Path) -> None:
    content = {"step": 3, "args": {"lr": 0.1, "names": ["a", None]}, "w": torch.ones(1)}
    found = TorchFile(save(tmp_path / "x.pt", content)).load()
    assert found.pop("w").numel == 1
    assert found == {"step": 3, "args": {"lr": 0.1, "names": ["a", None]}}


def test_a_file_of_a_stream_and_one_of_a_path_are_the_same_to_us(tmp_path: Path) -> None:
    """torch names the folder in the zip after the file; in a stream it is called archive."""
    stream = io.BytesIO()
    torch.save(torch.arange(3.0), stream)
    path = tmp_path / "renamed.bin"
    path.write_bytes(stream.getvalue())
    assert stored(TorchFile(path).load()).load().tolist() == [0, 1, 2]


# Damage.


def refusal(path: Path) -> CkptError:
    with pytest.raises(CkptError) as caught:
        TorchFile(path).load()
    error = caught.value
    assert error.path == path
    return error


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_file_cut_anywhere_is_refused(container: str, tmp_path: Path) -> None:
    path = save(
        tmp_path / "x.pt", {"a": torch.ones(40), "b": [torch.zeros(3)]}, container=container
    )
    whole = path.read_bytes()
    for size in {*range(0, len(whole), 13), *range(9), *range(len(whole) - 30, len(whole))}:
        path.write_bytes(whole[:size])
        error = refusal(path)
        assert isinstance(error, DamagedCheckpoint), size
        assert error.exit_code == 4


def test_an_empty_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.touch()
    error = refusal(path)
    assert error.fact == "the file is empty"
    assert "Copy it anew" in str(error)


def test_a_file_that_is_not_there_says_so(tmp_path: Path) -> None:
    assert refusal(tmp_path / "x.pt").fact == "cannot be read (No such file or directory)"


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_truncated_file_says_what_to_do(container: str, tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", torch.ones(4000), container=container)
    damage.truncate(path, 9000)
    error = refusal(path)
    assert error.fact.startswith(("not a complete torch file", "storage "))
    assert error.hint == (
        "The file is truncated or was overwritten. Copy it anew from where it was written."
    )


@pytest.mark.parametrize(
    "data", [b"hello, world", b"\x89HDF\r\n\x1a\n" + bytes(100), bytes(4096), b"{}", b"P"]
)
def test_a_file_of_another_kind_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    error = refusal(path)
    assert error.fact == "not a file of torch.save"
    assert error.exit_code == 4


@pytest.mark.parametrize("content", [{"a": 1}, 7, [], None])
def test_a_plain_pickle_is_refused(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps(content))
    assert refusal(path).fact == "a pickle that torch.save did not write"


def test_a_zip_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<xml/>")
    assert refusal(path).fact == "a zip file that torch.save did not write"


def test_a_flipped_bit_in_the_metadata_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"weight": torch.ones(3)})
    damage.flip(path, b"weight")
    error = refusal(path)
    assert "CRC" in error.fact
    assert isinstance(error, DamagedCheckpoint)


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"a": torch.ones(3), "b": torch.zeros(3)})
    damage.repack(path, lambda records: records.pop("data/1"))
    assert refusal(path).fact == "storage 1 is missing"


def test_a_record_that_is_too_short_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"a": torch.ones(3), "b": torch.zeros(3)})
    damage.repack(path, lambda records: records.update({"data/0": bytes(11)}))
    assert refusal(path).fact == "storage 0 is shorter than recorded"


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_records_are_refused(compression: int, tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", torch.ones(3))
    damage.repack(path, lambda records: None, compression)
    error = refusal(path)
    assert isinstance(error, UnsupportedLayout)
    assert error.fact == "its records are compressed; torch.save never does that"
    assert error.hint == "Unpack and repack the file without compression."


def test_one_compressed_storage_is_enough_to_be_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", torch.ones(3))
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            kind = zipfile.ZIP_DEFLATED if "/data/" in name else zipfile.ZIP_STORED
            archive.writestr(name, data, kind)
    assert isinstance(refusal(path), UnsupportedLayout)


def test_an_encrypted_archive_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", torch.ones(3))
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02")  # the central directory begins with data.pkl
    data[entry + 8] |= 1
    data[6] |= 1
    path.write_bytes(data)
    error = refusal(path)
    assert "encrypted" in error.fact
    assert isinstance(error, DamagedCheckpoint)


def test_a_big_endian_zip_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", torch.ones(3))
    damage.repack(path, lambda records: records.update(byteorder=b"big"))
    error = refusal(path)
    assert isinstance(error, UnsupportedLayout)
    assert (error.fact, error.exit_code) == ("written on a big-endian machine", 5)


def test_a_big_endian_legacy_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    system = {"protocol_version": 1001, "little_endian": False, "type_sizes": {}}
    parts: list[Any] = [0x1950A86A20F9469CFC6C, 1001, system, {}, []]
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in parts))
    assert refusal(path).fact == "written on a big-endian machine"


def test_a_zip_of_before_the_byte_order_was_recorded_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", torch.arange(3.0))
    damage.repack(path, lambda records: records.pop("byteorder"))
    assert stored(TorchFile(path).load()).load().tolist() == [0, 1, 2]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
    error = refusal(path)
    assert isinstance(error, UnsupportedLayout)
    assert error.fact == "a TorchScript archive, not a checkpoint"


def test_a_record_that_is_not_where_the_directory_says_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", torch.ones(3))
    data = bytearray(path.read_bytes())
    # The local header of the storage, found through the central directory, loses its signature.
    with zipfile.ZipFile(path) as archive:
        (record,) = (i for i in archive.infolist() if i.filename.endswith("/data/0"))
    data[record.header_offset : record.header_offset + 2] = b"XX"
    path.write_bytes(data)
    ref = TorchFile(path).load()
    with pytest.raises(DamagedCheckpoint, match="header of record x/data/0 is not what"):
        stored(ref)


def test_a_record_header_that_pushes_the_data_over_the_end_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", torch.ones(3))
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        (record,) = (i for i in archive.infolist() if i.filename.endswith("/data/0"))
    struct.pack_into("<H", data, record.header_offset + 28, 0xFFFF)  # length of the extra field
    path.write_bytes(data)
    ref = TorchFile(path).load()
    with pytest.raises(DamagedCheckpoint, match="header of record x/data/0 is not what"):
        stored(ref)


LEGACY_LIES: dict[str, Callable[[list[Any]], Any]] = {
    "no list of storages": lambda parts: parts.__setitem__(4, 7),
    "a storage that nobody uses": lambda parts: parts[4].append("nobody"),
    "a storage left out of the list": lambda parts: parts[4].clear(),
    "a key that cannot be looked up": lambda parts: parts.__setitem__(4, [["x"]]),
}


@pytest.mark.parametrize("lie", LEGACY_LIES)
def test_a_legacy_list_of_storages_that_does_not_fit_is_refused(lie: str, tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", torch.ones(3), container="legacy")
    stream = io.BytesIO(path.read_bytes())
    parts: list[Any] = [pickle.load(stream) for _ in range(3)]
    start = stream.tell()

    for _ in pickletools.genops(stream):  # steps over the pickle with the tensors
        pass
    saved = stream.getvalue()[start : stream.tell()]
    parts += [None, pickle.load(stream)]
    rest = stream.read()
    LEGACY_LIES[lie](parts)
    dumps = [pickle.dumps(part, 2) for part in parts]
    dumps[3] = saved
    path.write_bytes(b"".join(dumps) + rest)
    assert isinstance(refusal(path), DamagedCheckpoint)


def test_a_legacy_storage_with_another_length_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", torch.full((3,), 1.0), container="legacy")
    data = path.read_bytes()
    at = data.rindex(struct.pack("<q", 3) + struct.pack("<f", 1.0))
    path.write_bytes(data[:at] + struct.pack("<q", 2) + data[at + 8 :])
    assert "is shorter than recorded" in refusal(path).fact
