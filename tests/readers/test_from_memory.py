"""A place that is no directory is enough: every reader reads through it what it reads from a disk.

The files of a checkpoint lie in memory, and nothing can be asked of them but their list and bytes at a
position, a few at a time: what another machine can offer. No file has a path that the system could open.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tools import average, consolidate, extract_lora, inspect, open_checkpoint, readers
from ckpt_tools.errors import CkptError, DamagedCheckpoint
from ckpt_tools.storage.places import DirectoryPlace
from ckpt_tools.storage.pool import Pool, PooledPath
from ckpt_tools.tensors.catalogue import Tensor
from ckpt_tools.tensors.deferred import settle
from tests.readers.dcp import test_dcp
from tests.support.in_memory import Memory
from tests.support.readers.contract import FIXTURES, assert_same, bits, in_pieces
from tests.support.sampled import sampled

EVERY = sorted(path.parent for path in FIXTURES.glob("*/*/checkpoint"))


def far(directory: Path) -> PooledPath:
    """A directory that is in memory alone, under its own name."""
    return Pool(directory, [Memory.of(directory)]).path()


def memory_of(path: PooledPath) -> Memory:
    (place,) = path.pool.places
    assert isinstance(place, Memory)
    return place


def told(path: Path, data: Callable[[Tensor], bytes]) -> tuple[Any, ...]:
    """Everything that a checkpoint says of itself and holds, or why it cannot be read."""
    try:
        checkpoint = readers.read(readers.locate(path))
        tensors = [t for w in checkpoint.weights.values() for t in (w.master, w.model) if t]
        settle(tensors, 2)
    except CkptError as error:
        return type(error), error.fact
    facts = {name: value for name, value in vars(checkpoint).items() if name in {"ties", "details"}}
    facts |= {"step": checkpoint.step, "remarks": checkpoint.remarks, "doubts": checkpoint.doubts}
    directory = checkpoint.location.directory
    files = {p.relative_to(directory).as_posix(): n for p, n in checkpoint.files.items()}
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(data(tensor))
    listed = [(n, w.kind, w.shape, str(w.dtype)) for n, w in checkpoint.weights.items()]
    whole = {"ranks": checkpoint.world_size, "written by": checkpoint.framework}
    whole |= {"trained in": str(checkpoint.training_dtype), "bytes": checkpoint.bytes_on_disk}
    return facts | whole, files, listed, digest.hexdigest()


def loaded(tensor: Tensor) -> bytes:
    return bits(tensor.load())


def in_odd_windows(tensor: Tensor) -> bytes:
    return in_pieces(tensor, 331)


@pytest.mark.parametrize("fixture", sampled(EVERY), ids=lambda path: path.name)
def test_from_memory_is_as_from_the_disk(fixture: Path) -> None:
    """What lies on the disk is what the live engine held: the contract of each reader."""
    path = far(fixture / "checkpoint")
    memory = memory_of(path)
    found = told(path, in_odd_windows)
    assert found == told(fixture / "checkpoint", loaded)
    assert memory.opened or issubclass(found[0], CkptError)
    assert memory.unclosed == 0


@pytest.mark.parametrize("fixture", EVERY, ids=lambda path: path.name)
def test_it_is_found_where_it_lies(fixture: Path) -> None:
    try:
        near = readers.locate(fixture / "checkpoint")
    except CkptError:
        return  # not every fixture is one checkpoint; why not is compared above
    found = readers.locate(far(fixture / "checkpoint"))
    assert isinstance(found.directory, PooledPath)
    # The name of a file, as messages show it, also says on which machine it lies.
    where = str(found.directory).removeprefix("machine node7:")
    assert (where, found.format) == (str(near.directory), near.format)
    again = readers.locate(found.directory)
    assert (again.directory, again.format) == (found.directory, found.format)
    # Configs and tokenizers are looked for on this machine.
    assert not any(isinstance(place, PooledPath) for place in again.near)


def test_every_fixture_is_tried() -> None:
    assert len(EVERY) > 190
    assert {path.parent.name for path in EVERY} >= {
        "zero",
        "dcp",
        "accelerate",
        "rank_files",
        "peft",
    }


# From the first byte to the output.

CONVERTED = [
    "zero/zero3-bf16-olmo2-chat-2ranks",
    "zero/zero1-bf16-llama-2ranks",
    "zero/zero2-bf16-llama-legacy-torch-2ranks",
    "zero/zero0-bf16-llama-fused-2ranks",
    "dcp/zstd-2ranks",
    "dcp/awkward-2ranks",
    "dcp/safetensors-format-2ranks",
    "accelerate/fsdp1-sharded-2ranks",
    "accelerate/save-model-sharded",
    "rank_files/verl-hsdp-fsdp2-4ranks",
]


def outputs(directory: Path) -> dict[str, bytes]:
    """Every file of an output but the manifest, which says where the source lay."""
    paths = (path for path in directory.iterdir() if path.name != "ckpt_tools_manifest.json")
    return {path.name: path.read_bytes() for path in paths}


@pytest.mark.parametrize("name", CONVERTED)
def test_a_conversion_from_memory_is_byte_for_byte_that_from_the_disk(
    tmp_path: Path, name: str
) -> None:
    source = FIXTURES / name / "checkpoint"
    consolidate(source, tmp_path / "near", weights_only=True)
    consolidate(far(source), tmp_path / "far", weights_only=True)
    assert outputs(tmp_path / "far") == outputs(tmp_path / "near")
    assert "model.safetensors" in outputs(tmp_path / "far")


def test_an_adapter_comes_from_memory_too(tmp_path: Path) -> None:
    case = FIXTURES / "peft" / "zero3-olmo2-lora"
    for path, out in ((case / "checkpoint", "near"), (far(case / "checkpoint"), "far")):
        extract_lora(path, tmp_path / out, lora_alpha=16, base_model="base")
    assert outputs(tmp_path / "far") == outputs(tmp_path / "near")


def test_memory_and_disk_are_averaged(tmp_path: Path) -> None:
    """Their paths are called the same, and must not be taken for one another."""
    source = FIXTURES / "zero" / "zero3-bf16-llama-7ranks" / "checkpoint"
    average([source, source], tmp_path / "near", weights_only=True)
    average([source, far(source)], tmp_path / "mixed", weights_only=True)
    assert outputs(tmp_path / "mixed") == outputs(tmp_path / "near")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(60_000, dtype=torch.bfloat16).view(200, 300).t(),
        torch.arange(120.0).view(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    ],
    ids=["transposed", "channels last"],
)
def test_permuted_tensors_come_from_memory_too(tmp_path: Path, tensor: torch.Tensor) -> None:
    """On a disk their file is mapped, which cannot be done with what is elsewhere."""
    path = far(test_dcp.save(tmp_path / "saved", {"model": {"w": tensor}}))
    assert_same(open_checkpoint(path)["w"].load(), tensor, "w")


def test_copies_of_two_ranks_are_compared_though_one_is_far(tmp_path: Path) -> None:
    """Reads from memory are short, those from the disk are not; both must meet the same elements."""
    same = torch.arange(5000.0).view(50, 100)
    for last in (0.0, 1.0):
        directory = tmp_path / f"last{last:g}"
        directory.mkdir()
        for rank in (0, 1):
            # The storages differ behind the tensors, so that no checksum tells whether they are alike.
            held = torch.cat([same.flatten(), torch.tensor([float(rank)])])
            held[4999] += rank * last
            torch.save({"w": held[:5000].view(50, 100)}, directory / f"model_rank_{rank}.pt")
        far_rank = Memory.of(directory, lambda name: "rank_1" in name)
        (directory / "model_rank_1.pt").unlink()
        path = Pool(directory, [DirectoryPlace(directory), far_rank]).path()
        if last:
            with pytest.raises(DamagedCheckpoint, match="with different values") as caught:
                open_checkpoint(path)
            assert "machine node7:" in str(caught.value.path)
        else:
            assert_same(open_checkpoint(path)["w"].load(), same, "w")
        assert far_rank.unclosed == 0


def test_inspect_needs_no_tensor_data_from_another_machine() -> None:
    path = far(FIXTURES / "dcp" / "fsdp2-model-3ranks" / "checkpoint")
    assert inspect(path).problems == ()
    opened = set(memory_of(path).opened)
    assert all(name.endswith(".metadata") for name in opened)


def read_all(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    settle(checkpoint.catalogue().values())
    for tensor in checkpoint.values():
        tensor.load()


# What goes wrong there is told as what goes wrong on a disk.


@pytest.mark.parametrize(
    "name", ["zero/zero2-bf16-llama-3ranks", "dcp/fsdp2-model-3ranks", "rank_files/verl-single"]
)
def test_a_file_that_is_cut_short_there_is_named(name: str) -> None:
    path = far(FIXTURES / name / "checkpoint")
    memory = memory_of(path)
    for cut in [n for n in memory.files if n.endswith((".distcp", "optim_states.pt", "_0.pt"))]:
        memory.files[cut] = memory.files[cut][:100]
    path = Pool(path.pool.root, [memory]).path()
    with pytest.raises(DamagedCheckpoint) as caught:
        read_all(path)
    assert str(caught.value.path).startswith(f"machine node7:{path.pool.root}")


class Failing(Memory):
    """A machine that stops answering once its files were listed and looked into."""

    fails = False

    def open(self, relative: str):  # type: ignore[no-untyped-def]
        if self.fails:
            raise OSError(113, "No route to host")
        return super().open(relative)


def test_a_machine_that_is_gone_is_named() -> None:
    source = FIXTURES / "zero" / "zero3-bf16-llama-7ranks" / "checkpoint"
    memory = Failing(Memory.of(source).files)
    checkpoint = open_checkpoint(Pool(source, [memory]).path())
    memory.fails = True
    with pytest.raises(DamagedCheckpoint, match=r"cannot be opened \(No route to host\)") as caught:
        checkpoint["model.norm.weight"].load()
    assert str(caught.value.path).startswith(f"machine node7:{source}/")


def test_a_shard_that_no_machine_has_is_named_with_the_machines() -> None:
    source = FIXTURES / "zero" / "zero2-bf16-llama-3ranks" / "checkpoint"
    lost = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    parts = [
        Memory.of(source, lambda n, r=rank: n.endswith("latest") if r else not n.endswith(lost), m)
        for rank, m in enumerate(("machine a", "machine b"))
    ]
    path = Pool(source, [DirectoryPlace(source.parent / "hf"), *parts]).path()
    with pytest.raises(DamagedCheckpoint) as caught:
        open_checkpoint(path).catalogue("master")
    error = caught.value
    assert error.missing == (f"bf16_{lost}",)
    assert str(error).endswith(
        f"Read as one checkpoint: {source.parent / 'hf'}, machine a, machine b."
    )
