"""A run that is watched: what is converted, in which order, and what happens around it.

The directories are real checkpoints, put into the states in which a training leaves them.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ckpt_tools
from ckpt_tools.conversion.api import consolidate
from ckpt_tools.conversion.watching.command import run_command
from ckpt_tools.conversion.watching.events import Event
from ckpt_tools.conversion.watching.records import Records
from ckpt_tools.conversion.watching.watch import Asked, Watch
from ckpt_tools.errors import (
    CkptError,
    DamagedCheckpoint,
    MissingAsset,
    NotACheckpoint,
    OutputExists,
    UsageError,
)
from tests.cli.test_consolidate import run as typed
from tests.conftest import FIXTURES
from tests.support.outputs import contents, partials

ZERO = FIXTURES / "zero" / "zero2-bf16-llama-two-saves-2ranks" / "checkpoint"
DCP = FIXTURES / "dcp" / "no-dist" / "checkpoint"


def saved(save: Path) -> Path:
    """A save of DCP, its `.metadata` last."""
    shutil.copytree(DCP, save)
    for path in save.iterdir():
        os.utime(path, ns=(1, 2 if path.name == ".metadata" else 1))
    return save


class Run:
    """A training's directory, and a watch of it with a clock that stands until it is moved."""

    def __init__(self, path: Path) -> None:
        self.path, self.out = path / "run", path / "out"
        self.events: list[Event] = []
        self.converted: list[str] = []
        self.now = 1000.0
        self.path.mkdir()

    def watch(self, **asked: Any) -> Watch:
        def convert(save: Path, output: Path, **options: bool) -> Any:
            self.converted.append(save.name)
            return consolidate(save, output, weights_only=True, **options)

        return Watch(
            Asked(self.path, self.out, **asked), convert, self.events.append, 30, lambda: self.now
        )

    def zero(self, step: int, latest: int | None = None) -> Path:
        """A save of DeepSpeed, and what ``latest`` names after it."""
        save = self.path / f"global_step{step}"
        shutil.copytree(ZERO / f"global_step{2 if step % 4 else 4}", save)
        if latest is not None:
            (self.path / "latest").write_text(f"global_step{latest}")
        return save

    def dcp(self, step: int) -> Path:
        return saved(self.path / f"step-{step}")

    def told(self, happening: str) -> list[str]:
        return [event.name for event in self.events if event.happening == happening]

    def outputs(self) -> set[str]:
        return {path.name for path in self.out.iterdir() if path.is_dir()}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    one = Run(tmp_path)
    with Records(one.out).alone():
        yield one


def test_each_save_is_converted_once_in_order(run: Run) -> None:
    watch = run.watch()
    run.zero(8), run.zero(10), run.zero(12, latest=12)

    assert watch.once(), "the newest may still be written by other ranks"
    assert run.converted == ["global_step8", "global_step10"]
    run.now += 29
    assert watch.once()
    run.now += 1
    assert not watch.once()
    assert run.converted == ["global_step8", "global_step10", "global_step12"]
    # Another process, and later: all is told by the outputs.
    assert not run.watch().once()
    assert len(run.converted) == 3

    for name in run.converted:
        twin = run.out.parent / f"{name}-alone"
        consolidate(run.path / name, twin, weights_only=True)
        weights = "model.safetensors"
        assert (run.out / name / weights).read_bytes() == (twin / weights).read_bytes()
    record = json.loads((run.out / "global_step10.done").read_text())
    assert (record["checkpoint"], record["output"], record["step"]) == (
        *("global_step10", "global_step10"),
        2,
    )


def test_a_save_that_is_being_written_is_never_read(run: Run) -> None:
    """Every state through which a save goes while rank 0, then rank 1, write their files."""
    run.zero(2, latest=2)
    whole = run.zero(4)
    files = sorted(path for path in whole.iterdir())
    content = {path: path.read_bytes() for path in files}
    for path in files:
        path.unlink()
    watch = run.watch()
    run.now += 30
    watch.once()
    run.now += 30
    watch.once()
    assert run.converted == ["global_step2"]

    for path in files:
        for part in (content[path][: len(content[path]) // 2], content[path]):
            path.write_bytes(part)
            run.now += 1000
            watch.once()
            # Another one that starts now sees the files stand still from then on.
            other = run.watch()
            other.once()
            assert run.converted == ["global_step2"], path.name
    # The last file has stood still since it was seen, so the pointer of rank 0 is enough after that time.
    (run.path / "latest").write_text("global_step4")
    run.now += 29
    watch.once()
    assert run.converted == ["global_step2"]
    run.now += 1
    watch.once()
    assert run.converted == ["global_step2", "global_step4"]
    assert not run.told("failed")


def test_a_save_in_which_training_died_is_passed_over(run: Run) -> None:
    dead = run.zero(2)
    (dead / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    run.zero(8, latest=8)
    watch = run.watch()
    watch.once()
    run.now += 30
    watch.once()
    watch.once()

    assert run.outputs() == {"global_step8"}
    assert run.converted == ["global_step2", "global_step8"], "it is read once, not in each pass"
    (event,) = [each for each in run.events if each.happening == "passed over"]
    assert event.name == "global_step2" and "it is not whole" in event.fact
    assert watch.errors == []

    # Training comes by again, and saves it whole.
    shutil.rmtree(dead)
    run.zero(2)
    watch.once()
    assert run.outputs() == {"global_step2", "global_step8"}


def test_damage_of_a_finished_save_is_an_error_of_that_save(run: Run) -> None:
    shard = run.zero(2) / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    os.truncate(shard, shard.stat().st_size - 100)
    run.zero(8, latest=12)
    watch = run.watch()
    watch.once()

    assert run.outputs() == {"global_step8"}
    assert run.told("failed") == ["global_step2"]
    (error,) = watch.errors
    assert isinstance(error, DamagedCheckpoint)


def test_a_clock_that_jumps_changes_nothing(run: Run) -> None:
    """Times of files in the future and in the past: they are compared with each other alone."""
    for step, year in ((2, 2090), (4, 1980), (6, 2026)):
        save = run.dcp(step)
        moment = (year - 1970) * 31_557_600 * 10**9
        for path in save.rglob("*"):
            os.utime(path, ns=(moment, moment))
    run.watch().once()

    assert run.converted == ["step-2", "step-4", "step-6"]


def test_a_save_that_is_deleted_while_it_is_converted_leaves_nothing(run: Run) -> None:
    save = run.zero(2, latest=4)

    def convert(path: Path, output: Path, **options: Any) -> Any:
        part = output.with_name(f"{output.name}.partial-00000000")
        (part / "output").mkdir(parents=True)
        shutil.rmtree(path)
        return consolidate(path, output, weights_only=True)

    watch = run.watch()
    watch._convert = convert  # type: ignore[assignment]
    watch.once()

    assert not save.exists()
    assert run.told("passed over") == ["global_step2"]
    assert "deleted" in run.events[-1].fact
    assert watch.errors == [] and run.outputs() == set()
    assert partials(run.out / "global_step2") == []


def test_a_save_that_changes_while_it_is_converted_is_converted_as_it_is_then(run: Run) -> None:
    save = run.zero(2, latest=4)
    watch, honest = run.watch(), run.watch()._convert
    shard = save / "mp_rank_00_model_states.pt"

    def convert(path: Path, output: Path, **options: Any) -> Any:
        checkpoint = ckpt_tools.open_checkpoint(path)
        os.utime(shard, ns=(7, 7))
        return consolidate(checkpoint, output, weights_only=True)

    watch._convert = convert  # type: ignore[assignment]
    watch.once()
    # The times that the reader saw are those after the change here, or before: never a mix of both.
    if run.told("waiting"):
        assert run.outputs() == set()
    watch._convert = honest
    watch.once()
    assert run.outputs() == {"global_step2"}
    assert watch.errors == []


def test_a_stopped_watch_goes_on(run: Run, tmp_path: Path) -> None:
    """Between the output and its record the command may have been run or not: it is run again."""
    log = tmp_path / "log"
    run.zero(2, latest=4)
    consolidate(run.path / "global_step2", run.out / "global_step2", weights_only=True)

    run.watch(command=f'echo "$CKPT_TOOLS_NAME" >> {log}').once()
    run.watch(command=f'echo "$CKPT_TOOLS_NAME" >> {log}').once()

    assert run.converted == []
    assert log.read_text() == "global_step2\n"


def test_parts_of_another_request_do_not_stop_it(run: Run) -> None:
    """What is left of a conversion with other options is removed."""
    run.zero(2, latest=4)
    left = run.out / "global_step2.partial-00000000"
    (left / "output").mkdir(parents=True)
    (left / "journal").mkdir()
    other = {"tool": "0.0.0", "sources": "", "options": {}, "plan": ""}
    (left / "journal" / "run.json").write_text(json.dumps(other))

    run.watch().once()

    assert run.outputs() == {"global_step2"}


def test_a_save_that_is_written_again_is_converted_again_if_asked(run: Run) -> None:
    save = run.zero(2, latest=4)
    run.watch().once()
    before = contents(run.out / "global_step2")
    shutil.rmtree(save)
    shutil.copytree(ZERO / "global_step4", save)

    watch = run.watch()
    watch.once()
    assert run.told("passed over") == ["global_step2"]
    assert contents(run.out / "global_step2") == before

    run.watch(overwrite=True).once()
    after = contents(run.out / "global_step2")
    assert after["model.safetensors"] != before["model.safetensors"]
    run.watch(overwrite=True).once()
    assert run.converted == ["global_step2"] * 2


def test_an_output_of_something_else_is_not_replaced(run: Run) -> None:
    run.zero(2, latest=4)
    (run.out / "global_step2").mkdir()
    (run.out / "global_step2" / "precious").write_text("x")

    with pytest.raises(OutputExists):
        run.watch().once()
    assert (run.out / "global_step2" / "precious").is_file()


def test_only_multiples_are_converted(run: Run) -> None:
    for step in (2, 4, 6, 8):
        run.zero(step, latest=10)
    run.watch(every=4).once()

    assert run.converted == ["global_step4", "global_step8"]


def test_the_newest_outputs_are_kept_and_none_is_made_twice(run: Run) -> None:
    for step in (2, 4, 6):
        run.zero(step, latest=8)
    (run.out / "mine").mkdir(parents=True)
    run.watch(keep=2).once()
    assert run.outputs() == {"global_step4", "global_step6", "mine"}

    shutil.rmtree(run.path / "global_step4")  # save_total_limit
    run.zero(8, latest=10)
    run.watch(keep=2).once()
    assert run.outputs() == {"global_step6", "global_step8", "mine"}
    run.watch(keep=1).once()
    assert run.outputs() == {"global_step8", "mine"}
    assert run.converted == [f"global_step{step}" for step in (2, 4, 6, 8)]
    assert not [path for path in run.out.iterdir() if ".removed-" in path.name]


# -- the command ----------------------------------------------------------------------------------------


def test_the_command_knows_what_it_is_run_for(run: Run, tmp_path: Path) -> None:
    run.zero(2, latest=4)
    log = tmp_path / "log"
    names = ("CHECKPOINT", "OUTPUT", "NAME", "STEP")
    text = " ".join(f"$CKPT_TOOLS_{name}" for name in names)
    run.watch(
        command=f'test -f "$CKPT_TOOLS_OUTPUT/model.safetensors" && echo {text} > {log}'
    ).once()

    save, output = run.path / "global_step2", run.out / "global_step2"
    assert log.read_text() == f"{save} {output} global_step2 2\n"


def test_a_command_that_fails_is_told_and_stops_nothing(run: Run) -> None:
    run.zero(2), run.zero(6, latest=8)
    watch = run.watch(command='test "$CKPT_TOOLS_STEP" != 2 || exit 3; kill -9 $$')
    watch.once()

    assert run.told("command failed") == ["global_step2", "global_step6"]
    assert [error.exit_code for error in watch.errors] == [1, 1]
    statuses = [json.loads(p.read_text())["status"] for p in sorted(run.out.glob("*.done"))]
    assert statuses == [3, 3]
    run.watch(command="exit 1").once()
    assert len(run.events) == 4, "it is not run again"


# -- removing what is proven ------------------------------------------------------------------------------


def test_a_proven_save_is_removed_and_the_newest_never(run: Run) -> None:
    for step in (2, 4, 6):
        run.zero(step, latest=4)
    for script in (
        "zero_to_fp32.py",
        "zero_to_torch.py",
    ):  # DeepSpeed 0.19 copies both into the save
        (run.path / "global_step2" / script).write_text("")
    watch = run.watch(prune=True)
    watch.once()
    run.now += 30
    watch.once()

    # 2 is older than what training resumes from; `latest` names 4, and 6 is not finished by it.
    assert {path.name for path in run.path.iterdir()} == {"global_step4", "global_step6", "latest"}
    assert run.told("pruned") == ["global_step2"]
    run.watch(prune=True).once()
    assert run.path.joinpath("global_step4").is_dir()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        ("flip", "not proven: digest-mismatch"),
        ("other", "not proven: tensor-differs"),
        ("gone", "is not there"),
        ("stranger", "it holds what the output does not: ema.pt"),
        ("link", "it holds links"),
    ],
)
def test_what_is_not_proven_stays(run: Run, spoil: str, why: str) -> None:
    save = run.zero(2, latest=4)
    run.zero(4)
    run.watch().once()
    output = run.out / "global_step2"
    if spoil == "flip":
        data = bytearray((output / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (output / "model.safetensors").write_bytes(data)
    elif spoil == "other":
        consolidate(ZERO / "global_step4", output, weights_only=True, overwrite=True)
    elif spoil == "gone":
        shutil.rmtree(output)
    elif spoil == "stranger":
        torch.save({"x": torch.ones(2)}, save / "ema.pt")
    else:
        os.symlink("/etc/hostname", save / "zero_to_fp32.py")
    if spoil == "stranger":
        (run.out / "global_step2.done").unlink()
    watch = run.watch(prune=True)
    watch.once()
    run.now += 30
    watch.once()

    assert save.is_dir()
    assert run.told("pruned") == []
    (event,) = [each for each in run.events if each.happening == "kept"]
    assert why in event.fact


def test_what_training_resumes_from_stays(run: Run, tmp_path: Path) -> None:
    for step in (2, 4, 6):
        run.dcp(step)
    os.symlink("step-4", run.path / "last")
    state = {"best_model_checkpoint": f"/there/{run.path.name}/step-2", "global_step": 6}
    (run.path / "step-6" / "trainer_state.json").write_text(json.dumps(state))
    run.watch(prune=True).once()
    assert run.told("pruned") == []

    (run.path / "last").unlink()
    (run.path / "latest").write_text("step-4")
    state["best_model_checkpoint"] = "/there/step-6"
    (run.path / "step-6" / "trainer_state.json").write_text(json.dumps(state))
    run.watch(prune=True).once()
    assert run.told("pruned") == ["step-2"]
    assert (run.path / "step-4").is_dir()


# -- the function and the command ---------------------------------------------------------------------------


def test_once_gives_a_save_time_to_stand_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    clock = itertools.count(0, 50)
    monkeypatch.setattr(
        "ckpt_tools.conversion.watching.api.time.monotonic", lambda: float(next(clock))
    )
    shutil.copytree(ZERO, tmp_path / "run")
    events: list[Event] = []

    reports = ckpt_tools.watch(
        tmp_path / "run",
        tmp_path / "out",
        once=True,
        weights_only=True,
        settle=45,
        tell=events.append,
    )

    assert [report.output.name for report in reports] == ["global_step2", "global_step4"]
    assert slept == [45]
    again = ckpt_tools.watch(tmp_path / "run", tmp_path / "out", once=True, weights_only=True)
    assert again == [] and slept == [45]


def test_a_watch_ends_when_it_is_told_to(tmp_path: Path) -> None:
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        if len(asked) == 2:
            saved(tmp_path / "run" / "step-1")
        return len(asked) > 3

    (tmp_path / "run").mkdir()
    reports = ckpt_tools.watch(
        tmp_path / "run", tmp_path / "out", poll=0.01, stop=stop, weights_only=True
    )
    assert [report.output.name for report in reports] == ["step-1"]


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"keep": 0}, "--keep is 0"),
        ({"every": -1}, "--every is -1"),
        ({"lora": True, "attribute": "policy"}, "exclude each other"),
        ({"adapter": "a"}, "--adapter is an option for adapters"),
        ({"lora": True, "prune_source": True}, "a part of the model"),
        ({"attribute": "policy", "prune_source": True}, "a part of the model"),
    ],
    ids=str,
)
def test_what_no_watch_can_do_is_refused(
    options: dict[str, Any], fact: str, tmp_path: Path
) -> None:
    saved(tmp_path / "run" / "step-1")
    with pytest.raises(UsageError, match=fact):
        ckpt_tools.watch(tmp_path / "run", tmp_path / "out", once=True, **options)
    assert not (tmp_path / "out").exists()


def test_where_and_who(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match="does not exist"):
        ckpt_tools.watch(tmp_path / "run", tmp_path / "out", once=True)
    saved(tmp_path / "run" / "step-1")
    with pytest.raises(UsageError, match="among the checkpoints"):
        ckpt_tools.watch(tmp_path / "run", tmp_path / "run", once=True)
    with pytest.raises(UsageError, match="one checkpoint, not the directory of a run"):
        ckpt_tools.watch(ZERO / "global_step2", tmp_path / "out", once=True)
    with pytest.raises(UsageError, match="it is not a directory"):
        ckpt_tools.watch(ZERO / "latest", tmp_path / "out", once=True)
    with pytest.raises(UsageError, match="s3://runs/a is in a store"):
        ckpt_tools.watch("s3://runs/a", tmp_path / "out", once=True)
    with pytest.raises(TypeError, match=r"unexpected option 'verfy'\. Did you mean 'verify'"):
        ckpt_tools.watch(tmp_path / "run", tmp_path / "out", verfy=True)  # type: ignore[call-arg]
    with (
        Records(tmp_path / "out").alone(),
        pytest.raises(UsageError, match="another ckpt-tools watch"),
    ):
        ckpt_tools.watch(tmp_path / "run", tmp_path / "out", once=True)
    with pytest.raises(MissingAsset):
        ckpt_tools.watch(tmp_path / "run", tmp_path / "out", once=True)
    with pytest.raises(CkptError, match="status 7"):
        ckpt_tools.watch(
            tmp_path / "run", tmp_path / "out", once=True, weights_only=True, exec="exit 7"
        )


def test_a_signal_ends_the_command_too(tmp_path: Path) -> None:
    """The command stops its watch, and would go on for ever."""

    def ended(*_: object) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGUSR1, ended)
    pid = tmp_path / "pid"
    try:
        with pytest.raises(SystemExit):
            run_command(f"echo $$ > {pid}; kill -USR1 $PPID; exec sleep 100000", {})
    finally:
        signal.signal(signal.SIGUSR1, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_adapters_are_written_and_told_as_json(tmp_path: Path) -> None:
    source, out = FIXTURES / "accelerate" / "trainer-lora" / "checkpoint", tmp_path / "out"
    options = ("--lora", "--base-model", "owner/base", "--settle", 0)
    done = typed("watch", source, out, "--once", "--json", *options)

    assert done.exit_code == 0, done.stderr
    (line,) = done.stdout.splitlines()
    event = json.loads(line)
    assert (event["event"], event["checkpoint"]) == ("converted", "checkpoint-2")
    assert event["report"]["output"] == str(out / "checkpoint-2")
    name = "adapter_model.safetensors"
    found, truth = (load_file(each / "checkpoint-2" / name) for each in (out, source))
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[key], truth[key]) for key in truth)

    refused = typed("watch", source, out, "--lora", "--max-shard-size", "1GB", "--once")
    assert refused.exit_code == 2
    assert (
        "--max-shard-size is an option for whole models, and --lora writes adapters"
        in refused.stderr
    )
