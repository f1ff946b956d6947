"""Ranks tell each other values, and one that fails, dies or stands still ends all of them."""

from __future__ import annotations

import random
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch._C._distributed_c10d import HashStore, TCPStore

from ckpt_tools.errors import CkptError, DamagedCheckpoint, OutputFailed, RankFailed
from ckpt_tools.ranks import Ranks, pulse
from tests.support.ranks.in_threads import Store, at_once, clock, made, together
from tests.support.ranks.simulated import SimulatedClock

__all__ = ["clock"]


def told(ranks: list[Ranks]) -> list[int]:
    """Ranks that tell the user why they ended."""
    return [number for number, own in enumerate(ranks) if own.told_elsewhere is False]


def assert_failed(error: Any, fact: str) -> None:
    assert type(error) is RankFailed, error
    assert fact in error.fact


# Values


def test_every_rank_gets_the_values_of_all_by_rank(clock: SimulatedClock) -> None:
    found = together(made(clock, 3), lambda own: own.all_gather("square", own.rank**2))

    assert found == [[0, 1, 4]] * 3


def test_only_the_leader_gathers(clock: SimulatedClock) -> None:
    assert together(made(clock, 3), lambda own: own.gather("rank", own.rank)) == [
        [0, 1, 2],
        None,
        None,
    ]


def test_a_value_larger_than_the_store_takes_travels_in_parts(clock: SimulatedClock) -> None:
    port_of = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    limit = timedelta(seconds=30)
    clients = [TCPStore("127.0.0.1", port_of.port, timeout=limit) for _ in range(2)]
    ranks = [Ranks(client, rank, 2, "here", 30, clock) for rank, client in enumerate(clients)]
    large = random.Random(7).randbytes(9 << 20)

    def body(own: Ranks) -> bool:
        if own.leads:
            own.put("large", large)
        return bool(own.get("large") == large)

    assert together(ranks, body) == [True, True]


def test_ranks_know_which_of_them_share_a_machine(clock: SimulatedClock) -> None:
    found = together(made(clock, 5), lambda own: (own.names, own.machines))

    names = ("machine-0", "machine-0", "machine-1", "machine-1", "machine-2")
    assert found == [(names, (0, 0, 1, 1, 2))] * 5


def test_the_leader_knows_how_many_bytes_all_have_finished(clock: SimulatedClock) -> None:
    def body(own: Ranks) -> int:
        own.active(100 * (own.rank + 1))
        own.clock.sleep(2 * pulse.BEAT_SECONDS)
        own.all_gather("noted", None)
        return own.nbytes()

    assert together(made(clock, 3), body)[0] == 600


# Sessions


def test_a_session_sees_nothing_of_the_one_before(clock: SimulatedClock) -> None:
    ranks = made(clock, 2)

    def body(own: Ranks) -> Any:
        if own.leads:
            own.put("often", own.session_number)
            if own.session_number == 1:
                own.put("once", 0)
            own.put("last", None)
        return own.first(("once", "last")), own.get("often")

    assert [together(ranks, body) for _ in range(3)] == [
        [("once", 1)] * 2,
        [("last", 2)] * 2,
        [("last", 3)] * 2,
    ]


def test_a_training_of_many_sessions_does_not_fill_the_store(clock: SimulatedClock) -> None:
    store = HashStore()
    ranks = made(clock, 2, store=store)
    counts = []

    def body(own: Ranks) -> None:
        own.all_gather("value", own.rank)
        if own.session_number == 2:
            raise OutputFailed("no space left")

    for _ in range(4):
        together(ranks, body)
        counts.append(store.num_keys())

    assert counts[0] == counts[2] == counts[3], counts


def test_a_session_after_a_failed_one_is_as_any_other(clock: SimulatedClock) -> None:
    ranks = made(clock, 3)

    def fail(own: Ranks) -> None:
        if own.rank == 2:
            raise OutputFailed("no space left")
        own.get("never")

    assert all(isinstance(error, CkptError) for error in together(ranks, fail))
    assert together(ranks, lambda own: own.all_gather("rank", own.rank)) == [[0, 1, 2]] * 3


# Failures


def test_a_failed_follower_ends_all_with_its_message_told_by_the_leader(
    clock: SimulatedClock,
) -> None:
    damage = DamagedCheckpoint("it ends early", path="shard.pt", tensor="w", hint="Copy it anew.")

    def body(own: Ranks) -> None:
        if own.rank == 1:
            raise damage
        own.get("never")

    leader, failed, other = together(ranks := made(clock, 3), body)

    assert failed is damage
    for error in (leader, other):
        assert_failed(error, "rank 1: it ends early")
        assert (error.path, error.tensor, error.hint) == (Path("shard.pt"), "w", "Copy it anew.")
        assert error.exit_code == DamagedCheckpoint.exit_code
    assert told(ranks) == [0]


def test_a_failed_leader_ends_all(clock: SimulatedClock) -> None:
    def body(own: Ranks) -> None:
        if own.leads:
            raise OutputFailed("no space left")
        own.get("plan")

    leader, *others = together(ranks := made(clock, 3), body)

    assert isinstance(leader, OutputFailed)
    for error in others:
        assert_failed(error, "rank 0: no space left")
    assert told(ranks) == [0]


def test_a_failure_reaches_a_rank_that_waits_for_nothing(clock: SimulatedClock) -> None:
    def body(own: Ranks) -> None:
        if own.rank == 1:
            raise OutputFailed("no space left")
        assert own.clock.wait(own.failed, 5)

    leader, _, other = together(made(clock, 3), body)

    assert_failed(leader, "rank 1: no space left")
    assert_failed(other, "rank 1: no space left")


def test_what_nobody_foresaw_is_told_by_its_name(clock: SimulatedClock) -> None:
    def body(own: Ranks) -> None:
        if own.rank == 1:
            raise ZeroDivisionError("division by zero\nand more")
        own.get("never")

    leader, failed = together(made(clock, 2), body)

    assert isinstance(failed, ZeroDivisionError)
    assert_failed(leader, "rank 1: ZeroDivisionError: division by zero")
    assert leader.exit_code == RankFailed.exit_code


@pytest.mark.parametrize("end", [SystemExit(143), KeyboardInterrupt()])
def test_a_signal_stays_a_signal_where_it_came(clock: SimulatedClock, end: BaseException) -> None:
    def body(own: Ranks) -> None:
        if own.rank == 1:
            raise end
        own.get("never")

    leader, failed = together(ranks := made(clock, 2), body)

    assert failed is end
    assert_failed(leader, "rank 1: ended by a signal")
    assert told(ranks) == [0]


def test_of_several_failures_one_is_told(clock: SimulatedClock) -> None:
    def body(own: Ranks) -> None:
        raise OutputFailed(f"no space left for rank {own.rank}")

    outcomes = together(ranks := made(clock, 4), body)

    assert [type(error) for error in outcomes] == [OutputFailed] * 4
    assert told(ranks) == [0]


def test_an_error_that_only_follows_from_another_gives_way_to_it(clock: SimulatedClock) -> None:
    def body(own: Ranks) -> None:
        if own.rank == 1:
            raise OutputFailed("no space left")
        own.clock.sleep(2 * pulse.BEAT_SECONDS)
        raise RankFailed("rank 1 gives no answer")

    leader, _ = together(made(clock, 2), body)

    assert_failed(leader, "rank 1: no space left")


def test_the_leader_tidies_up_only_when_all_have_stopped(clock: SimulatedClock) -> None:
    stopped = threading.Event()

    def body(own: Ranks) -> bool:
        if own.leads:
            try:
                with own.ending_all():
                    raise OutputFailed("no space left")
            finally:
                assert stopped.is_set()
        else:
            own.clock.wait(own.failed, 10)
            own.clock.sleep(5)  # a block that is being written
            stopped.set()
            own.check()
        return False

    leader, follower = together(made(clock, 2), body)

    assert isinstance(leader, OutputFailed)
    assert_failed(follower, "rank 0: no space left")


def test_others_wait_until_the_leader_has_tidied_up(clock: SimulatedClock) -> None:
    left = []

    def body(own: Ranks) -> None:
        if own.leads:
            own.clock.wait(own.failed, 10)
            own.clock.sleep(5)
            left.append("tidy")
            own.check()
        try:
            raise OutputFailed("no space left")
        finally:
            own.active()

    ranks = made(clock, 2)
    together(ranks, body)

    assert left
    assert told(ranks) == [0]


# Ranks that are lost


def test_a_follower_that_dies_is_missed_by_a_leader_that_waits_for_it(
    clock: SimulatedClock,
) -> None:
    def body(own: Ranks) -> None:
        if own.rank == 1:
            die(own)
        own.all_gather("value", None)

    leader, _, other = together(made(clock, 3), body)

    assert_failed(leader, "rank 1 has sent no heartbeat")
    assert_failed(other, "rank 0: rank 1 has sent no heartbeat")


def test_a_follower_that_dies_is_missed_by_a_leader_that_is_busy(clock: SimulatedClock) -> None:
    def body(own: Ranks) -> None:
        if own.rank == 1:
            die(own)
        assert own.clock.wait(own.failed, 30)

    leader, _, other = together(made(clock, 3), body)

    assert_failed(leader, "rank 1 has sent no heartbeat")
    assert_failed(other, "rank 0: rank 1 has sent no heartbeat")


def test_where_the_leader_is_dead_the_rank_that_missed_it_speaks(clock: SimulatedClock) -> None:
    def body(own: Ranks) -> None:
        if own.leads:
            die(own)
        own.get("plan")

    _, *others = together(ranks := made(clock, 3), body)

    assert all("rank 0 has sent no heartbeat" in error.fact for error in others)
    assert len(told(ranks[1:])) == 1


def test_where_the_leader_is_dead_a_failed_rank_speaks_for_itself(clock: SimulatedClock) -> None:
    def body(own: Ranks) -> None:
        if own.leads:
            die(own)
        if own.rank == 1:
            raise OutputFailed("no space left")
        own.get("plan")

    _, *others = together(ranks := made(clock, 3), body)

    assert isinstance(others[0], OutputFailed)
    assert_failed(others[1], "rank 1: no space left")
    assert told(ranks[1:]) == [0]


def die(own: Ranks) -> None:
    """As a process that was killed, or stopped: nothing is heard of it for longer than others wait."""
    own._pulse.stop()
    own.clock.sleep(3 * pulse.DEAD_SECONDS)
    raise SystemExit


def test_a_rank_that_lives_and_does_nothing_is_waited_for_no_longer_than_asked(
    clock: SimulatedClock,
) -> None:
    def body(own: Ranks) -> None:
        if own.rank == 1:
            own.clock.wait(own.failed, 300)
        own.all_gather("value", None)

    leader, follower = together(made(clock, 2, timeout=60), body)

    assert 60 < clock.now() < 65
    assert_failed(leader, "rank 1 has made no progress for 60 s (--timeout)")
    assert_failed(follower, "rank 0: rank 1 has made no progress")


def test_a_rank_that_makes_progress_may_take_longer_than_the_timeout(clock: SimulatedClock) -> None:
    """Nor do those lose patience who wait for the leader, which waits for it."""

    def body(own: Ranks) -> Any:
        for _ in range(20 if own.rank == 2 else 0):
            own.clock.sleep(8)
            own.active()
        values = own.gather("written", own.rank)
        if own.leads:
            own.put("report", values)
        return own.get("report")

    assert together(made(clock, 3, timeout=10), body) == [[0, 1, 2]] * 3
    assert clock.now() > 160


def test_two_ranks_that_wait_for_each_other_do_not_do_so_for_ever(clock: SimulatedClock) -> None:
    def body(own: Ranks) -> None:
        own.get("never", source=1 - own.rank)

    for error in together(made(clock, 2, timeout=1.5), body):
        assert_failed(error, "has made no progress")


def test_a_rank_that_waits_for_itself_does_not_do_so_for_ever(clock: SimulatedClock) -> None:
    leader, _ = together(made(clock, 2, timeout=1.5), lambda own: own.get("never"))

    assert_failed(leader, "rank 0 has made no progress")


def test_a_rank_that_never_comes_is_waited_for_as_long_as_asked(clock: SimulatedClock) -> None:
    first, _ = made(clock, 2, timeout=60)

    (error,) = together([first], lambda own: None)

    assert_failed(error, "rank 1 has sent no heartbeat for 60 s (--timeout)")


def test_a_rank_that_could_not_start_is_named_by_the_first_that_did(clock: SimulatedClock) -> None:
    ranks = made(clock, 4)
    del ranks[1]

    outcomes = at_once([own.await_all for own in ranks], clock)

    for error in outcomes:
        assert isinstance(error, RankFailed)
        assert error.fact == "rank 1 did not start within 300 s"
    assert told(ranks) == [0]


def test_ranks_that_have_all_started_wait_no_longer(clock: SimulatedClock) -> None:
    assert at_once([own.await_all for own in made(clock, 3)], clock) == [None] * 3
    assert clock.now() < 5


def test_a_rank_may_come_late(clock: SimulatedClock) -> None:
    ranks = made(clock, 2, timeout=100)

    def late(own: Ranks) -> str:
        if own.rank:
            own.clock.sleep(90)
        return ""

    assert together(ranks, lambda own: own.all_gather("rank", own.rank), late) == [[0, 1]] * 2


def test_a_process_that_was_stopped_for_a_while_accuses_nobody(clock: SimulatedClock) -> None:
    """All of a job may be, and the first that runs again finds the heartbeats that it had seen."""

    def body(own: Ranks) -> Any:
        own.all_gather("here", None)
        if own.rank == 1:
            with mock.patch.object(own._pulse, "_beat"):
                clock.sleep(2 * pulse.BEAT_SECONDS)
                clock.stopped_for = 1000.0
                clock.sleep(3 * pulse.BEAT_SECONDS)
        return own.all_gather("rank", own.rank)

    assert together(made(clock, 2), body) == [[0, 1]] * 2


# The store


def test_when_the_store_is_gone_every_rank_ends(
    monkeypatch: pytest.MonkeyPatch, clock: SimulatedClock
) -> None:
    store = Store()
    monkeypatch.setenv("LOCAL_RANK", "0")

    def body(own: Ranks) -> None:
        own.all_gather("rank", own.rank)
        store.gone = True
        own.get("never")

    outcomes = together(ranks := made(clock, 3, store=store), body)

    for rank, error in enumerate(outcomes):
        assert_failed(error, f"rank {rank} lost the others (Connection reset by peer)")
    assert told(ranks) == [0, 1, 2], "each is the first of its machine"


def test_when_the_store_is_gone_one_rank_of_a_machine_speaks(
    monkeypatch: pytest.MonkeyPatch, clock: SimulatedClock
) -> None:
    store = Store()
    monkeypatch.setenv("LOCAL_RANK", "1")

    def body(own: Ranks) -> None:
        store.gone = True
        own.get("never")

    together(ranks := made(clock, 2, store=store), body)
    assert told(ranks) == [0]


def test_a_busy_rank_learns_that_the_store_is_gone(clock: SimulatedClock) -> None:
    store = Store()

    def body(own: Ranks) -> None:
        store.gone = True
        assert own.clock.wait(own.failed, 10)
        own.check()

    for error in together(made(clock, 2, store=store), body):
        assert_failed(error, "lost the others")


def test_a_store_that_does_not_answer_is_waited_for_as_long_as_a_dead_rank(
    clock: SimulatedClock,
) -> None:
    store = Store(clock.unanswered)

    def body(own: Ranks) -> None:
        own.all_gather("rank", own.rank)
        store.silent.set()
        own.get("never")

    for error in together(made(clock, 2, store=store), body):
        assert_failed(error, "the store has not answered for 20 s")


# What is started


def test_ranks_that_were_asked_for_different_things_do_not_work_together(
    clock: SimulatedClock,
) -> None:
    outcomes = together(
        ranks := made(clock, 3),
        lambda own: own.get("never"),
        lambda own: "--node-local" * (own.rank == 2),
    )
    assert_failed(outcomes[0], "rank 2 was started with --node-local, and rank 0 with")
    assert told(ranks) == [0]
