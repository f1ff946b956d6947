"""Whatever ends a run and whenever, the output is complete, or as it was before."""

from __future__ import annotations

import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.support.forked import Forked
from tests.support.outputs import partials, proven_units, written
from tests.support.waiting import cpu_seconds, wait_until

CONSOLIDATE = [sys.executable, "-m", "ckpt_tools", "consolidate"]
TENSORS, ROWS = 30, 1_250_000


@dataclass(frozen=True)
class Large:
    """A source that takes a while to write, and what comes of it."""

    path: Path
    output: Path

    @property
    def options(self) -> list[str]:
        return ["--weights-only", "--dtype", "bf16", "--max-shard-size", "25MB", "--workers", "2"]

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.output.glob("*.safetensors"))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Large]:
    """150 MB in which no bytes are zero: what is not written yet reads as zeros."""
    root = tmp_path_factory.mktemp("large")
    values = torch.arange(1, ROWS + 1, dtype=torch.float32)
    (root / "source").mkdir()
    save_file(
        {f"layers.{i}.weight": values + i for i in range(TENSORS)},
        root / "source" / "model.safetensors",
        metadata={"format": "pt"},
    )
    whole = Large(root / "source", root / "output")
    run = start(whole, whole.output, root / "log")
    assert run.wait() == 0, (root / "log").read_text()
    assert len(list(whole.output.glob("*.safetensors"))) == 3
    with safe_open(whole.output / "model-00001-of-00003.safetensors", "pt") as shard:
        assert torch.equal(shard.get_tensor("layers.0.weight"), values.bfloat16())
    yield whole
    for path in (*whole.path.iterdir(), *whole.output.iterdir()):
        path.unlink()


def start(large: Large, out: Path, log: Path, *options: str) -> subprocess.Popen[bytes]:
    """The command in a process group of its own, so that a signal reaches it as from a terminal."""
    with log.open("wb") as stream:
        return Forked(
            [*CONSOLIDATE, str(large.path), str(out), *large.options, *options],
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for_partial(run: subprocess.Popen[bytes], out: Path) -> None:
    before = set(partials(out))
    wait_until(lambda: set(partials(out)) - before, run)


def wait_for_share(run: subprocess.Popen[bytes], large: Large, out: Path, share: float) -> None:
    """Until a share of the weights is written, or the run has ended; more than all of them: published."""

    def reached() -> bool:
        if share > 1:
            return not partials(out)
        return written(out) >= share * large.nbytes

    wait_until(lambda: run.poll() is not None or reached())


def is_complete(out: Path, expected: Path) -> bool:
    names = sorted(path.name for path in expected.iterdir())
    if sorted(path.name for path in out.iterdir()) != names:
        return False
    return not any(filecmp.cmpfiles(out, expected, names, shallow=False)[1:])


def kill_at_random_moments(large: Large, directory: Path, times: int, *, overwrite: bool) -> None:
    """Kill runs, early ones and late ones, and look at what is there after each."""
    out, log = directory / "out", directory / "log"
    chance = random.Random(times)
    number = incomplete = 0
    while number < times or not incomplete:
        for path in (*partials(out), *([] if overwrite else [out])):
            remove(path)
        if overwrite and not (out / "old").exists():
            remove(out)
            out.mkdir()
            (out / "old").write_text("old")
        run = start(large, out, log, *(["--overwrite"] if overwrite else []))
        wait_for_partial(run, out)
        wait_for_share(run, large, out, (number % times + chance.random()) / times * 1.2)
        run.kill()
        run.wait()
        number += 1
        if overwrite and (out / "old").exists():
            assert [path.name for path in out.iterdir()] == ["old"]
            assert (out / "old").read_text() == "old"
            incomplete += 1
        elif overwrite or out.exists():
            assert is_complete(out, large.output)
        else:
            assert len(partials(out)) == 1
            incomplete += 1
    for path in (*partials(out), out):
        remove(path)


def remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_killed_run_leaves_no_output_or_a_complete_one(
    tmp_path: Path, large: Large, overwrite: bool
) -> None:
    """``KILLS`` times, four by default."""
    kills = int(os.environ.get("KILLS", "4"))
    kill_at_random_moments(large, tmp_path, kills, overwrite=overwrite)


@pytest.mark.slow
def test_the_next_run_succeeds_and_mentions_what_a_killed_one_left(
    tmp_path: Path, large: Large
) -> None:
    out = tmp_path / "out"
    run = start(large, out, tmp_path / "log")
    wait_for_partial(run, out)
    run.kill()
    run.wait()
    (left,) = partials(out)

    again = start(large, out, tmp_path / "log", "--json", "--quiet")
    assert again.wait() == 0

    report = json.loads((tmp_path / "log").read_text())
    assert [warning for warning in report["warnings"] if str(left) in warning]
    assert partials(out) == [left], "it is not ours to delete: that run may live on another machine"
    assert is_complete(out, large.output)


SIGNALS = [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143)]
# In steps of 0.12 seconds of processor time, over the import of torch.
MOMENTS = {signal.SIGHUP: (5,), signal.SIGINT: (3,), signal.SIGTERM: (7,)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "share"),
    [(*each, share) for each, share in zip(SIGNALS, (0.5, 0.0, 0.5), strict=True)],
)
def test_an_interrupted_run_leaves_nothing_behind_but_what_is_proven(
    tmp_path: Path, large: Large, number: signal.Signals, status: int, share: float
) -> None:
    out = tmp_path / "made" / "on the way" / "out"
    while True:
        run = start(large, out, tmp_path / "log")
        wait_for_partial(run, out)
        wait_for_share(run, large, out, share)
        if run.poll() is None:
            os.killpg(run.pid, number)
        if shell_status(run) != 0:
            break
        # It was done before the signal came.
        assert is_complete(out, large.output)
        shutil.rmtree(tmp_path / "made")

    said = (tmp_path / "log").read_text()
    assert shell_status(run) == status, said
    assert not out.exists()
    assert "Traceback" not in said
    left = partials(out)
    if left:
        (home,) = left
        assert proven_units(home) > 0
        assert number is not signal.SIGINT or f"with --resume, or delete {home}" in said
    else:
        assert [path.name for path in tmp_path.iterdir()] == ["log"]
        assert number is not signal.SIGINT or "Interrupted; nothing was left behind." in said


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), SIGNALS[1:])
def test_an_interrupted_run_leaves_the_old_output(
    tmp_path: Path, large: Large, number: signal.Signals, status: int
) -> None:
    out = tmp_path / "out"
    while True:
        out.mkdir()
        (out / "old").write_text("old")
        run = start(large, out, tmp_path / "log", "--overwrite")
        wait_for_partial(run, out)
        if run.poll() is None:
            os.killpg(run.pid, number)
        if shell_status(run) != 0:
            break
        shutil.rmtree(out)

    assert shell_status(run) == status, (tmp_path / "log").read_text()
    left = partials(out)
    assert all(map(proven_units, left))
    assert sorted(path.name for path in tmp_path.iterdir() if path not in left) == ["log", "out"]
    assert [path.name for path in out.iterdir()] == ["old"]
    assert (out / "old").read_text() == "old"


def start_small(fixtures: Path, directory: Path) -> subprocess.Popen[bytes]:
    """A run that spends its time in asking transformers and in importing torch meanwhile."""
    case = fixtures / "zero" / "zero2-bf16-llama-3ranks"
    command = [*CONSOLIDATE, case / "checkpoint", directory / "out", "--config", case / "hf"]
    with (directory / "log").open("wb") as stream:
        return subprocess.Popen(
            list(map(str, command)), stdout=stream, stderr=stream, start_new_session=True
        )


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), SIGNALS)
def test_a_run_is_interrupted_while_transformers_describes_the_model(
    tmp_path: Path, fixtures: Path, number: signal.Signals, status: int
) -> None:
    run = start_small(fixtures, tmp_path)
    child = wait_for_child(run)
    # From here on it imports transformers, which takes it much longer than a signal takes.
    wait_until(lambda: "libtorch_python" in maps(child), run)
    os.killpg(run.pid, number)

    assert shell_status(run) == status, (tmp_path / "log").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), SIGNALS)
def test_no_signal_is_lost_while_torch_is_imported(
    tmp_path: Path, fixtures: Path, number: signal.Signals, status: int
) -> None:
    """Raised in its C code, KeyboardInterrupt and SystemExit come to nothing or become an ImportError."""
    for moment in MOMENTS[number]:
        run = start_small(fixtures, tmp_path)
        wait_for_child(run)
        # The import is a matter of the processor: so far it has come, however slowly.
        until = cpu_seconds(run.pid) + 0.12 * moment
        wait_until(partial(has_used, run, until))
        run.send_signal(number)

        ended, log = shell_status(run), (tmp_path / "log").read_text()
        left = sorted(path.name for path in tmp_path.iterdir())
        assert "Traceback" not in log
        if left == ["log", "out"]:
            # The run had published its output before the signal came; later moments come later still.
            assert ended in (0, status), log
            assert (tmp_path / "out" / "ckpt_tools_manifest.json").exists()
            assert moment >= 2
            break
        assert ended == status, log
        assert left == ["log"]


def has_used(run: subprocess.Popen[bytes], seconds: float) -> bool:
    return run.poll() is not None or cpu_seconds(run.pid) >= seconds


def shell_status(run: subprocess.Popen[bytes]) -> int:
    """The exit status as a shell gives it: Python ends some interrupted runs by the signal itself."""
    status = run.wait()
    return status if status >= 0 else 128 - status


def wait_for_child(run: subprocess.Popen[bytes]) -> int:
    """The process that it has started."""
    tasks = Path(f"/proc/{run.pid}/task")
    if not tasks.exists():
        pytest.skip("children are found with Linux's /proc")
    wait_until(lambda: any(children(task) for task in tasks.iterdir()), run)
    return next(int(child) for task in tasks.iterdir() for child in children(task))


def children(task: Path) -> list[str]:
    try:
        return (task / "children").read_text().split()
    except OSError:
        return []


def maps(pid: int) -> str:
    """What a process has in memory."""
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""
