"""What a journal proves is on disk; all else in it proves nothing; nobody goes on with another's."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_tools.errors import CkptError, OutputFailed, UsageError
from ckpt_tools.writing import journal
from ckpt_tools.writing.bytes import Outputs, lay_out
from ckpt_tools.writing.journal import (
    Identity,
    Lock,
    Log,
    begin,
    find,
    gaps,
    has_proof,
    identity_of,
)
from ckpt_tools.writing.layout import plan
from ckpt_tools.writing.units import Block, Units
from tests.support.waiting import LONGEST_SECONDS, wait_until
from tests.writing.test_bytes import on_disk

MINE = Identity("1.0", "of these files", {"dtype": "auto", "adapter": None}, "of this layout")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A partial directory whose journal has begun."""
    path = tmp_path / "out.partial-01234567"
    path.mkdir()
    begin(path, MINE)
    return path


def line(output: int, file: str, first: int, digests: Sequence[bytes]) -> bytes:
    """A line as the format is documented: JSON, a tab, its XXH64, the end of the line."""
    entry = {"output": output, "file": file, "first": first, "digests": [d.hex() for d in digests]}
    text = json.dumps(entry).encode()
    return text + b"\t" + xxhash.xxh64_hexdigest(text).encode() + b"\n"


def digests(*numbers: int) -> list[bytes]:
    return [bytes([number]) * 16 for number in numbers]


def log(home: Path, content: bytes, name: str = "0123456789ab") -> Path:
    path = home / "journal" / f"{name}.log"
    path.write_bytes(content)
    return path


WHOLE = {0: {"a", "b"}, 1: {"a"}}


# -- whose it is ------------------------------------------------------------------------------------


def test_a_journal_says_whose_it_is(home: Path) -> None:
    assert identity_of(home) == MINE
    assert json.loads((home / "journal" / "run.json").read_text()) == asdict(MINE)


def test_a_beginning_is_on_disk_with_every_name_on_the_way_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever loses power after the first block must find whose the directory is."""
    synced: list[str] = []
    fsync = os.fsync

    def note(fd: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", note)
    home = tmp_path / "out.partial-01234567"
    home.mkdir()

    begin(home, MINE)

    assert synced == ["run.json", "journal", home.name]


def test_a_torn_beginning_is_nobodys(home: Path) -> None:
    whole = (home / "journal" / "run.json").read_bytes()
    for length in range(len(whole)):
        (home / "journal" / "run.json").write_bytes(whole[:length])
        assert identity_of(home) is None
        assert find([home], MINE) is None


FOREIGN = json.dumps({**asdict(MINE), "options": [["dtype", "auto"]]})


@pytest.mark.parametrize(
    "content", ["[]", "3", "null", '{"tool": "1.0"}', '"text"', "\udcff", "", FOREIGN]
)
def test_a_foreign_beginning_is_nobodys(home: Path, content: str) -> None:
    (home / "journal" / "run.json").write_bytes(content.encode("utf-8", "surrogateescape"))

    assert identity_of(home) is None


def test_a_beginning_with_more_in_it_than_is_known_is_nobodys(home: Path) -> None:
    (home / "journal" / "run.json").write_text(json.dumps({**asdict(MINE), "more": 1}))

    assert identity_of(home) is None


def test_a_directory_without_a_journal_is_nobodys(tmp_path: Path) -> None:
    assert identity_of(tmp_path) is None
    assert identity_of(tmp_path / "gone") is None
    assert find([tmp_path, tmp_path / "gone"], MINE) is None
    assert find([], MINE) is None


def test_a_journal_that_cannot_be_begun_is_a_failure_of_the_output(tmp_path: Path) -> None:
    with pytest.raises(OutputFailed):
        begin(tmp_path / "gone", MINE)


OTHERS = [
    ({"tool": "0.9"}, "it was started by ckpt-tools 0.9; this is 1.0"),
    ({"sources": "of others"}, "from another checkpoint, or the checkpoint changed"),
    ({"plan": "of another"}, "with other options, so its layout differs"),
    ({"options": {"dtype": "bf16"}}, "with other options (dtype was bf16, now auto)"),
]


@pytest.mark.parametrize(("change", "why"), OTHERS)
def test_the_journal_of_another_run_is_refused_with_the_reason(
    home: Path, change: dict[str, Any], why: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(why)) as caught:
        find_other(home, change)

    assert caught.value.exit_code == 2
    assert caught.value.path == home
    assert "--resume" in str(caught.value.hint)
    assert f"delete {home}" in str(caught.value.hint)


def find_other(home: Path, change: dict[str, Any]) -> None:
    """Look for one's own where only another's is."""
    (home / "journal" / "run.json").write_text(json.dumps(asdict(replace(MINE, **change))))
    find([home], MINE)


def test_ones_own_is_found_among_others(home: Path, tmp_path: Path) -> None:
    homes = [tmp_path / f"out.partial-{number}" for number in range(3)]
    for number, other in enumerate(homes):
        other.mkdir()
        if number:
            begin(other, replace(MINE, plan=f"{number}"))

    assert find([*homes, home], MINE) == home
    assert find([home, *homes], MINE) == home


# -- the lock ---------------------------------------------------------------------------------------


@pytest.fixture
def holder(home: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    program = (
        "import sys; from pathlib import Path; from ckpt_tools.writing.journal import Lock\n"
        "lock = Lock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(home)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_directory_that_a_living_process_writes_into_is_refused(
    home: Path, holder: subprocess.Popen[str]
) -> None:
    with pytest.raises(UsageError, match="another run is writing there") as caught:
        Lock(home)

    assert caught.value.exit_code == 2
    assert caught.value.path == home
    assert "or stop it" in str(caught.value.hint)
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(UsageError):
        Lock(home)


def test_the_lock_of_a_killed_process_is_free(home: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()

    Lock(home).close()


def test_a_lock_is_free_once_it_is_closed(home: Path) -> None:
    for _ in range(3):
        lock = Lock(home)
        with pytest.raises(UsageError):
            Lock(home)
        lock.close()


def test_a_refused_lock_leaves_no_file_open(home: Path) -> None:
    lock = Lock(home)
    before = len(list(Path("/proc/self/fd").iterdir()))

    for _ in range(5):
        with pytest.raises(UsageError):
            Lock(home)

    assert len(list(Path("/proc/self/fd").iterdir())) == before
    lock.close()


def test_a_directory_is_locked_before_anybody_can_find_its_journal(tmp_path: Path) -> None:
    """Or another run could go on with it between the two."""
    home = tmp_path / "out.partial-0"
    home.mkdir()
    lock = Lock(home)
    assert find([home], MINE) is None

    begin(home, MINE)

    assert find([home], MINE) == home
    lock.close()


def test_a_file_system_without_locks_does_without(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)

    Lock(home).close()


def test_a_directory_that_is_gone_cannot_be_locked(tmp_path: Path) -> None:
    with pytest.raises(OutputFailed):
        Lock(tmp_path / "gone")


def test_closing_the_lock_removes_what_nfs_left_of_a_removed_directory(home: Path) -> None:
    lock = Lock(home)
    (home / "journal" / "run.json").unlink()
    (home / "journal" / ".nfs0123").write_text("the lock, under the name that NFS gives it")

    lock.close()

    assert not home.exists()


def test_closing_the_lock_leaves_a_directory_that_was_kept(home: Path) -> None:
    Lock(home).close()

    assert identity_of(home) == MINE


# -- what a log proves ------------------------------------------------------------------------------


def test_a_line_proves_its_units(home: Path) -> None:
    log(home, line(0, "a", 3, digests(1, 2)) + line(1, "a", 0, digests(3)))

    proven = journal.proven(home, WHOLE)

    assert proven == {0: {3: bytes([1]) * 16, 4: bytes([2]) * 16}, 1: {0: bytes([3]) * 16}}


def test_the_logs_of_several_processes_add_up(home: Path) -> None:
    log(home, line(0, "a", 0, digests(1)), "0" * 12)
    log(home, line(0, "b", 7, digests(2)), "1" * 12)
    log(home, b"", "2" * 12)

    assert journal.proven(home, WHOLE) == {0: {0: bytes([1]) * 16, 7: bytes([2]) * 16}}


def test_what_was_in_a_file_that_is_not_whole_is_not_proven(home: Path) -> None:
    log(
        home,
        line(0, "a", 0, digests(1)) + line(0, "b", 5, digests(2)) + line(2, "a", 0, digests(3)),
    )

    assert journal.proven(home, {0: {"b"}, 1: {"a"}}) == {0: {5: bytes([2]) * 16}}
    assert journal.proven(home, {}) == {}


LINES = [line(0, "a", 0, digests(1, 2)), line(0, "a", 2, digests(3)), line(0, "b", 9, digests(4))]
UNITS = [{0, 1}, {2}, {9}]


def units_proven(home: Path) -> set[int]:
    found = journal.proven(home, WHOLE)
    assert found.keys() <= {0}
    for unit, digest in found.get(0, {}).items():
        assert digest == bytes([{0: 1, 1: 2, 2: 3, 9: 4}[unit]]) * 16
    return set(found.get(0, {}))


def test_a_torn_log_proves_the_lines_before_the_tear(home: Path) -> None:
    content = b"".join(LINES)
    for length in range(len(content) + 1):
        log(home, content[:length])
        ended = [
            unit for at, units in zip(ends(), UNITS, strict=True) if at <= length for unit in units
        ]
        # A line that lacks only its end is there in full.
        lacking = [
            u for at, units in zip(ends(), UNITS, strict=True) if at == length + 1 for u in units
        ]
        assert units_proven(home) == {*ended, *lacking}


def ends() -> list[int]:
    return [sum(map(len, LINES[: count + 1])) for count in range(len(LINES))]


@pytest.mark.slow
def test_a_flipped_bit_takes_its_line_along_and_no_other(home: Path) -> None:
    content = b"".join(LINES)
    for position in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            log(home, bytes(damaged))
            hit = sum(at <= position for at in ends())
            lost = UNITS[hit]
            if position + 1 in ends() and hit + 1 < len(UNITS):
                lost = lost | UNITS[hit + 1]  # the end of a line: the next is no line any more
            found = units_proven(home)
            assert found | lost == {0, 1, 2, 9}
            assert not found & lost or position + 1 == len(content)


FOREIGN = [
    b"\n\n\n",
    b"\0" * 5000 + b"\n",
    b"somebody's text\n",
    b"{}\n",
    b'{"output": 0, "file": "a", "first": 0, "digests": []}\n',
    LINES[0].replace(b"\t", b" "),
    LINES[0].replace(b"\n", b"\r\n"),
    LINES[0][:-17] + LINES[1][-17:],
    b"\t" + LINES[0],
    random.Random(0).randbytes(1_000).replace(b"\n", b"") + b"\n",
]


@pytest.mark.parametrize("foreign", FOREIGN, ids=range(len(FOREIGN)))
def test_foreign_lines_prove_nothing_and_take_nothing_along(home: Path, foreign: bytes) -> None:
    log(home, foreign)
    assert units_proven(home) == set()
    assert not has_proof(home)

    log(home, LINES[1] + foreign + LINES[2])
    assert units_proven(home) == {2, 9}
    assert has_proof(home)


def test_something_is_proven_only_by_a_whole_line(home: Path) -> None:
    assert not has_proof(home)
    log(home, b"")
    assert not has_proof(home), "a disk that was full when the log was made"
    log(home, LINES[0][:30])
    assert not has_proof(home)
    log(home, LINES[0])
    assert has_proof(home)


# -- files that are made anew -----------------------------------------------------------------------


def test_what_is_said_of_a_lost_file_is_struck_out_for_good(home: Path) -> None:
    """It is made anew, with zeros in it, and must not count as written the next time either."""
    log(home, b"".join(LINES) + b"torn", "0" * 12)
    other = log(home, line(0, "b", 11, digests(5)), "1" * 12)
    before = other.stat()

    journal.keep(home, {0: {"b"}, 1: {"a"}})

    assert journal.proven(home, WHOLE) == {0: {9: bytes([4]) * 16, 11: bytes([5]) * 16}}
    assert (other.stat().st_ino, other.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert sorted(path.suffix for path in (home / "journal").iterdir()) == [".json", ".log", ".log"]
    journal.keep(home, {})
    assert journal.proven(home, WHOLE) == {}
    assert not has_proof(home)


def test_logs_that_cannot_be_rewritten_are_a_failure_of_the_output(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = log(home, LINES[0])

    def refuse(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OutputFailed, match="no space left"):
        journal.keep(home, {})

    assert path.read_bytes() == LINES[0]


# -- gaps -------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.sets(st.integers(0, 90)))
def test_gaps_are_what_is_not_done_in_the_longest_runs(
    start: int, count: int, done: set[int]
) -> None:
    units = range(start, start + count)

    found = gaps(units, dict.fromkeys(done))

    assert [unit for gap in found for unit in gap] == [u for u in units if u not in done]
    assert all(gap for gap in found)
    for one, two in itertools.pairwise(found):
        assert one.stop < two.start


# -- writing a log ----------------------------------------------------------------------------------


class Disk:
    """The files of a small plan, and what happens to them and to the log, in order."""

    def __init__(self, directory: Path) -> None:
        tensors = {f"t{i}": torch.full((2_000,), i + 1.0) for i in range(4)}
        layout = plan(on_disk(directory / "source", tensors), max_shard_size=16_000)
        (directory / "output").mkdir()
        lay_out(layout, directory / "output")
        self.units = Units(layout)
        self.outputs = Outputs(layout, directory / "output")
        self.names = [file.name for file in layout.files]
        self.blocks = list(self.units.blocks(range(len(self.units))))
        assert len(self.blocks) == len(self.names) == 2

    def digests(self, block: Block) -> list[bytes]:
        return [bytes([unit % 256]) * 16 for unit in range(block.first, block.last)]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path)
    with disk.outputs:
        yield disk


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_INTERVAL_SECONDS", 0.002)


@pytest.mark.usefixtures("at_once")
def test_what_is_recorded_is_noted_and_read_back(home: Path, disk: Disk) -> None:
    with Log(home, 1, disk.outputs, disk.names) as written:
        for block in disk.blocks:
            written.record(block, disk.digests(block))
        wait_until(lambda: written.noted == 2)

    whole = {1: set(disk.names)}
    expected = {u: bytes([u % 256]) * 16 for u in range(len(disk.units))}
    assert journal.proven(home, whole) == {1: expected}
    assert written.digests == expected
    assert journal.proven(home, {1: {disk.names[1]}})[1].keys() == set(
        range(disk.blocks[1].first, disk.blocks[1].last)
    )
    (path,) = (home / "journal").glob("*.log")
    assert path.read_bytes() == b"".join(
        line(1, disk.names[block.file], block.first, disk.digests(block)) for block in disk.blocks
    )


def test_a_block_is_noted_after_its_file_is_on_disk_and_not_before(
    home: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, at_once: None
) -> None:
    syncing, go_on = threading.Event(), threading.Event()
    synced: list[set[int]] = []

    def sync(files: Any) -> None:
        syncing.set()
        assert go_on.wait(LONGEST_SECONDS)
        synced.append(set(files))

    monkeypatch.setattr(disk.outputs, "sync", sync)
    with Log(home, 0, disk.outputs, disk.names) as written:
        written.record(disk.blocks[1], disk.digests(disk.blocks[1]))
        try:
            assert syncing.wait(LONGEST_SECONDS)
            # Written while the other is synced: the next round's.
            written.record(disk.blocks[0], disk.digests(disk.blocks[0]))
            assert written.noted == 0
            assert not has_proof(home)
        finally:
            go_on.set()  # the log waits for it, whatever was found
        wait_until(lambda: written.noted == 2)

    assert synced == [{1}, {0}]


def test_what_was_not_synced_yet_is_not_noted(
    home: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_INTERVAL_SECONDS", 600)
    with Log(home, 0, disk.outputs, disk.names) as written:
        written.record(disk.blocks[0], disk.digests(disk.blocks[0]))

    assert not has_proof(home)
    assert written.digests.keys() == set(range(disk.blocks[0].first, disk.blocks[0].last))


def refuse_to_sync(files: Any) -> None:
    raise OutputFailed("cannot be written (Input/output error)")


@pytest.mark.usefixtures("at_once")
def test_a_disk_that_fails_ends_the_next_write_and_notes_nothing(
    home: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.outputs, "sync", refuse_to_sync)

    def write() -> None:
        with Log(home, 0, disk.outputs, disk.names) as written:
            written.record(disk.blocks[0], disk.digests(disk.blocks[0]))
            wait_until(lambda: not written._thread.is_alive())
            written.record(disk.blocks[0], disk.digests(disk.blocks[0]))
            pytest.fail("nobody was told")

    with pytest.raises(OutputFailed, match="Input/output error"):
        write()

    assert not has_proof(home)


@pytest.mark.usefixtures("at_once")
def test_a_disk_that_fails_after_the_last_write_is_not_overlooked(
    home: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells of lost bytes once: a later sync of the same file would be told nothing."""
    told: list[set[int]] = []

    def sync(files: Any) -> None:
        told.append(set(files))
        refuse_to_sync(files)

    def write() -> None:
        with Log(home, 0, disk.outputs, disk.names) as written:
            written.record(disk.blocks[0], disk.digests(disk.blocks[0]))
            wait_until(lambda: told)

    monkeypatch.setattr(disk.outputs, "sync", sync)
    with pytest.raises(OutputFailed, match="Input/output error"):
        write()


@pytest.mark.usefixtures("at_once")
def test_a_failing_disk_does_not_hide_what_went_wrong_first(
    home: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()

    def sync(files: Any) -> None:
        failed.set()
        refuse_to_sync(files)

    def write() -> None:
        with Log(home, 0, disk.outputs, disk.names) as written:
            written.record(disk.blocks[0], disk.digests(disk.blocks[0]))
            assert failed.wait(LONGEST_SECONDS)
            raise CkptError("first")

    monkeypatch.setattr(disk.outputs, "sync", sync)
    with pytest.raises(CkptError, match="first"):
        write()


@pytest.mark.usefixtures("at_once")
def test_a_journal_without_room_is_a_failure_of_the_output(home: Path, disk: Disk) -> None:
    shutil.rmtree(home / "journal")

    def write() -> None:
        with Log(home, 0, disk.outputs, disk.names) as written:
            written.record(disk.blocks[0], disk.digests(disk.blocks[0]))
            wait_until(lambda: not written._thread.is_alive())
            written.record(disk.blocks[0], disk.digests(disk.blocks[0]))
            pytest.fail("nobody was told")

    with pytest.raises(OutputFailed, match="No such file"):
        write()


@pytest.mark.usefixtures("at_once")
def test_no_thread_outlives_its_log(home: Path, disk: Disk) -> None:
    before = threading.active_count()
    with Log(home, 0, disk.outputs, disk.names):
        assert threading.active_count() > before

    assert threading.active_count() == before


@pytest.mark.usefixtures("at_once")
def test_two_logs_of_one_output_never_share_a_file(home: Path, disk: Disk) -> None:
    with (
        Log(home, 0, disk.outputs, disk.names) as one,
        Log(home, 0, disk.outputs, disk.names) as two,
    ):
        one.record(disk.blocks[0], disk.digests(disk.blocks[0]))
        two.record(disk.blocks[1], disk.digests(disk.blocks[1]))
        wait_until(lambda: one.noted == two.noted == 1)

    assert len(list((home / "journal").glob("*.log"))) == 2
    assert len(journal.proven(home, {0: set(disk.names)})[0]) == len(disk.units)
