"""Written files are byte for byte right for any number of workers, in flat memory, or nothing is."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tools.errors import DamagedCheckpoint, OutputFailed
from ckpt_tools.tensors.catalogue import FlatRange, Fragment, Stored, Tensor
from ckpt_tools.tensors.derived import cast
from ckpt_tools.tensors.dtypes import BFLOAT16, FLOAT16, FLOAT32, DType
from ckpt_tools.tensors.threads import default_workers
from ckpt_tools.writing.bytes import Outputs, Written, laid_out, lay_out, write
from ckpt_tools.writing.depth import MEMORY_BYTES, Level
from ckpt_tools.writing.layout import Plan, PlannedFile, Slot, plan
from ckpt_tools.writing.publish import partial_directory
from ckpt_tools.writing.units import Block, Units
from tests.support.waiting import LONGEST_SECONDS, wait_until
from tests.writing.test_layout import FORMAT, our_dtype, raw, with_blocks_of, zoo


def on_disk(
    directory: Path, tensors: Mapping[str, torch.Tensor], *, files: int = 3, pieces: int = 4
) -> dict[str, Stored]:
    """Cut each tensor into pieces that lie in turn in several files, last tensor first."""
    directory.mkdir(parents=True, exist_ok=True)
    contents = [bytearray(b"\xaa" * (3 + 8 * i)) for i in range(files)]
    stored = {}
    for name, tensor in reversed(tensors.items()):
        dtype, data, numel = our_dtype(tensor), raw(tensor), tensor.numel()
        cuts = sorted({numel * i // pieces for i in range(pieces + 1)})
        fragments = []
        for index, (low, high) in enumerate(itertools.pairwise(cuts)):
            content = contents[index % files]
            content += bytes(-len(content) % dtype.itemsize)
            path = directory / f"rank{index % files}"
            fragments.append(Fragment(path, len(content), FlatRange(low, high)))
            content += data[low * dtype.itemsize : high * dtype.itemsize]
        stored[name] = Stored(dtype, tuple(tensor.shape), fragments)
    for index, content in enumerate(contents):
        (directory / f"rank{index}").write_bytes(content)
    return {name: stored[name] for name in tensors}


def one_run(path: Path, tensor: torch.Tensor) -> Stored:
    path.write_bytes(raw(tensor))
    fragment = Fragment(path, 0, FlatRange(0, tensor.numel()))
    return Stored(our_dtype(tensor), tuple(tensor.shape), [fragment])


def write_all(layout: Plan, directory: Path, **options: Any) -> Written:
    """All of a plan, as one process writes it."""
    lay_out(layout, directory)
    units = Units(layout)
    with Outputs(layout, directory) as outputs:
        return write(units, outputs, [range(len(units))], **options)


def written(directory: Path, tensors: Mapping[str, Tensor], **options: int) -> Path:
    directory.mkdir()
    write_all(plan(tensors), directory, **options)
    return directory


def test_bytes_between_tensors_are_zero(tmp_path: Path) -> None:
    """A layout may align its tensors; one buffer carries block after block."""
    tensors = {name: torch.full((300,), 0xEE, dtype=torch.uint8) for name in "abcd"}
    (file,) = plan(on_disk(tmp_path / "source", tensors)).files
    step = 512
    slots = tuple(
        Slot(slot.name, slot.tensor, len(file.header) + (i + 1) * step)
        for i, slot in enumerate(file.slots)
    )
    layout = with_blocks_of(Plan((PlannedFile(file.name, file.header, slots),), None), 64)

    (tmp_path / "out").mkdir()
    write_all(layout, tmp_path / "out", workers=1)

    data = (tmp_path / "out" / file.name).read_bytes()[len(file.header) :]
    assert data == b"".join(bytes(step - 300 * (i > 0)) + b"\xee" * 300 for i in range(4))


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("block_bytes", [24, 1_000, 4 << 20])
def test_the_bytes_do_not_depend_on_workers_or_blocks(
    tmp_path: Path, workers: int, block_bytes: int
) -> None:
    tensors = zoo()
    save_file(tensors, tmp_path / "theirs", metadata=FORMAT)
    layout = with_blocks_of(plan(on_disk(tmp_path / "source", tensors)), block_bytes)
    (tmp_path / "out").mkdir()

    done = write_all(layout, tmp_path / "out", workers=workers)

    expected = (tmp_path / "theirs").read_bytes()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected
    assert done.bytes_written == sum(tensor.nbytes for tensor in tensors.values())
    assert done.bytes_read >= layout.tensor_bytes


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_shards_index_and_casts_do_not_depend_on_workers(tmp_path: Path, workers: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"layers.{i}.weight": torch.randn(101, 33 + i, generator=generator) for i in range(30)
    }
    source = on_disk(tmp_path / "source", tensors, pieces=17)
    layout = plan(
        {name: cast(tensor, BFLOAT16) for name, tensor in source.items()}, max_shard_size="50KB"
    )
    (tmp_path / "out").mkdir()

    write_all(with_blocks_of(layout, 1_111), tmp_path / "out", workers=workers)

    assert layout.index is not None
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert files.pop(layout.index[0]) == layout.index[1]
    assert len(files) == len(layout.files) > 3
    for file in layout.files:
        held = {slot.name: tensors[slot.name].bfloat16() for slot in file.slots}
        save_file(held, tmp_path / "theirs", metadata=FORMAT)
        assert files[file.name] == (tmp_path / "theirs").read_bytes()


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    tensors = zoo()
    layout = with_blocks_of(plan(on_disk(tmp_path / "source", tensors)), 100)
    told: list[int] = []

    write_all(layout, tmp_path, workers=3, progress=told.append)

    assert sum(told) == layout.tensor_bytes
    assert len(told) > 10
    assert min(told) > 0


def test_what_was_read_is_counted(tmp_path: Path) -> None:
    tensor = one_run(tmp_path / "source", torch.arange(100_000, dtype=torch.float32))

    done = write_all(plan({"x": cast(tensor, BFLOAT16)}), tmp_path)

    assert done.bytes_read == 400_000
    assert done.bytes_written == 200_000
    assert isinstance(done, Written)
    assert done.move_seconds > 0
    assert done.sync_seconds > 0


def test_the_default_is_a_worker_for_each_processor_we_may_use() -> None:
    program = "import ckpt_tools.tensors.threads as t; print(t.default_workers())"
    one = min(os.sched_getaffinity(0))
    for processors in ({one}, os.sched_getaffinity(0)):
        run = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            preexec_fn=lambda processors=processors: os.sched_setaffinity(0, processors),  # type: ignore[misc]
        )
        assert int(run.stdout) == min(len(processors), 16)
    assert default_workers() == min(len(os.sched_getaffinity(0)), 16)


def test_torch_keeps_its_own_number_of_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        write_all(plan(on_disk(tmp_path / "source", zoo())), tmp_path)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


# Every 16-bit pattern there is: zeros, denormals, infinities and NaNs with all their payloads.
PATTERNS = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
# fp32 values where rounding to 16 bits is decided: around each 16-bit value, and half-way to the next.
NEIGHBOURS = torch.cat(
    [
        ((torch.arange(1 << 16, dtype=torch.int64) << 16) + rest).to(torch.int32)
        for rest in (0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000)
    ]
).view(torch.float32)
CASTS = [
    (PATTERNS.view(torch.bfloat16), FLOAT32),
    (PATTERNS.view(torch.bfloat16), FLOAT16),
    (PATTERNS.view(torch.float16), FLOAT32),
    (PATTERNS.view(torch.float16), BFLOAT16),
    (NEIGHBOURS, BFLOAT16),
    (NEIGHBOURS, FLOAT16),
]


@pytest.mark.parametrize(
    ("values", "dtype"), CASTS, ids=[f"{our_dtype(v)} to {d}" for v, d in CASTS]
)
def test_a_cast_is_torchs_for_every_pattern(
    tmp_path: Path, values: torch.Tensor, dtype: DType
) -> None:
    source = one_run(tmp_path / "source", values)

    written(tmp_path / "out", {"x": cast(source, dtype)})

    found = load_file(tmp_path / "out" / "model.safetensors")["x"]
    expected = values.to(dtype.torch)
    assert found.dtype == expected.dtype
    assert raw(found) == raw(expected)


def test_bf16_widens_and_fp32_narrows_as_ieee_says(tmp_path: Path) -> None:
    """By arithmetic on the bits, not by torch."""
    written(
        tmp_path / "wide",
        {"x": cast(one_run(tmp_path / "a", PATTERNS.view(torch.bfloat16)), FLOAT32)},
    )
    written(tmp_path / "narrow", {"x": cast(one_run(tmp_path / "b", NEIGHBOURS), BFLOAT16)})

    wide = load_file(tmp_path / "wide" / "model.safetensors")["x"].view(torch.int32).numpy()
    assert np.array_equal(wide.view(np.uint32), np.arange(1 << 16, dtype=np.uint32) << 16)
    bits = NEIGHBOURS.view(torch.int32).numpy().view(np.uint32).astype(np.uint64)
    nearest_even = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    narrow = load_file(tmp_path / "narrow" / "model.safetensors")["x"]
    numbers = ~torch.isnan(NEIGHBOURS).numpy()
    assert np.array_equal(
        narrow.view(torch.int16).numpy().view(np.uint16)[numbers], nearest_even[numbers]
    )
    assert torch.isnan(narrow[torch.isnan(NEIGHBOURS)]).all()


def test_what_fp16_cannot_hold_becomes_infinite(tmp_path: Path) -> None:
    values = torch.tensor([65504.0, 65520.0, -1e30, 6e-8, 1e-9, float("nan")])

    written(tmp_path / "out", {"x": cast(one_run(tmp_path / "source", values), FLOAT16)})

    found = load_file(tmp_path / "out" / "model.safetensors")["x"].float()
    assert found[:3].tolist() == [65504.0, float("inf"), float("-inf")]
    assert found[3:5].tolist() == [2.0**-24, 0.0]
    assert found[5].isnan()


@pytest.mark.parametrize("workers", [1, 3])
def test_a_source_that_was_cut_off_meanwhile_is_named(tmp_path: Path, workers: int) -> None:
    source = on_disk(tmp_path / "source", {"x": torch.zeros(1_000_000)})
    layout = plan(source)
    os.truncate(tmp_path / "source" / "rank1", 1_000)

    with (
        pytest.raises(DamagedCheckpoint, match="ends at byte 1,000") as caught,
        partial_directory(tmp_path / "out", overwrite=False) as partial,
    ):
        write_all(layout, partial.path, workers=workers)

    assert caught.value.path == tmp_path / "source" / "rank1"
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_source_that_is_cut_off_between_two_blocks_is_named(tmp_path: Path) -> None:
    path = tmp_path / "source"
    layout = with_blocks_of(plan({"x": one_run(path, torch.zeros(1_000_000))}), 400_000)
    told: list[int] = []

    def cut_off(nbytes: int) -> None:
        told.append(nbytes)
        os.truncate(path, 2_000_000)

    with (
        pytest.raises(DamagedCheckpoint, match="ends at byte 2,000,000") as caught,
        partial_directory(tmp_path / "out", overwrite=False) as partial,
    ):
        write_all(layout, partial.path, workers=1, progress=cut_off)

    assert caught.value.path == path
    # Blocks end on units, and the first unit is in part the header's.
    rest = len(layout.files[0].header) % Units(layout).nbytes
    assert told == [400_000 - rest, *[400_000] * 4]
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_a_source_that_is_gone_is_named(tmp_path: Path) -> None:
    layout = plan(on_disk(tmp_path / "source", {"x": torch.zeros(100)}))
    (tmp_path / "source" / "rank2").unlink()

    with pytest.raises(DamagedCheckpoint, match="cannot be opened") as caught:
        write_all(layout, tmp_path)

    assert caught.value.path == tmp_path / "source" / "rank2"


def test_a_failure_of_one_worker_stops_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = with_blocks_of(plan({"x": one_run(tmp_path / "s", torch.zeros(1_000_000))}), 400)
    told: list[int] = []
    events: list[threading.Event] = []

    def event() -> threading.Event:
        events.append(threading.Event())
        return events[-1]

    def fail_once(nbytes: int) -> None:
        told.append(nbytes)
        if len(told) == 1:
            raise RuntimeError("of the caller")
        wait_until(lambda: events[0].is_set())

    monkeypatch.setattr(
        "ckpt_tools.writing.depth.threading", SimpleNamespace(**{**vars(threading), "Event": event})
    )
    with pytest.raises(RuntimeError, match="of the caller"):
        write_all(layout, tmp_path, workers=2, progress=fail_once)

    assert len(told) <= 2, "of 10,000 blocks: each worker finishes the one that it has"


def test_a_file_that_is_laid_out_already_keeps_its_bytes(tmp_path: Path) -> None:
    """What an earlier run wrote is in it."""
    layout = plan(on_disk(tmp_path / "source", zoo()), max_shard_size=500)
    write_all(layout, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    assert len(before) > 2

    lay_out(layout, tmp_path)

    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")} == before
    assert laid_out(layout, tmp_path) == before.keys()


def gone(path: Path) -> None:
    path.unlink()


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def longer(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


def another_header(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.seek(20)
        stream.write(b"?")


def no_file(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize("damage", [gone, cut_short, longer, another_header, no_file])
def test_a_file_that_is_not_of_this_plan_is_made_anew(tmp_path: Path, damage: Any) -> None:
    layout = plan(on_disk(tmp_path / "source", zoo()), max_shard_size=500)
    write_all(layout, tmp_path)
    second = layout.files[1]
    damage(tmp_path / second.name)
    everything = {file.name for file in layout.files}
    assert laid_out(layout, tmp_path) == everything - {second.name}

    lay_out(layout, tmp_path)

    content = (tmp_path / second.name).read_bytes()
    assert content == second.header.ljust(second.size, b"\0")
    assert laid_out(layout, tmp_path) == everything


def test_a_file_that_is_made_anew_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("somebody's")
    (tmp_path / "model.safetensors").symlink_to("theirs")

    write_all(plan(on_disk(tmp_path / "source", zoo())), tmp_path)

    assert (tmp_path / "theirs").read_text() == "somebody's"
    assert not (tmp_path / "model.safetensors").is_symlink()


def test_outputs_that_are_not_laid_out_are_refused(tmp_path: Path) -> None:
    layout = plan(on_disk(tmp_path / "source", zoo()), max_shard_size=500)
    lay_out(layout, tmp_path)
    (tmp_path / layout.files[-1].name).unlink()
    before = open_files()

    with pytest.raises(OutputFailed, match="No such file"):
        Outputs(layout, tmp_path)

    assert open_files() == before


def open_files() -> list[str]:
    """What this process has open, but for the listing itself."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.append(os.readlink(entry))
        except OSError:
            continue
    return sorted(found)


def test_what_is_to_do_is_written_and_nothing_else(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((1_000,), i + 1.0) for i in range(20)}
    layout = plan(on_disk(tmp_path / "source", tensors), max_shard_size=30_000)
    units = Units(layout)
    lay_out(layout, tmp_path)
    todo = [range(3, 40), range(41, 42), range(300, len(units))]
    with Outputs(layout, tmp_path) as outputs:
        done = write(units, outputs, todo, workers=3)

    expected = [bytearray(file.header.ljust(file.size, b"\0")) for file in layout.files]
    whole = tmp_path / "whole"
    whole.mkdir()
    write_all(layout, whole)
    nbytes = 0
    for index, start, stop in (units.span(unit) for part in todo for unit in part):
        content = (whole / layout.files[index].name).read_bytes()
        expected[index][start:stop] = content[start:stop]
        nbytes += stop - start
    for file, wanted in zip(layout.files, expected, strict=True):
        assert (tmp_path / file.name).read_bytes() == bytes(wanted)
    assert done.bytes_written == nbytes


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("block_bytes", [1_000, 4 << 20])
def test_each_block_is_recorded_once_it_is_written_with_the_digests_of_its_bytes(
    tmp_path: Path, workers: int, block_bytes: int
) -> None:
    tensors = {f"t{i}": torch.randn(300) for i in range(30)}
    layout = with_blocks_of(plan(on_disk(tmp_path / "source", tensors)), block_bytes)
    units = Units(layout)
    recorded: list[int] = []

    def record(block: Block, digests: Sequence[bytes]) -> None:
        content = (tmp_path / layout.files[block.file].name).read_bytes()
        data = content[block.offset : block.offset + block.nbytes]
        assert data.count(0) < len(data) / 4, "it is written already"
        assert list(digests) == units.digests(block, memoryview(data))
        recorded.extend(range(block.first, block.last))

    write_all(layout, tmp_path, workers=workers, record=record)

    assert sorted(recorded) == list(range(len(units)))


class Turn:
    """A lock that counts the threads that wait for it."""

    def __init__(self) -> None:
        self.lock, self.waiting = threading.Lock(), 0

    def __enter__(self) -> None:
        if not self.lock.acquire(blocking=False):
            self.waiting += 1
            self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


def test_no_thread_waits_in_the_kernel_for_another_that_writes_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = with_blocks_of(plan({"x": one_run(tmp_path / "source", torch.ones(4_096))}), 1_024)
    units = Units(layout)
    lay_out(layout, tmp_path)
    turn, inside, first = Turn(), set[int](), threading.Event()
    pwrite = os.pwrite

    def watched(fd: int, data: memoryview, offset: int) -> int:
        assert not inside, "two threads in the kernel"
        inside.add(fd)
        if not first.is_set():
            # The other blocks wait for this one, whichever thread took it: the second thread must come.
            first.set()
            wait_until(lambda: turn.waiting > 0)
        inside.remove(fd)
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", watched)
    with Outputs(layout, tmp_path) as outputs:
        outputs._turns = [turn]  # type: ignore[list-item]
        write(units, outputs, [range(len(units))], workers=2)

    assert load_file(tmp_path / "model.safetensors")["x"].eq(1).all()


def test_several_threads_write_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"t{i}": torch.full((1_000,), i + 1.0) for i in range(3)}
    layout = plan(on_disk(tmp_path / "source", tensors), max_shard_size=4_000)
    units = Units(layout)
    lay_out(layout, tmp_path)
    meeting = threading.Barrier(3, timeout=LONGEST_SECONDS)
    firsts = {units.span(part.start)[1] for _, part in units.by_file(range(len(units)))}
    pwrite = os.pwrite

    def watched(fd: int, data: memoryview, offset: int) -> int:
        if offset in firsts:
            meeting.wait()
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", watched)
    with Outputs(layout, tmp_path) as outputs:
        write(units, outputs, [range(len(units))], workers=3)

    assert len(layout.files) == 3
    for file in layout.files:
        for name, value in load_file(tmp_path / file.name).items():
            assert value.eq(tensors[name]).all()


def test_a_write_that_is_ended_begins_no_further_block(tmp_path: Path) -> None:
    source = one_run(tmp_path / "source", torch.ones(100_000))
    layout = with_blocks_of(plan({"x": source}), 1_024)
    ended = threading.Event()
    told: list[int] = []

    def progress(nbytes: int) -> None:
        told.append(nbytes)
        if len(told) == 20:
            ended.set()

    done = write_all(layout, tmp_path, workers=2, progress=progress, ended=ended)

    assert 20 <= len(told) <= 21
    assert done.bytes_written == sum(told)


def test_a_disk_that_loses_bytes_while_they_are_synced_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = plan(on_disk(tmp_path / "source", {"x": torch.ones(1_000)}))
    lay_out(layout, tmp_path)
    units = Units(layout)

    def refuse(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with Outputs(layout, tmp_path) as outputs:
        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(OutputFailed, match="Input/output error"):
            write(units, outputs, [range(len(units))])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "ckpt-tools-test", str(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("block_bytes", [100_000, 4 << 20])
def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, small_disk: Path, workers: int, block_bytes: int
) -> None:
    layout = plan(on_disk(tmp_path / "source", {"x": torch.ones(1_000_000)}))

    with (
        pytest.raises(OutputFailed, match="no space left") as caught,
        partial_directory(small_disk / "out", overwrite=False) as partial,
    ):
        write_all(with_blocks_of(layout, block_bytes), partial.path, workers=workers)

    assert caught.value.exit_code == 6
    assert caught.value.path is not None
    assert caught.value.path.is_relative_to(small_disk)
    assert "Free some space" in str(caught.value.hint)
    assert list(small_disk.iterdir()) == []


@pytest.fixture
def few_open_files() -> Iterator[int]:
    """A limit that a process may raise itself."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(os.listdir("/proc/self/fd")) + 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, before[1]))
    yield few
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_there_may_be_more_files_than_a_process_usually_has_open(
    tmp_path: Path, few_open_files: int
) -> None:
    x = torch.arange(1.0, 8 * few_open_files + 1).reshape(-1, 4)
    tensors = {f"x{i:05}": row for i, row in enumerate(x)}
    layout = plan(on_disk(tmp_path / "source", tensors), max_shard_size=16)
    (tmp_path / "out").mkdir()

    write_all(layout, tmp_path / "out")

    assert len(layout.files) == len(tensors) == 2 * few_open_files
    for file in layout.files:
        (slot,) = file.slots
        assert torch.equal(load_file(tmp_path / "out" / file.name)[slot.name], tensors[slot.name])


def run_program(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_limit_on_file_sizes_leaves_nothing_behind(tmp_path: Path) -> None:
    on_disk(tmp_path / "source", {"x": torch.ones(1_000_000)}, files=1, pieces=1)
    program = """
        import resource, signal, sys
        from pathlib import Path
        from ckpt_tools.tensors.catalogue import FlatRange, Fragment, Stored
        from ckpt_tools.tensors.dtypes import FLOAT32
        from ckpt_tools.errors import OutputFailed
        from ckpt_tools.writing.layout import plan
        from ckpt_tools.writing.publish import partial_directory
        from ckpt_tools.writing.units import Units
        from ckpt_tools.writing.bytes import Outputs, lay_out, write

        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        source, out = map(Path, sys.argv[1:])
        x = Stored(FLOAT32, (900_000,), [Fragment(source, 4, FlatRange(0, 900_000))])
        layout = plan({"x": x})
        units = Units(layout)
        try:
            with partial_directory(out, overwrite=False) as partial:
                lay_out(layout, partial.path)
                with Outputs(layout, partial.path) as outputs:
                    write(units, outputs, [range(len(units))])
        except OutputFailed as error:
            print(error.exit_code, error)
    """

    run = run_program(program, tmp_path / "source" / "rank0", tmp_path / "out")

    assert run.stdout.startswith("6 "), run.stderr
    assert "File too large" in run.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


MEMORY = """
    import sys
    from pathlib import Path

    import torch
    from ckpt_tools.tensors.catalogue import FlatRange, Fragment, Stored
    from ckpt_tools.tensors.dtypes import BFLOAT16, FLOAT32
    from ckpt_tools.tensors.derived import cast
    from ckpt_tools.writing.layout import plan
    from ckpt_tools.writing.units import Units
    from ckpt_tools.writing.bytes import Outputs, lay_out, write
    from ckpt_tools.writing.depth import Depth, Level

    source, out, ranks = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    numel = source.stat().st_size // 4
    sizes = [numel // 2, numel // 4, *(numel // 4 // 50 for _ in range(50))]
    tensors, at = {}, 0
    for index, size in enumerate(sizes):
        cuts = [size * i // ranks for i in range(ranks + 1)]
        fragments = [
            Fragment(source, 4 * (at + low), FlatRange(low, high))
            for low, high in zip(cuts, cuts[1:])
        ]
        tensors[f"t{index}"] = cast(Stored(FLOAT32, (size,), fragments), BFLOAT16)
        at += size
    layout = plan(tensors)

    def status(key):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024

    torch.zeros(1000).to(torch.bfloat16)
    before = status("VmRSS:")
    lay_out(layout, out)
    units, digests = Units(layout), {}
    with Outputs(layout, out) as outputs:
        write(
            units,
            outputs,
            [range(len(units))],
            depth=Depth([Level(int(sys.argv[4]), int(sys.argv[5]))]),
            record=lambda block, found: digests.update(enumerate(found, block.first)),
        )
    assert len(digests) == len(units)
    print(layout.tensor_bytes, status("VmHWM:") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured with Linux's /proc")
@pytest.mark.parametrize(
    ("nbytes", "ranks", "level", "limit"),
    [
        (200_000_000, 1, Level(2, 1), 40e6),
        (600_000_000, 1, Level(2, 1), 40e6),
        (600_000_000, 300, Level(2, 1), 120e6),
        (600_000_000, 1, Level(16, 4), 40e6 + MEMORY_BYTES),
    ],
)
def test_memory_does_not_grow_with_the_tensors(
    tmp_path: Path, nbytes: int, ranks: int, level: Level, limit: float
) -> None:
    """Half of it is one tensor; zeros, so that the source takes no disk.

    The limit is the threads' blocks and requests, larger with many ranks, and what torch and threads
    need once.
    """
    source = tmp_path / "source"
    with source.open("wb") as stream:
        stream.truncate(nbytes)

    run = run_program(MEMORY, source, tmp_path, ranks, *level)

    assert run.returncode == 0, run.stderr
    tensor_bytes, growth = map(int, run.stdout.split())
    assert tensor_bytes > 0.49 * nbytes
    assert growth < limit, f"grew by {growth:,} bytes"
