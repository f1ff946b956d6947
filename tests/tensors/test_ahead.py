"""What is needed first is read into the page cache before; files that are there, or far, are not."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from ckpt_tools.storage import residence
from ckpt_tools.storage.pool import Pool
from ckpt_tools.storage.residence import Residence
from ckpt_tools.tensors import ahead
from ckpt_tools.tensors.ahead import reading_ahead
from ckpt_tools.tensors.catalogue import FlatRange, Fragment, Stored
from ckpt_tools.tensors.dtypes import FLOAT32
from tests.support.in_memory import Memory

SIZE = 1 << 20


class Sent:
    """What the kernel is asked to read, as file name, first byte and end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs: list[tuple[str, int, int]] = []
        self.fails_after = -1
        monkeypatch.setattr(os, "sendfile", self)

    def __call__(self, out: int, fd: int, offset: int, count: int) -> int:
        assert os.readlink(f"/proc/self/fd/{out}") == os.devnull
        if len(self.runs) == self.fails_after:
            raise OSError(5, "Input/output error")
        name = Path(os.readlink(f"/proc/self/fd/{fd}")).name
        count = min(count, SIZE - offset)
        self.runs.append((name, offset, offset + count))
        return count


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    monkeypatch.setattr(residence, "is_resident", lambda fd: False)
    monkeypatch.setattr(ahead, "_STEP_BYTES", 10_000)
    return Sent(monkeypatch)


def tensors(directory: Path, *, rows: int = 4, ranks: int = 2) -> list[Stored]:
    """Tensors of 8,000 bytes of each rank, one after another in its file."""
    found = []
    for rank in range(ranks):
        (directory / f"{rank}").write_bytes(bytes(SIZE))
    for row in range(rows):
        regions = [FlatRange(2_000 * rank, 2_000 * (rank + 1)) for rank in range(ranks)]
        parts = [Fragment(directory / f"{i}", 8_000 * row, r) for i, r in enumerate(regions)]
        found.append(Stored(FLOAT32, (2_000 * ranks,), parts))
    return found


def read(tensors: list[Stored]) -> None:
    """Read ahead until nothing is left."""
    with reading_ahead(tensors, Residence()):
        for thread in threading.enumerate():
            if thread.name == "ahead":
                thread.join()


def test_neighbours_are_read_together_in_windows(
    tmp_path: Path, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "_WINDOW_BYTES", 32_000)
    read(tensors(tmp_path))
    assert sent.runs == [
        ("0", 0, 10_000),
        ("0", 10_000, 16_000),
        ("1", 0, 10_000),
        ("1", 10_000, 16_000),
        ("0", 16_000, 26_000),
        ("0", 26_000, 32_000),
        ("1", 16_000, 26_000),
        ("1", 26_000, 32_000),
    ]


def test_no_more_is_read_than_the_limit(
    tmp_path: Path, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "MOST_BYTES", 25_000)
    read(tensors(tmp_path))
    assert sum(stop - start for _, start, stop in sent.runs) == 25_000


def test_the_end_of_the_block_ends_it(
    tmp_path: Path, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ends = threading.Event(), threading.Event()

    def slow(*arguments: int) -> int:
        begun.set()
        assert ends.wait(60)
        return sent(*arguments)

    monkeypatch.setattr(os, "sendfile", slow)
    with reading_ahead(tensors(tmp_path), Residence()):
        assert begun.wait(60)
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "ahead"]
    ends.set()
    thread.join()
    assert sent.runs == [("0", 0, 10_000)]


def test_what_cannot_be_read_is_left_to_whoever_needs_it(tmp_path: Path, sent: Sent) -> None:
    sent.fails_after = 1
    read(tensors(tmp_path))
    assert sent.runs == [("0", 0, 10_000)]

    gone = tensors(tmp_path)
    (tmp_path / "0").unlink()
    read(gone)
    assert sent.runs == [("0", 0, 10_000)]


def test_a_file_in_memory_and_one_of_another_place_are_left_alone(
    tmp_path: Path, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = Pool(tmp_path, [Memory({"0": bytes(SIZE)})])
    read([Stored(FLOAT32, (1_000,), [Fragment(far.path("0"), 0, FlatRange(0, 1_000))])])
    monkeypatch.setattr(residence, "is_resident", lambda fd: True)
    read(tensors(tmp_path))
    assert sent.runs == []


def test_what_was_read_ahead_counts_as_not_in_memory_before(
    tmp_path: Path, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Residence()
    with reading_ahead(tensors(tmp_path, ranks=1), files):
        for thread in threading.enumerate():
            if thread.name == "ahead":
                thread.join()
    monkeypatch.setattr(residence, "is_resident", lambda fd: True)
    dropped: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *asked: dropped.append(asked[3]))
    files.open(tmp_path / "0").read_into(memoryview(bytearray(SIZE)), 0)
    assert dropped == [os.POSIX_FADV_DONTNEED]
