"""Bytes that one rank offers reach the others, and none of them waits for ever for those that do not come."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from ckpt_tools.errors import OutputFailed, RankFailed
from ckpt_tools.ranks import Exchange, Ranks, exchange, session
from ckpt_tools.ranks.clock import Clock
from ckpt_tools.storage.places import LOCAL, FileFacts, Place, Readable, Requests, read_fully
from tests.support.ranks.in_threads import hurried, made, together
from tests.support.waiting import LONGEST_SECONDS, wait_until

__all__ = ["hurried"]
pytestmark = pytest.mark.usefixtures("hurried")


@dataclass
class Memory:
    """A place of files in memory, each opened as the test wants."""

    files: Mapping[str, bytes]
    opening: Callable[[str], object] = str
    at_once: list[int] = field(default_factory=list)
    label: str = "memory"
    requests: ClassVar[Requests] = LOCAL

    def listing(self) -> Mapping[str, FileFacts]:
        return {name: FileFacts(len(data), 0) for name, data in self.files.items()}

    def open(self, relative: str) -> Readable:
        self.opening(relative)
        return Held(self.files[relative], self.at_once)


@dataclass
class Held:
    data: bytes
    at_once: list[int]
    now = 0
    lock = threading.Lock()

    def read_into(self, view: memoryview, offset: int) -> int:
        with self.lock:
            Held.now += 1
            self.at_once.append(Held.now)
        time.sleep(0.002)  # long enough for others to come meanwhile, if they may
        part = self.data[offset : offset + len(view)]
        view[: len(part)] = part
        with self.lock:
            Held.now -= 1
        return len(part)

    def close(self) -> None:
        pass


def ranks_of(size: int, timeout: float = LONGEST_SECONDS) -> list[Ranks]:
    return made(Clock(), size, timeout=timeout, store=HashStore())


def read(place: Place, name: str, offset: int, count: int) -> bytes:
    into = bytearray(count)
    with closing(place.open(name)) as file:
        return bytes(into[: read_fully(file, memoryview(into), offset)])


def files_of(rank: int) -> dict[str, bytes]:
    return {
        f"rank{rank}.pt": random.Random(rank).randbytes(100_000 + rank),
        f"empty{rank}": b"",
    }


def test_every_rank_reads_what_the_others_offer() -> None:
    def body(own: Ranks) -> None:
        with Exchange(own, Memory(files_of(own.rank))) as between:
            for other in range(own.size):
                place = between.place(f"rank {other}", (other,))
                name, data = f"rank{other}.pt", files_of(other)[f"rank{other}.pt"]
                assert place.listing()[name] == FileFacts(len(data), 0)
                if other != own.rank:
                    assert read(place, name, 0, len(data)) == data
                    assert read(place, name, 70_000, 5) == data[70_000:70_005]
                    assert read(place, name, len(data) - 3, 10) == data[-3:]
                    assert read(place, name, len(data) + 5, 10) == b""
                    assert read(place, f"empty{other}", 0, 10) == b""

    assert together(ranks_of(3), body) == [None] * 3


def test_files_of_one_name_in_two_places_of_a_rank_are_told_apart() -> None:
    def body(own: Ranks) -> None:
        mine = [Memory({"file": bytes([own.rank, number]) * (5 + number)}) for number in range(2)]
        with Exchange(own, *mine) as between:
            other = 1 - own.rank
            for number in range(2):
                place = between.place("other", (other,), number)
                assert place.listing()["file"].size == 10 + 2 * number
                assert read(place, "file", 0, 99) == bytes([other, number]) * (5 + number)

    assert together(ranks_of(2), body) == [None] * 2


def test_a_session_after_another_has_other_files_and_the_same_connections() -> None:
    ranks = ranks_of(2)

    def body(own: Ranks) -> Any:
        mine = {"file": bytes([own.rank, own.session_number]) * 10}
        with Exchange(own, Memory(mine)) as between:
            other = 1 - own.rank
            found = read(between.place("other", (other,)), "file", 0, 20)
            assert found == bytes([other, own.session_number]) * 10
            return exchange._kept[own][0]

    assert [together(ranks, body) for _ in range(3)] == [[1, 1]] * 3


def test_many_threads_ask_one_rank_which_holds_few_answers_at_once() -> None:
    data = random.Random(5).randbytes(1_000_000)
    memory = Memory({"file": data})

    def body(own: Ranks) -> None:
        with Exchange(own, memory if own.leads else Memory({})) as between:
            if own.leads:
                return
            place = between.place("leader", (0,))

            def part(start: int) -> bool:
                return read(place, "file", start, 5000) == data[start : start + 5000]

            with ThreadPoolExecutor(16) as pool:
                assert all(pool.map(part, range(0, len(data), 5000)))

    assert together(ranks_of(3), body) == [None] * 3
    assert len(memory.at_once) >= 400
    assert max(memory.at_once) <= 4


def test_several_requests_to_one_open_file_are_under_way() -> None:
    both = threading.Barrier(2, timeout=LONGEST_SECONDS)
    memory = Memory({"file": bytes(range(200))}, lambda relative: both.wait())

    def body(own: Ranks) -> None:
        with Exchange(own, memory) as between:
            if own.leads:
                return
            with closing(between.place("leader", (0,)).open("file")) as file:

                def part(start: int) -> bytes:
                    into = bytearray(100)
                    assert file.read_into(memoryview(into), start) == 100
                    return bytes(into)

                with ThreadPoolExecutor(2) as pool:
                    assert b"".join(pool.map(part, (0, 100))) == memory.files["file"]

    assert together(ranks_of(2), body) == [None] * 2


def test_a_long_run_is_asked_for_in_bounded_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "REQUEST_BYTES", 1000)
    memory = Memory({"file": bytes(range(256)) * 100})

    def body(own: Ranks) -> None:
        with Exchange(own, memory) as between:
            if own.rank:
                place = between.place("leader", (0,))
                assert read(place, "file", 0, 25_600) == memory.files["file"]

    assert together(ranks_of(2), body) == [None] * 2
    assert len(memory.at_once) == 26


def test_what_the_other_cannot_read_is_an_error_here() -> None:
    def refuse(relative: str) -> None:
        if relative == "gone":
            raise FileNotFoundError(errno.ENOENT, "gone", relative)
        if relative == "strange":
            raise ValueError(relative)

    def body(own: Ranks) -> None:
        memory = Memory(dict.fromkeys(["gone", "strange", "good"], b"1"), refuse)
        with Exchange(own, memory) as between:
            place = between.place("other", (1 - own.rank,))
            for name, code in (("gone", errno.ENOENT), ("strange", errno.EIO)):
                with pytest.raises(OSError, match=name) as raised:
                    read(place, name, 0, 1)
                assert raised.value.errno == code
            with pytest.raises(OSError, match="too long"):
                read(place, "n" * 5000, 0, 1)
            assert read(place, "good", 0, 1) == b"1"

    assert together(ranks_of(2), body) == [None] * 2


def test_ranks_of_one_machine_are_asked_in_turn() -> None:
    def body(own: Ranks) -> Any:
        with Exchange(own, Memory({"file": bytes([own.rank])})) as between:
            if own.rank < 2:
                return read(between.place("machine 1", (2, 3)), "file", 0, 1)
            return None

    assert together(ranks_of(4), body)[:2] == [b"\2", b"\3"]


# Failures


def test_who_waits_for_a_rank_that_fails_learns_why() -> None:
    asked = threading.Event()

    ranks = ranks_of(3)

    def slow(relative: str) -> None:
        asked.set()
        assert ranks[0].failed.wait(
            LONGEST_SECONDS
        )  # a slow disk: the answer comes after the failure

    def body(own: Ranks) -> None:
        with Exchange(own, Memory({"file": b"1"}, slow)) as between:
            if own.rank == 1:
                assert asked.wait(LONGEST_SECONDS)
                raise OutputFailed("no space left")
            if own.leads:
                read(between.place("other", (1,)), "file", 0, 1)

    leader, failed, other = together(ranks, body)

    assert isinstance(failed, OutputFailed)
    assert [leader.fact, other.fact] == ["rank 1: no space left"] * 2


def test_a_rank_that_fails_breaks_the_waits_of_those_who_ask_others() -> None:
    asked = threading.Event()
    done = threading.Event()

    def never(relative: str) -> None:
        asked.set()
        done.wait(LONGEST_SECONDS)

    def body(own: Ranks) -> None:
        with Exchange(own, Memory({"file": b"1"}, never)) as between:
            if own.rank == 2:
                assert asked.wait(LONGEST_SECONDS)
                raise OutputFailed("no space left")
            if own.leads:
                read(between.place("other", (1,)), "file", 0, 1)

    outcomes = together(ranks_of(3, timeout=LONGEST_SECONDS), body)
    done.set()

    assert outcomes[0].fact == "rank 2: no space left"


class Waited(threading.Event):
    """An event that tells whether anybody waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waited = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.waited.set()
        return super().wait(timeout)


def test_who_loses_a_connection_hears_first_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_HEAR_SECONDS", LONGEST_SECONDS)
    asked = threading.Event()
    ranks = ranks_of(2)
    failed = ranks[0].failed = Waited()

    def slow(relative: str) -> None:
        asked.set()
        wait_until(failed.is_set)

    def body(own: Ranks) -> None:
        with Exchange(own, Memory({"file": b"1"}, slow)) as between:
            if own.leads:
                read(between.place("other", (1,)), "file", 0, 1)
            assert asked.wait(LONGEST_SECONDS)
            between._break()
            assert failed.waited.wait(LONGEST_SECONDS)
            raise OutputFailed("no space left")

    leader, other = together(ranks, body)

    assert isinstance(other, OutputFailed)
    assert leader.fact == "rank 1: no space left"


def test_an_answer_that_came_in_part_is_not_waited_for_after_a_failure(tmp_path: Path) -> None:
    """gloo never ends the wait for a message whose sender is lost in its middle."""
    half = 1 << 20
    into = bytearray(2 * half)
    asked, done = threading.Event(), threading.Event()

    def never(relative: str) -> None:
        asked.set()
        done.wait(LONGEST_SECONDS)

    def body(own: Ranks) -> None:
        with Exchange(own, Memory({"file": bytes(2 * half)}, never)) as between:
            if own.leads:
                with closing(between.place("other", (1,)).open("file")) as file:
                    read_fully(file, memoryview(into), 0)
            assert asked.wait(LONGEST_SECONDS)
            works = []
            with suppress(RuntimeError):
                for part in (torch.tensor([2 * half]), beyond_its_end(tmp_path / "torn", half)):
                    works.append(between._group.send([part], 0, exchange._FIRST_ANSWER_TAG))
            wait_until(lambda: into[0] == 1)
            raise OutputFailed("no space left")

    leader, other = together(ranks_of(2), body)
    done.set()

    assert into[-1] == 0
    assert isinstance(other, OutputFailed)
    assert leader.fact == "rank 1: no space left"


def beyond_its_end(path: Path, half: int) -> torch.Tensor:
    """Twice ``half`` bytes, of which the system can send only the first half."""
    path.write_bytes(b"\1" * 2 * half)
    with path.open("r+b") as file:
        whole = torch.frombuffer(mmap.mmap(file.fileno(), 2 * half), dtype=torch.uint8)
    os.truncate(path, half)
    return whole


def test_what_a_rank_offered_is_not_held_after_a_failure() -> None:
    """A training goes on after a save that failed, and needs the memory of that save."""
    offered: list[weakref.ref[Memory]] = []

    def body(own: Ranks) -> None:
        place = Memory(files_of(own.rank))
        offered.append(weakref.ref(place))
        with Exchange(own, place):
            if own.rank == 1:
                raise OutputFailed("no space left")
            own.get("never")

    assert all(isinstance(error, Exception) for error in together(ranks_of(2), body))
    gc.collect()

    assert [place() for place in offered] == [None, None]


@pytest.mark.slow
def test_an_answer_may_take_longer_than_to_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one wait of this file for time: gloo has no clock but the system's."""
    monkeypatch.setattr(exchange, "_CONNECT_SECONDS", 4.0)

    def body(own: Ranks) -> Any:
        with Exchange(own, Memory({"file": b"1"}, lambda relative: time.sleep(5))) as between:
            return read(between.place("other", (1 - own.rank,)), "file", 0, 1)

    assert together(ranks_of(2), body) == [b"1"] * 2


@pytest.mark.slow
def test_nobody_waits_longer_than_asked_for_an_answer() -> None:
    done = threading.Event()

    def body(own: Ranks) -> None:
        with Exchange(
            own, Memory({"file": b"1"}, lambda relative: done.wait(LONGEST_SECONDS))
        ) as between:
            if own.leads:
                read(between.place("other", (1,)), "file", 0, 1)

    leader, other = together(ranks_of(2, timeout=2), body)
    done.set()

    assert isinstance(leader, RankFailed)
    assert isinstance(other, RankFailed)


@pytest.mark.slow
def test_a_rank_that_dies_while_it_is_asked_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not leave, and closes nothing: as one that is stopped, or behind a broken cable."""
    monkeypatch.setattr(session, "DEAD_SECONDS", 2.0)
    done = threading.Event()

    def body(own: Ranks) -> None:
        with Exchange(
            own, Memory({"file": b"1"}, lambda relative: done.wait(LONGEST_SECONDS))
        ) as between:
            if own.rank == 1:
                own._pulse.stop()
                done.wait(LONGEST_SECONDS)
                raise SystemExit
            try:
                read(between.place("other", (1,)), "file", 0, 1)
            finally:
                done.set()

    leader, _, other = together(ranks_of(3, timeout=LONGEST_SECONDS), body)

    assert "rank 1 has sent no heartbeat" in leader.fact
    assert "rank 1 has sent no heartbeat" in other.fact


def test_a_rank_that_never_connects_holds_nobody_up() -> None:
    def body(own: Ranks) -> None:
        if own.rank == 1:
            own.put("offered/1", ({}, None))  # as if it were about to connect
            wait_until(
                lambda: [thread.name for thread in threading.enumerate()].count("connect") == 2
            )
            raise OutputFailed("no space left")
        with Exchange(own, Memory({})):
            pass

    leader, failed, other = together(ranks_of(3, timeout=LONGEST_SECONDS), body)

    assert isinstance(failed, OutputFailed)
    assert [leader.fact, other.fact] == ["rank 1: no space left"] * 2


def test_after_a_failure_the_ranks_connect_anew() -> None:
    ranks = ranks_of(2)

    def fail(own: Ranks) -> None:
        with Exchange(own, Memory({})):
            if own.rank == 1:
                raise OutputFailed("no space left")
            own.get("never")

    def work(own: Ranks) -> bytes:
        with Exchange(own, Memory({"file": bytes([own.rank])})) as between:
            return read(between.place("other", (1 - own.rank,)), "file", 0, 1)

    together(ranks, work)
    assert all(isinstance(error, Exception) for error in together(ranks, fail))
    assert together(ranks, work) == [b"\1", b"\0"]
