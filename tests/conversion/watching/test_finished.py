"""When a save is finished: each writer's rule, on directories as they stand at one moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt_tools.conversion.watching.finished import SKEW_NS, State, Stillness, judge
from ckpt_tools.conversion.watching.saves import Look, Save, Stamp

RUN = Path("run")
FINISHED, SETTLING, UNFINISHED = State.FINISHED, State.SETTLING, State.UNFINISHED
SECOND = 10**9
LONG = SKEW_NS + 1


def save(name: str, files: dict[str, int], **facts: object) -> Save:
    """A save with the given times of files, in nanoseconds."""
    stamps = {file: Stamp(100, mtime) for file, mtime in files.items()}
    return Save(RUN / name, stamps, **facts)  # type: ignore[arg-type]


def look(*saves: Save, latest: str | None = None) -> Look:
    return Look(RUN, tuple(sorted(saves, key=lambda each: each.order)), latest)


def state_of(one: Save, *others: Save, latest: str | None = None) -> State:
    return judge(one, look(one, *others, latest=latest)).state


# -- torch.distributed.checkpoint -----------------------------------------------------------------

SHARDS = {"__0_0.distcp": 1, "__1_0.distcp": 2}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (SHARDS, UNFINISHED),
        (SHARDS | {".metadata.tmp": 3}, UNFINISHED),
        (SHARDS | {".metadata": 3}, FINISHED),
        (SHARDS | {".metadata": 2}, FINISHED),
        # The clocks of two machines differ a little.
        (SHARDS | {".metadata": 1}, SETTLING),
        # It is being saved again: `.metadata` is that of the save before.
        (SHARDS | {".metadata": 3, "__1_0.distcp": 3 + LONG}, UNFINISHED),
        (SHARDS | {".metadata": 3, ".metadata.tmp": 9}, UNFINISHED),
        # Without collectives each rank writes its own.
        (SHARDS | {"__0.metadata": 3}, UNFINISHED),
        (SHARDS | {"__0.metadata": 3, "__1.metadata": 3}, SETTLING),
    ],
    ids=str,
)
def test_dcp_ends_with_its_metadata(files: dict[str, int], expected: State) -> None:
    assert state_of(save("step-5", files)) is expected
    below = {f"model_and_optim/{name}": time for name, time in files.items()}
    assert state_of(save("step5", below)) is expected


def test_every_distributed_state_of_a_save_must_be_finished() -> None:
    model = {"pytorch_model_fsdp_0/__0_0.distcp": 1, "pytorch_model_fsdp_0/.metadata": 2}
    begun = {"optimizer_0/__0_0.distcp": 3}
    ended = begun | {"optimizer_0/.metadata": 4}

    assert state_of(save("checkpoint_1", model)) is SETTLING
    assert state_of(save("checkpoint_1", model | begun)) is UNFINISHED
    assert state_of(save("checkpoint_1", model | ended)) is SETTLING
    trainer = {"trainer_state.json": 5}
    assert state_of(save("checkpoint-1", model | ended | trainer, has_state=True)) is FINISHED


# -- DeepSpeed --------------------------------------------------------------------------------------

ZERO = {
    "zero_pp_rank_0_mp_rank_00_model_states.pt": 1,
    "zero_pp_rank_0_mp_rank_00_optim_states.pt": 2,
}


@pytest.mark.parametrize(
    ("latest", "expected"),
    [
        (None, SETTLING),  # save_latest=False
        ("global_step10", UNFINISHED),  # this one is being saved
        ("global_step20", SETTLING),  # rank 0 is done, others may write
        ("global_step30", FINISHED),  # all ranks met before the next save
        ("best", SETTLING),  # nobody knows which is later
    ],
)
def test_deepspeed_names_the_latest(latest: str | None, expected: State) -> None:
    assert state_of(save("global_step20", ZERO), latest=latest) is expected


def test_numbers_are_compared_as_numbers() -> None:
    assert state_of(save("global_step9", ZERO), latest="global_step10") is FINISHED
    assert state_of(save("global_step10", ZERO), latest="global_step9") is UNFINISHED


INNER = {f"global_step20/{name}": time for name, time in ZERO.items()}


@pytest.mark.parametrize(
    ("files", "facts", "expected"),
    [
        (INNER, {}, SETTLING),
        (INNER | {"latest": 3}, {"latest": "global_step20"}, SETTLING),
        (INNER | {"latest": 3}, {"latest": "global_step10"}, UNFINISHED),
        (INNER | {"latest": 3, "training_args.bin": 1}, {"latest": "global_step20"}, UNFINISHED),
        (
            INNER | {"latest": 3, "trainer_state.json": 4},
            {"latest": "global_step20", "has_state": True},
            FINISHED,
        ),
        # An engine that saves in the background: the state of the Trainer proves nothing.
        (
            INNER | {"latest": 9 * LONG, "trainer_state.json": 4},
            {"latest": "global_step20", "has_state": True},
            SETTLING,
        ),
    ],
    ids=str,
)
def test_the_trainer_and_accelerate_keep_their_own_latest(
    files: dict[str, int], facts: dict[str, object], expected: State
) -> None:
    assert state_of(save("checkpoint-20", files, **facts)) is expected


# -- the Trainer ------------------------------------------------------------------------------------

PLAIN = {"model.safetensors": 1, "training_args.bin": 2}


@pytest.mark.parametrize(
    ("files", "has_state", "expected"),
    [
        (PLAIN, False, UNFINISHED),
        (PLAIN | {"optimizer.pt": 3, "scheduler.pt": 3}, False, UNFINISHED),
        (PLAIN | {"trainer_state.json": 4}, False, UNFINISHED),  # half of it is written
        (PLAIN | {"trainer_state.json": 4}, True, FINISHED),
        # Random states of other ranks come later and hold no weights.
        (PLAIN | {"trainer_state.json": 4, "rng_state_1.pth": 9 * LONG}, True, FINISHED),
        (PLAIN | {"trainer_state.json": 0}, True, SETTLING),
        # It is saved again over an earlier one.
        (PLAIN | {"trainer_state.json": 0, "model.safetensors": LONG}, True, UNFINISHED),
    ],
    ids=str,
)
def test_the_trainer_ends_with_its_state(
    files: dict[str, int], has_state: bool, expected: State
) -> None:
    assert state_of(save("checkpoint-5", files, has_state=has_state)) is expected


def test_a_file_that_is_touched_as_the_reason_says_ends_the_wait() -> None:
    copied = save("step-5", {"__0_0.distcp": LONG, ".metadata": 0})
    why = judge(copied, look(copied)).why

    assert why.endswith("If it was copied without its times, touch .metadata")
    assert state_of(save("step-5", {"__0_0.distcp": LONG, ".metadata": LONG})) is FINISHED


# -- savers without a last file -----------------------------------------------------------------------


def test_completed_is_waited_for_where_the_run_writes_it() -> None:
    marked = save("step_5", {"model.safetensors": 1, "COMPLETED": 2})
    bare = save("step_10", {"model.safetensors": 3})

    assert state_of(bare) is SETTLING
    assert state_of(bare, marked) is UNFINISHED
    # Every rank writes it when its own files are done.
    assert state_of(marked, bare) is SETTLING


def test_stillness_is_that_of_every_file_and_of_a_clock_that_never_jumps() -> None:
    still = Stillness(30)
    early = save("step_5", {"model.safetensors": 1})
    other_time = save("step_5", {"model.safetensors": 2})
    other_size = Save(RUN / "step_5", {"model.safetensors": Stamp(200, 2)})
    other_file = Save(RUN / "step_5", {**other_size.files, "optimizer.pt": Stamp(1, 1)})

    for now, seen, stands in (
        (100.0, early, False),
        (129.0, early, False),
        (130.0, early, True),
        (131.0, other_time, False),
        (140.0, other_size, False),
        (169.0, other_size, False),
        (170.0, other_size, True),
        (171.0, other_file, False),
        (201.0, other_file, True),
    ):
        still.see([seen], now)
        assert still.stands(seen, now) is stands, now
    # One that was gone for a moment is another one.
    still.see([], 202.0)
    still.see([other_file], 203.0)
    assert not still.stands(other_file, 203.0)
