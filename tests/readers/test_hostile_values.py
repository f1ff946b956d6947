"""Names, sizes and counts that no tensor has: an error of ours from every reader, and never a traceback."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ckpt_tools import open_checkpoint
from ckpt_tools.analysis.inspection import inspect
from ckpt_tools.errors import CkptError, DamagedCheckpoint
from ckpt_tools.readers.opening import open_weights
from tests.support import damage
from tests.support.hostile import name, value

TENSOR = (
    name("torch._utils", "_rebuild_tensor_v2")
    + b"((X\x07\x00\x00\x00storage"
    + name("torch", "FloatStorage")
    + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQK\x00K\x04\x85K\x01\x85\x89NtR"
)
HUGE = b"\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\x00"
KEYS = {
    "a number": b"K\x05",
    "none": b"N",
    "a truth": b"\x88",
    "a fraction": b"G?\xf8\x00\x00\x00\x00\x00\x00",
    "bytes": b"\x8e\x01\x00\x00\x00\x00\x00\x00\x00a",
    "a tuple": b"K\x01K\x02\x86",
    "an object": name("x", "Y") + b")R",
    "half of a pair": b"X\x03\x00\x00\x00\xed\xa0\x80",
}


def state_dict(path: Path, entries: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(damage.torch_zip(b"\x80\x04}" + entries + b".", {"0": bytes(16)}))
    (path.parent / "config.json").write_text('{"model_type": "llama"}')
    return path


def test_more_experts_than_any_model_has_are_not_enumerated(tmp_path: Path) -> None:
    """In all layers together; a list of a few bytes a layer can state a million in each."""
    save = tmp_path / "global_step1"
    save.mkdir()
    counts = [1 << 20, 1]
    torch.save({"module": {}, "num_experts": counts}, save / "mp_rank_00_model_states.pt")

    with pytest.raises(DamagedCheckpoint, match="it states 1048577 experts"):
        open_checkpoint(save)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("alone", [True, False], ids=["the file", "the directory"])
def test_a_key_of_a_state_dict_that_is_no_name(key: str, alone: bool, tmp_path: Path) -> None:
    path = state_dict(tmp_path / "model" / "pytorch_model.bin", KEYS[key] + TENSOR + b"s")
    named = path if alone else path.parent

    with pytest.raises(CkptError) as caught:
        open_weights(named)

    assert caught.value.exit_code in (3, 4, 5)
    if not alone or key != "the file":
        assert inspect(path.parent).problems


@pytest.mark.parametrize("key", [1, None, (1,), b"w", torch.float32])
def test_a_key_in_a_file_of_a_rank_that_is_no_name(key: object, tmp_path: Path) -> None:
    torch.save({key: torch.ones(1), "w": torch.ones(1)}, tmp_path / "model_world_size_1_rank_0.pt")

    with pytest.raises(DamagedCheckpoint, match="a name in its state dict is not text"):
        open_checkpoint(tmp_path)


def test_a_version_of_a_rank_file_that_is_no_number_is_not_shown(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "model_world_size_1_rank_0.pt")
    (tmp_path / "fsdp_config.json").write_text('{"FSDP_version": ["x"]}')

    assert open_checkpoint(tmp_path).title == "FSDP rank files"


def rebuilt(offset: bytes = b"K\x00", size: bytes = b"K\x04", stride: bytes = b"K\x01") -> bytes:
    head, _, _ = TENSOR.partition(b"QK\x00")
    return head + b"Q" + offset + size + b"\x85" + stride + b"\x85\x89NtR"


@pytest.mark.parametrize("part", ["offset", "size", "stride"])
@pytest.mark.parametrize(
    "odd",
    [b"\x88", b"\x89", b"G?\xf0\x00\x00\x00\x00\x00\x00", b"J\xff\xff\xff\xff", HUGE, b"N", b"]"],
    ids=["true", "false", "fraction", "negative", "huge", "none", "list"],
)
def test_a_number_of_a_tensor_that_is_no_size(part: str, odd: bytes, tmp_path: Path) -> None:
    entries = value("w") + rebuilt(**{part: odd}) + b"s"
    path = state_dict(tmp_path / "model" / "pytorch_model.bin", entries)

    with pytest.raises(DamagedCheckpoint):
        open_weights(path.parent)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**62, 5, 3])
def test_a_length_in_a_legacy_file_that_no_storage_has(length: int, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(4)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    at = len(data) - 16 - 8
    assert data[at : at + 8] == struct.pack("<Q", 4)
    path.write_bytes(data[:at] + struct.pack("<Q", length) + data[at + 8 :])

    with pytest.raises(DamagedCheckpoint, match="shorter than recorded"):
        open_checkpoint(path)


class _Metadata:
    """Writes a ``.metadata`` of DCP with one tensor, of which something is not true."""

    def __init__(self, directory: Path, change: Any) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save({"w": torch.ones(2, 2)}, checkpoint_id=directory, no_dist=True)
        path = directory / ".metadata"
        held = pickle.loads(path.read_bytes())
        change(held)
        path.write_bytes(pickle.dumps(held))


def _entry(held: Any) -> Any:
    return next(iter(held.storage_data.values()))


DCP = {
    "a huge offset": lambda held: setattr(_entry(held), "offset", 1 << 70),
    "an offset that is a truth": lambda held: setattr(_entry(held), "offset", True),
    "a fraction as length": lambda held: setattr(_entry(held), "length", 1.5),
    "a file that is no name": lambda held: setattr(_entry(held), "relative_path", 5),
    "a file elsewhere": lambda held: setattr(_entry(held), "relative_path", "../x"),
    "a transform that is no name": lambda held: setattr(
        _entry(held), "transform_descriptors", [[]]
    ),
    "a name that is no text": lambda held: held.state_dict_metadata.update({5: 1}),
    "half of a pair as name": lambda held: held.state_dict_metadata.update({"\ud800": 1}),
    "a negative size": lambda held: setattr(held.state_dict_metadata["w"], "size", (-2, 2)),
}


@pytest.mark.parametrize("lie", DCP)
def test_dcp_metadata_that_no_save_writes(lie: str, tmp_path: Path) -> None:
    _Metadata(tmp_path, DCP[lie])

    with pytest.raises(DamagedCheckpoint):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("path", [[["a"], "w"], [{"a": 1}], [None], [1.5], (("a",), "w")])
def test_keys_of_a_planner_that_are_no_keys_are_damage(path: Any, tmp_path: Path) -> None:
    _Metadata(tmp_path, lambda held: setattr(held, "planner_data", {"w": path}))

    with pytest.raises(DamagedCheckpoint):
        open_checkpoint(tmp_path)


HEADERS = {
    "a byte-order mark": b'\xef\xbb\xbf{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "a name twice": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "a hole": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
    "a truth as size": b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
    "a fraction as size": b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}',
    "a negative size": b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
    "a huge size": b'{"a":{"dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,4]}}',
    "half of a pair": b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "many digits": b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}',
    "deep lists": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "spaces first": b'  {"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "spaces last": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}   ',
    "a zero byte in a name": b'{"a\\u0000":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
}


@pytest.mark.parametrize("header", HEADERS)
def test_a_safetensors_header_is_judged_as_the_library_judges_it(
    header: str, tmp_path: Path
) -> None:
    text = HEADERS[header]
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    try:
        names = [*load_file(path)]
    except (SafetensorError, RecursionError, UnicodeError):
        with pytest.raises(CkptError):
            open_weights(path)
        return

    assert [*open_weights(path)] == names


@pytest.mark.parametrize(
    "index",
    [
        '{"weight_map": {"a": 5}}',
        '{"weight_map": {"a": null}}',
        '{"weight_map": {"a": "x\\u0000y.safetensors"}}',
        '{"weight_map": {"a": "\\ud800.safetensors"}}',
        '{"weight_map": {"a": "../x.safetensors"}}',
        '{"weight_map": ["a"]}',
        '{"weight_map": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "[" * 100_000,
        "5",
    ],
    ids=range(9),
)
def test_an_index_that_names_no_files(index: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)

    with pytest.raises(CkptError):
        open_weights(tmp_path)
    with pytest.raises(CkptError):
        open_weights(tmp_path / "model.safetensors.index.json")


@pytest.mark.parametrize(
    "files", [["__99999999999.metadata"], ["shard-99999999-model-00001-of-99999999.safetensors"]]
)
def test_names_of_files_with_numbers_that_no_run_has(files: list[str], tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file).write_bytes((2).to_bytes(8, "little") + b"{}")

    with pytest.raises(CkptError):
        open_weights(tmp_path)


@pytest.mark.parametrize("count", [1 << 40, -1, True, 1.5, "4", None])
def test_a_number_of_ranks_that_no_run_has(count: object, tmp_path: Path) -> None:
    directory = damage.copy_of("zero2-bf16-llama-3ranks", tmp_path)
    for path in damage.optim_files(directory):
        damage.edit(path, lambda held: held["optimizer_state_dict"].update(partition_count=count))

    if count is None:  # as in old versions: the model file states it
        open_checkpoint(directory)
        return
    with pytest.raises(DamagedCheckpoint):
        open_checkpoint(directory)
