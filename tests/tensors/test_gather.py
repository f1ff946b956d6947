"""Moves are carried out exactly, in few and large reads, and what cannot be read is said."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.storage.places import LOCAL, Requests
from ckpt_tools.storage.pool import Pool
from ckpt_tools.tensors.catalogue import Box, FlatRange, Fragment, Stored, Tensor
from ckpt_tools.tensors.derived import cast, view
from ckpt_tools.tensors.dtypes import BFLOAT16, BY_NAME, FLOAT16, FLOAT32
from ckpt_tools.tensors.gather import Gatherer
from ckpt_tools.tensors.requests import Slice
from tests.support.in_memory import Memory, MemoryFile


def in_file(path: Path, truth: torch.Tensor, *, pad: int = 0) -> Stored:
    raw = truth.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    path.write_bytes(bytes(pad) + raw)
    dtype = BY_NAME[str(truth.dtype).removeprefix("torch.")]
    region = FlatRange(0, truth.numel())
    return Stored(dtype, tuple(truth.shape), [Fragment(path, pad, region)])


def columns(directory: Path, truth: torch.Tensor) -> Stored:
    """Each column of a matrix in a file of its own."""
    fragments = []
    for index in range(truth.shape[1]):
        path = directory / f"column{index}.bin"
        path.write_bytes(truth[:, index].contiguous().numpy().tobytes())
        fragments.append(Fragment(path, 0, Box((0, index), (truth.shape[0], 1))))
    return Stored(FLOAT32, tuple(truth.shape), fragments)


class Reads:
    """Every read request, as (offset, bytes)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests: list[tuple[int, int]] = []
        preadv = os.preadv

        def noted(fd: int, buffers: list[memoryview], offset: int) -> int:
            self.requests.append((offset, sum(map(len, buffers))))
            return preadv(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", noted)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


def test_bytes_that_two_tensors_share_are_read_for_both(tmp_path: Path) -> None:
    """Tied tensors that are both written: the second begins before the end of what the first reads."""
    truth = torch.arange(600_000, dtype=torch.float32) / 7
    tensor = cast(in_file(tmp_path / "f", truth), BFLOAT16)
    buffer = bytearray(2 * tensor.nbytes)

    with Gatherer() as gatherer:
        gatherer.fill(buffer, [Slice(tensor, 0, tensor.numel, tensor.nbytes * i) for i in (0, 1)])

    found = torch.frombuffer(buffer, dtype=torch.bfloat16).view(2, -1)
    assert torch.equal(found[0], truth.bfloat16())
    assert torch.equal(found[1], truth.bfloat16())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "int64", "uint8", "bool"])
def test_bits_are_moved_as_they_are(dtype: str, tmp_path: Path) -> None:
    size = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    raw = torch.randint(0, 2 if dtype == "bool" else 256, (size * 30,), dtype=torch.uint8)
    truth = raw.view(getattr(torch, dtype)).reshape(5, 6)
    loaded = in_file(tmp_path / "data.bin", truth, pad=size).load()
    assert loaded.dtype == truth.dtype and loaded.shape == truth.shape
    assert (
        loaded.numpy().tobytes() == truth.numpy().tobytes()
        if dtype != "bfloat16"
        else (torch.equal(loaded.view(torch.int16), truth.view(torch.int16)))
    )


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2)])
def test_awkward_shapes(shape: tuple[int, ...], tmp_path: Path) -> None:
    truth = torch.full(shape, 7.0)
    assert torch.equal(in_file(tmp_path / "data.bin", truth).load(), truth)


def test_casts_round_as_torch_rounds_step_by_step(tmp_path: Path) -> None:
    truth = torch.randn(1000) * 100
    lazy: Tensor = in_file(tmp_path / "data.bin", truth)
    assert torch.equal(cast(lazy, BFLOAT16).load(), truth.bfloat16())
    twice = cast(cast(lazy, FLOAT16), FLOAT32)
    assert torch.equal(twice.load(), truth.half().float())
    assert not torch.equal(twice.load(), truth)


@pytest.mark.parametrize("rows", [10, 100_000])
def test_a_column_that_is_a_long_run(rows: int, tmp_path: Path) -> None:
    """One run of the file with a stride in the window is no copy of bytes, however long it is."""
    truth = torch.arange(rows * 3, dtype=torch.float32).reshape(rows, 3)
    assert torch.equal(columns(tmp_path, truth).load(), truth)


def test_a_run_longer_than_the_read_buffer_is_scattered(tmp_path: Path, reads: Reads) -> None:
    truth = torch.arange(1200 * 1000, dtype=torch.float32).reshape(1200, 1000)
    lazy = in_file(tmp_path / "data.bin", truth)
    assert torch.equal(view(lazy, 0, (1000, 1200), (1, 1000)).load(), truth.T)
    assert max(size for _, size in reads.requests) <= LOCAL.nbytes
    assert sum(size for _, size in reads.requests) == truth.nbytes


def test_neighbours_are_read_in_one_request(tmp_path: Path, reads: Reads) -> None:
    """Small pieces of many tensors, asked for in any order."""
    truth = torch.arange(300, dtype=torch.float32)
    path = tmp_path / "data.bin"
    path.write_bytes(truth.numpy().tobytes())
    tensors = [
        Stored(FLOAT32, (10,), [Fragment(path, 40 * i, FlatRange(0, 10))]) for i in range(30)
    ]
    order = [(7 * i) % 30 for i in range(30)]
    buffer = bytearray(1200)
    with Gatherer() as gatherer:
        gatherer.fill(buffer, [Slice(tensors[i], 0, 10, 40 * at) for at, i in enumerate(order)])
        assert gatherer.bytes_read == 1200
    assert reads.requests == [(0, 1200)]
    expected = torch.cat([truth[10 * i : 10 * i + 10] for i in order])
    assert torch.equal(torch.frombuffer(buffer, dtype=torch.float32), expected)


def test_nothing_else_in_the_buffer_is_touched(tmp_path: Path) -> None:
    lazy = in_file(tmp_path / "data.bin", torch.zeros(6, 4))
    turned = view(lazy, 0, (4, 6), (1, 4))
    for tensor in (lazy, turned, cast(turned, BFLOAT16)):
        nbytes = 11 * tensor.dtype.itemsize
        buffer = bytearray(b"\xaa" * (nbytes + 16))
        with Gatherer() as gatherer:
            gatherer.fill(buffer, [Slice(tensor, 5, 16, 8)])
        assert buffer == b"\xaa" * 8 + bytes(nbytes) + b"\xaa" * 8


def test_more_files_than_are_kept_open(tmp_path: Path) -> None:
    truth = torch.arange(400, dtype=torch.float32).reshape(2, 200)
    assert torch.equal(columns(tmp_path, truth).load(), truth)


@pytest.mark.parametrize("numel", [8, 100_000])
def test_a_truncated_file_is_named(numel: int, tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    lazy = in_file(path, torch.zeros(numel))
    os.truncate(path, numel * 4 - 3)
    with pytest.raises(DamagedCheckpoint, match="the file ends at byte") as error:
        lazy.load()
    assert error.value.path == path


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    lazy = in_file(path, torch.zeros(8))
    path.unlink()
    with pytest.raises(DamagedCheckpoint, match="cannot be opened") as error:
        lazy.load()
    assert error.value.path == path


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_place_says_how_large_its_requests_are(tmp_path: Path, at_once: int) -> None:
    truth = torch.arange(4000, dtype=torch.float32)
    place = Memory({"run": truth.numpy().tobytes()}, short=1 << 20)
    place.requests = Requests(nbytes=1600, gap_bytes=400, at_once=at_once)
    file = Pool(Path("/far"), [place]).path("run")
    long = Stored(FLOAT32, (2000,), [Fragment(file, 0, FlatRange(0, 2000))])
    # 40 elements of every 100: the gaps of 240 bytes are read, a request holds four runs.
    short = [
        Stored(FLOAT32, (40,), [Fragment(file, 4 * start, FlatRange(0, 40))])
        for start in range(2000, 4000, 100)
    ]
    slices = [Slice(long, 0, 2000, 0)]
    slices += [Slice(tensor, 0, 40, 8000 + 160 * i) for i, tensor in enumerate(short)]
    buffer = bytearray(8000 + 160 * 20)

    with Gatherer() as gatherer:
        gatherer.fill(buffer, slices)

    found = torch.frombuffer(buffer, dtype=torch.float32)
    kept = [truth[start : start + 40] for start in range(2000, 4000, 100)]
    assert torch.equal(found, torch.cat([truth[:2000], *kept]))
    asked = sorted(place.asked)
    joined = [(8000 + 1600 * i, 3 * 400 + 160) for i in range(5)]
    whole = [(1600 * i, 1600) for i in range(5)] if at_once > 1 else [(0, 8000)]
    assert asked == whole + joined
    assert place.unclosed == 0


def test_as_many_requests_are_under_way_as_a_place_accepts() -> None:
    place = Together({"run": bytes(range(64))}, parties=4)
    place.requests = Requests(nbytes=16, gap_bytes=1, at_once=4)
    file = Pool(Path("/far"), [place]).path("run")
    tensor = Stored(BY_NAME["uint8"], (64,), [Fragment(file, 0, FlatRange(0, 64))])

    assert tensor.load().tolist() == list(range(64))


class Together(Memory):
    """A place that answers only if so many requests have come."""

    def __init__(self, files: dict[str, bytes], parties: int) -> None:
        super().__init__(files)
        self.barrier = threading.Barrier(parties, timeout=500)

    def open(self, relative: str) -> MemoryFile:
        file, barrier = super().open(relative), self.barrier

        class Waiting(MemoryFile):
            def read_into(self, view: memoryview, offset: int) -> int:
                barrier.wait()
                return file.read_into(view, offset)

            def close(self) -> None:
                file.close()

        return Waiting(self, b"")
