"""The depth of requests grows where threads wait for a slow place, and nowhere else."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ckpt_tools.storage.places import LOCAL, Requests
from ckpt_tools.storage.pool import Pool
from ckpt_tools.tensors.catalogue import FlatRange, Fragment, Stored
from ckpt_tools.tensors.derived import cast
from ckpt_tools.tensors.dtypes import BFLOAT16, FLOAT32
from ckpt_tools.writing.bytes import Outputs, lay_out, write
from ckpt_tools.writing.depth import MEMORY_BYTES, Depth, Level, levels
from ckpt_tools.writing.layout import plan
from ckpt_tools.writing.units import Units
from tests.support.in_memory import Memory, MemoryFile
from tests.support.waiting import LONGEST_SECONDS
from tests.writing.test_layout import with_blocks_of

BLOCK = 2 << 20


class Simulated:
    """Threads on a machine of two cores that move blocks of 2 MiB, each read in 5 requests.

    Args:
        latency: seconds of a request.
        work: seconds of a core for each block.
        disk: the most bytes a second that the place gives.
    """

    def __init__(self, latency: float, work: float, disk: float = 1e12) -> None:
        self.latency, self.work, self.disk = latency, work, disk
        self.now = 0.0
        self.depth = Depth(levels(2, BLOCK, LOCAL), lambda: self.now)

    def run(self, blocks: int) -> set[Level]:
        """Move blocks; the levels that were used meanwhile."""
        seen = set()
        for _ in range(blocks):
            level = self.depth.level
            seen.add(level)
            waited = self.latency * -(-5 // level.at_once)
            rate = min(level.threads / (waited + self.work), 2 / self.work, self.disk / BLOCK)
            took = level.threads / rate
            self.depth.moved(BLOCK, took - self.work, took)
            self.now += 1 / rate
        return seen


def test_a_place_that_answers_slowly_is_read_in_as_many_requests_as_the_memory_allows() -> None:
    place = Simulated(latency=0.01, work=0.001)
    place.run(400)

    top = levels(2, BLOCK, LOCAL)[-1]
    assert place.depth.level == top == Level(13, 5)
    assert place.depth.most_threads == 13


def test_the_depth_is_no_larger_than_the_processors_can_use() -> None:
    """Two cores are busy with 8 threads; 13 do not raise the rate, so the step is taken back."""
    place = Simulated(latency=0.01, work=0.004)
    seen = place.run(2000)
    assert Level(13, 5) in seen
    assert place.depth.level == Level(8, 5)


@pytest.mark.parametrize("disk", [50e6, 1e9])
def test_a_disk_that_is_busy_is_asked_again_ever_more_rarely(disk: float) -> None:
    place = Simulated(latency=1e-5, work=1e-4, disk=disk)
    first, second = levels(2, BLOCK, LOCAL)[:2]
    tried = [place.run(400) == {first, second} for _ in range(100)]
    assert place.depth.level == first
    assert sum(tried[:10]) > 1
    assert sum(tried[50:]) <= 2


def test_where_nothing_waits_no_step_is_tried() -> None:
    place = Simulated(latency=1e-5, work=0.001)
    assert place.run(1000) == {levels(2, BLOCK, LOCAL)[0]}


@pytest.mark.parametrize("block", [64, 100_000, 2 << 20, 32 << 20])
@pytest.mark.parametrize("threads", [1, 2, 16, 64])
def test_levels_are_bounded(threads: int, block: int) -> None:
    first, *more = levels(threads, block, LOCAL)
    assert first == Level(threads, 1)
    assert all(t * (block + n * LOCAL.nbytes) <= MEMORY_BYTES for t, n in more)
    assert all(t <= max(threads, 16) and t * n <= 80 for t, n in more)
    assert [first, *more] == sorted({first, *more})


def test_what_a_place_states_is_not_changed() -> None:
    stated = Requests(at_once=32, threads=4, buffer_bytes=12 * BLOCK)
    assert levels(2, BLOCK, stated) == (Level(4, 32),)


class Gated(Memory):
    """Files whose requests wait, once the gate is closed, until as many are under way as is expected."""

    def __init__(self, files: dict[str, bytes], expected: int) -> None:
        super().__init__(files, short=1 << 20)
        self.expected = expected
        self.is_closed = False
        self.under_way = self.most = 0
        self.changed = threading.Condition()

    def open(self, relative: str) -> MemoryFile:
        return GatedFile(self, self.files[relative])


class GatedFile(MemoryFile):
    """One of them, open."""

    def __init__(self, place: Gated, data: bytes) -> None:
        super().__init__(place, data)
        self._gate = place

    def read_into(self, view: memoryview, offset: int) -> int:
        gate = self._gate
        with gate.changed:
            gate.under_way += 1
            gate.most = max(gate.most, gate.under_way)
            gate.changed.notify_all()
            if gate.is_closed:
                assert gate.changed.wait_for(lambda: gate.most >= gate.expected, LONGEST_SECONDS)
        count = super().read_into(view, offset)
        with gate.changed:
            gate.under_way -= 1
        return count

    def close(self) -> None:
        """Nothing is held."""


class Forced(Depth):
    """Takes the next level once ten blocks were moved, whatever is measured, and closes the gate."""

    def __init__(self, choice: tuple[Level, Level], gate: Gated) -> None:
        super().__init__(choice)
        self._left, self._gate = 10, gate

    def moved(self, nbytes: int, waited: float, took: float) -> None:
        self._left -= 1
        if not self._left:
            self._at, self._gate.is_closed = 1, True


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (Level(1, 1), Level(1, 3)),
        (Level(1, 1), Level(4, 1)),
        (Level(1, 1), Level(4, 3)),
        (Level(4, 3), Level(1, 1)),
    ],
)
def test_so_many_requests_are_under_way(first: Level, then: Level, tmp_path: Path) -> None:
    """Every block is read from three files, whatever the level."""
    rows, width = 128, 3 * 512
    truth = torch.arange(rows * width, dtype=torch.float32)
    parts = truth.view(rows, 3, -1).transpose(0, 1).contiguous()
    files = {f"{i}": parts[i].numpy().tobytes() for i in range(3)}
    place = Gated(files, then.threads * then.at_once)
    pool = Pool(tmp_path / "source", [place])
    third = width // 3

    def tensor(row: int) -> Stored:
        regions = [FlatRange(i * third, (i + 1) * third) for i in range(3)]
        at = 4 * row * third
        held = [Fragment(pool.path(f"{i}"), at, region) for i, region in enumerate(regions)]
        return Stored(FLOAT32, (width,), held)

    tensors = {f"t{row:03}": cast(tensor(row), BFLOAT16) for row in range(rows)}
    layout = with_blocks_of(plan(tensors), 2 * width)
    out = tmp_path / "out"
    out.mkdir()
    lay_out(layout, out)
    units = Units(layout)
    with Outputs(layout, out) as outputs:
        done = write(units, outputs, [range(len(units))], depth=Forced((first, then), place))

    assert done.bytes_read == truth.nbytes
    assert place.most <= max(level.threads * level.at_once for level in (first, then))
    written = load_file(out / layout.files[0].name)
    assert torch.equal(torch.cat([written[name] for name in sorted(written)]), truth.bfloat16())


def test_a_step_takes_two_levels_where_threads_only_wait_and_one_after_it_was_of_no_use() -> None:
    first, second, third, *_ = levels(2, BLOCK, LOCAL)
    slow = Simulated(latency=0.01, work=0.001)
    assert slow.run(30) >= {first, third}
    assert second not in slow.run(400)

    busy = Simulated(latency=1e-5, work=1e-4, disk=50e6)
    assert busy.run(400) == {first, third, second}
    assert busy.depth.level == first
