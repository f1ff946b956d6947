"""torch Distributed Checkpoints that are damaged or hostile: refused, with the file and the reason."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dist_checkpoint

from ckpt_tools import inspect, open_checkpoint
from ckpt_tools.errors import CkptError, DamagedCheckpoint, UnsupportedLayout
from ckpt_tools.tensors.deferred import settle
from tests.support import damage, hostile
from tests.support.readers.dcp_case import DCP, copy_of

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata

HEAD = "model.lm_head.weight"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return copy_of("fsdp2-model-3ranks", tmp_path)


def refusal(path: Path) -> CkptError:
    """What reading the checkpoint down to each chunk raises."""
    with pytest.raises(CkptError) as caught:
        settle(open_checkpoint(path).catalogue().values(), workers=2)
    return caught.value


def damaged(path: Path) -> DamagedCheckpoint:
    error = refusal(path)
    assert isinstance(error, DamagedCheckpoint)
    return error


def edit(directory: Path, change: Callable[[Metadata], Any], name: str = ".metadata") -> None:
    """Change the metadata with torch's own classes."""
    path = directory / name
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


# Files.


def test_a_missing_data_file_is_named_before_anything_is_read(directory: Path) -> None:
    (directory / "__1_0.distcp").unlink()
    error = damaged(directory)
    assert (error.path, error.missing) == (directory, ("__1_0.distcp",))
    assert "1 of 3 data files are missing: __1_0.distcp" in error.fact
    assert "every node" in str(error.hint)
    assert "__1_0.distcp" in inspect(directory).problems[0]


def test_a_missing_file_without_weights_is_a_remark(tmp_path: Path) -> None:
    state = {
        "model": {"w": torch.ones(2, 3)},
        "optim": {"state": {"w": {"exp_avg": torch.ones(6)}}},
    }
    writer = dist_checkpoint.FileSystemWriter(tmp_path / "saved", single_file_per_rank=False)
    dist_checkpoint.save(state, storage_writer=writer, no_dist=True)
    (lost,) = [
        p for p in (tmp_path / "saved").glob("*.distcp")
        if torch.load(p, weights_only=True).ndim == 1
    ]  # fmt: skip
    lost.unlink()
    checkpoint = open_checkpoint(tmp_path / "saved")
    assert checkpoint.remarks == (f"missing files without weights: {lost.name}",)
    assert torch.equal(checkpoint["w"].load(), torch.ones(2, 3))


def test_a_truncated_data_file_is_seen_without_reading_it(directory: Path) -> None:
    path = directory / "__2_0.distcp"
    size = path.stat().st_size
    damage.truncate(path, size - 1)
    with pytest.raises(DamagedCheckpoint) as caught:
        open_checkpoint(directory)
    assert caught.value.path == path
    assert f"must have {size:,} bytes and has {size - 1:,}" in caught.value.fact


def test_no_metadata_beside_data_files(directory: Path) -> None:
    (directory / ".metadata").unlink()
    error = damaged(directory)
    assert error.missing == (".metadata",)
    assert "did not finish" in str(error.hint)


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_truncated_metadata(directory: Path, size: int) -> None:
    damage.truncate(directory / ".metadata", size)
    assert damaged(directory).path == directory / ".metadata"


def test_metadata_of_another_kind(directory: Path) -> None:
    (directory / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": {}}))
    assert "not metadata of a torch Distributed Checkpoint" in damaged(directory).fact


def test_a_data_file_of_a_save_of_another_model(directory: Path) -> None:
    other = DCP / "fsdp2-app-2ranks" / "checkpoint" / "__1_0.distcp"
    shutil.copyfile(other, directory / "__1_0.distcp")
    error = damaged(directory)
    assert error.path == directory / "__1_0.distcp"
    assert "another save" in str(error.hint)


def test_a_data_file_that_no_metadata_names_is_a_remark(directory: Path) -> None:
    shutil.copyfile(directory / "__0_0.distcp", directory / "__9_0.distcp")
    checkpoint = open_checkpoint(directory)
    assert checkpoint.remarks == ("data files that are not in the metadata: __9_0.distcp",)
    assert checkpoint.world_size == 3


def test_global_metadata_beside_that_of_ranks(tmp_path: Path) -> None:
    directory = copy_of("no-collectives-2ranks", tmp_path)
    shutil.copyfile(DCP / "awkward-2ranks" / "checkpoint" / ".metadata", directory / ".metadata")
    assert "two saves went to one directory" in damaged(directory).fact


@pytest.mark.parametrize(
    ("rank", "fact"), [(0, "metadata of 1 ranks is missing: __0.metadata"), (1, "fragments hold")]
)
def test_missing_metadata_of_a_rank(tmp_path: Path, rank: int, fact: str) -> None:
    directory = copy_of("no-collectives-2ranks", tmp_path)
    (directory / f"__{rank}.metadata").unlink()
    assert fact in damaged(directory).fact


def test_metadata_of_ranks_of_two_saves(tmp_path: Path) -> None:
    directory = copy_of("no-collectives-2ranks", tmp_path)

    def grow(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata["model.wide.weight"]
        entry.size = torch.Size((entry.size[0] + 1, *entry.size[1:]))  # type: ignore[union-attr]

    edit(directory, grow, "__1.metadata")
    assert "the files belong to different saves" in damaged(directory).fact


# The table of chunks.


def chunks_of(metadata: Metadata) -> list[ChunkStorageMetadata]:
    return metadata.state_dict_metadata[HEAD].chunks  # type: ignore[union-attr]


def drop_chunk(metadata: Metadata) -> None:
    chunks_of(metadata).pop(1)


def double_chunk(metadata: Metadata) -> None:
    chunks_of(metadata).append(chunks_of(metadata)[1])


def grow_chunk(metadata: Metadata) -> None:
    chunk = chunks_of(metadata)[0]
    chunk.sizes = torch.Size((chunk.sizes[0] + 1, *chunk.sizes[1:]))


def resize(metadata: Metadata, rows: int) -> None:
    entry = metadata.state_dict_metadata[HEAD]
    entry.size = torch.Size((entry.size[0] + rows, *entry.size[1:]))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (drop_chunk, "storage_data has a part at (23, 0) that state_dict_metadata lacks"),
        (double_chunk, "leave a hole or overlap"),
        (grow_chunk, "leave a hole or overlap"),
        (lambda metadata: resize(metadata, 1), "fragments hold"),
        (lambda metadata: resize(metadata, -1), "fragments hold"),
    ],
)
def test_chunks_that_do_not_tile_their_tensor(
    directory: Path, change: Callable[[Metadata], None], fact: str
) -> None:
    edit(directory, change)
    error = damaged(directory)
    assert (error.path, error.tensor) == (directory / ".metadata", HEAD)
    assert fact in error.fact


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda chunks: chunks.pop(), "that state_dict_metadata lacks"),
        (lambda chunks: chunks.append(chunks[0]), "two fragments hold the same elements"),
    ],
)
def test_boxes_of_a_mesh_that_do_not_tile_their_tensor(
    tmp_path: Path, change: Callable[[list[ChunkStorageMetadata]], Any], fact: str
) -> None:
    directory = copy_of("fsdp-tp-4ranks", tmp_path)
    name = "model.model.layers.0.mlp.down_proj.weight"
    edit(directory, lambda m: change(m.state_dict_metadata[name].chunks))  # type: ignore[union-attr]
    error = damaged(directory)
    assert (error.tensor, fact in error.fact) == (name, True)


def redirect(metadata: Metadata) -> None:
    """The first part of one norm is where that of another norm is."""
    found = metadata.storage_data
    norms = [i for i in found if "layernorm" in i.fqn and i.index == 0]
    found[norms[0]] = found[norms[1]]


def rename(metadata: Metadata) -> None:
    keys = metadata.planner_data[HEAD]
    metadata.planner_data[HEAD] = ("other", *keys[1:])


def forget_the_keys(metadata: Metadata) -> None:
    del metadata.planner_data[HEAD]


def forget_a_tensor(metadata: Metadata) -> None:
    del metadata.state_dict_metadata[HEAD]


def forget_all_keys(metadata: Metadata) -> None:
    del metadata.planner_data


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (redirect, "are also those of model.model.layers.0"),
        (rename, "do not make up its name"),
        (forget_the_keys, "planner_data and state_dict_metadata do not both have it"),
        (forget_a_tensor, "that state_dict_metadata lacks"),
        (forget_all_keys, "not metadata of a torch Distributed Checkpoint"),
    ],
)
def test_metadata_that_contradicts_itself(
    directory: Path, change: Callable[[Metadata], None], fact: str
) -> None:
    """The file has no checksum: a flipped bit can do each of these."""
    edit(directory, change)
    assert fact in damaged(directory).fact


def test_a_tensor_that_is_lost_everywhere_leaves_a_remark(directory: Path) -> None:
    """One string is all names of a tensor in a save of one process: a flipped bit makes it another's."""

    def lose(metadata: Metadata) -> None:
        forget_a_tensor(metadata)
        forget_the_keys(metadata)
        held = metadata.storage_data
        metadata.storage_data = {i: v for i, v in held.items() if i.fqn != HEAD}

    assert not open_checkpoint(directory).remarks
    edit(directory, lose)
    (remark,) = open_checkpoint(directory).remarks
    assert "bytes of no entry of the metadata: __0_0.distcp (" in remark


def test_a_chunk_that_no_file_holds(directory: Path) -> None:
    def forget(metadata: Metadata) -> None:
        held = metadata.storage_data
        metadata.storage_data = {i: v for i, v in held.items() if (i.fqn, i.index) != (HEAD, 1)}

    edit(directory, forget)
    assert "no file holds its part at (" in damaged(directory).fact


@pytest.mark.parametrize("name", ["/etc/passwd", "../__0_0.distcp", ""])
def test_a_data_file_outside_the_directory(directory: Path, name: str) -> None:
    def lead_away(metadata: Metadata) -> None:
        index = next(iter(metadata.storage_data))
        metadata.storage_data[index] = replace(metadata.storage_data[index], relative_path=name)

    edit(directory, lead_away)
    assert "a data file outside the directory" in damaged(directory).fact


def test_a_chunk_of_another_shape_than_the_metadata_says(directory: Path) -> None:
    def exchange(metadata: Metadata) -> None:
        found = metadata.storage_data
        ours = next(i for i in found if (i.fqn, i.index) == (HEAD, 0))
        other = next(i for i in found if "q_proj" in i.fqn and i.index == 0)
        found[ours], found[other] = found[other], found[ours]

    edit(directory, exchange)
    assert "the metadata states float32" in damaged(directory).fact


def test_an_extension_that_is_not_known(tmp_path: Path) -> None:
    directory = copy_of("zstd-2ranks", tmp_path)

    def encrypt(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            info.transform_descriptors = ["stream.aes@example.org/1"]

    edit(directory, encrypt)
    error = refusal(directory)
    assert isinstance(error, UnsupportedLayout)
    assert "stream.aes@example.org/1" in error.fact


def test_a_torn_compressed_chunk(tmp_path: Path) -> None:
    directory = copy_of("zstd-2ranks", tmp_path)
    path = directory / "__1_0.distcp"
    data = bytearray(path.read_bytes())
    data[40:80] = bytes(40)
    path.write_bytes(data)
    error = damaged(directory)
    assert (error.path, "a compressed chunk is damaged" in error.fact) == (path, True)


def test_a_compressed_chunk_that_expands_without_end(tmp_path: Path) -> None:
    import zstandard

    directory = copy_of("zstd-2ranks", tmp_path)
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    put_in_place_of(directory, HEAD, bomb)
    assert "holds more than its tensor" in damaged(directory).fact


def put_in_place_of(directory: Path, name: str, content: bytes) -> None:
    """Let the metadata lead to other bytes, for every part of a tensor or for an object."""
    file = directory / "__0_0.distcp"

    def move(metadata: Metadata) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn == name:
                start = file.stat().st_size
                with file.open("ab") as stream:
                    stream.write(content)
                info.relative_path, info.offset, info.length = file.name, start, len(content)

    edit(directory, move)


def test_a_safetensors_part_of_another_save(tmp_path: Path) -> None:
    directory = copy_of("safetensors-format-2ranks", tmp_path)
    shutil.copyfile(directory / "__0_0.distcp", directory / "__1_0.distcp")
    with pytest.raises(DamagedCheckpoint, match="it does not hold the part at"):
        open_checkpoint(directory)


def test_a_safetensors_part_behind_other_objects(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.filesystem import SerializationFormat

    writer = dist_checkpoint.FileSystemWriter(
        tmp_path / "saved", serialization_format=SerializationFormat.SAFETENSORS
    )
    state = {"model": {"w": torch.arange(6.0).view(2, 3)}, "train_state": {"step": 7, "name": "x"}}
    dist_checkpoint.save(state, storage_writer=writer, no_dist=True)
    checkpoint = open_checkpoint(tmp_path / "saved")
    assert checkpoint.step == 7
    assert torch.equal(checkpoint["w"].load(), state["model"]["w"])  # type: ignore[index]


# Hostile pickles.


@pytest.mark.parametrize("attack", hostile.CALLS, ids=str)
@pytest.mark.parametrize("place", ["metadata", "version", "chunk", "step"])
def test_no_code_of_a_checkpoint_runs(tmp_path: Path, attack: str, place: str) -> None:
    """Whether it is read or refused, the canary does not appear."""
    canary = tmp_path / "canary"
    directory = copy_of("fsdp2-state-model-2ranks", tmp_path)
    payload = hostile.CALLS[attack](canary)
    path = directory / ".metadata"
    if place == "metadata":
        path.write_bytes(hostile.PROTOCOL_4 + payload + b".")
    elif place == "version":
        # Protocol 3 has no frames, whose lengths would give the change away.
        data = pickle.dumps(pickle.loads(path.read_bytes()), 3)
        version = hostile.value("1.0.0").partition(b"1.0.0")[0] + b"1.0.0"
        assert data.count(version) == 1
        path.write_bytes(data.replace(version, payload))
    else:
        name = "state.progress.step" if place == "step" else f"state.{HEAD}"
        put_in_place_of(directory, name, damage.torch_zip(hostile.PROTOCOL_4 + payload + b"."))
    try:
        settle(open_checkpoint(directory).catalogue().values())
    except CkptError:
        assert place != "step", "a fact for the report stopped the reading"
    assert not canary.exists()
