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
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file

CONSOLIDATE = [sys.executable, "-m", "ckpt_tools", "consolidate"]
TENSORS, ROWS = 30, 2_500_000


@dataclass(frozen=True)
class Large:
    """A source that takes a while to write, what comes of it, and how long that takes."""

    path: Path
    output: Path
    seconds: float

    @property
    def options(self) -> list[str]:
        return ["--weights-only", "--dtype", "bf16", "--max-shard-size", "50MB", "--workers", "2"]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Large]:
    """300 MB in which no bytes are zero: what is not written yet reads as zeros."""
    root = tmp_path_factory.mktemp("large")
    values = torch.arange(1, ROWS + 1, dtype=torch.float32)
    (root / "source").mkdir()
    save_file(
        {f"layers.{i}.weight": values + i for i in range(TENSORS)},
        root / "source" / "model.safetensors",
        metadata={"format": "pt"},
    )
    whole = Large(root / "source", root / "output", 0.0)
    run = start(whole, whole.output, root / "log")
    wait_for_partial(run, whole.output)
    began = time.monotonic()
    assert run.wait(timeout=300) == 0, (root / "log").read_text()
    seconds = time.monotonic() - began
    assert len(list(whole.output.glob("*.safetensors"))) == 3
    with safe_open(whole.output / "model-00001-of-00003.safetensors", "pt") as shard:
        assert torch.equal(shard.get_tensor("layers.0.weight"), values.bfloat16())
    yield Large(whole.path, whole.output, seconds)
    for path in (*whole.path.iterdir(), *whole.output.iterdir()):
        path.unlink()


def start(large: Large, out: Path, log: Path, *options: str) -> subprocess.Popen[bytes]:
    """The command in a process group of its own, so that a signal reaches it as from a terminal."""
    with log.open("wb") as stream:
        return subprocess.Popen(
            [*CONSOLIDATE, str(large.path), str(out), *large.options, *options],
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def partials(out: Path) -> list[Path]:
    return sorted(out.parent.glob(f"{out.name}.partial-*"))


def wait_for_partial(run: subprocess.Popen[bytes], out: Path) -> None:
    deadline = time.monotonic() + 120
    before = set(partials(out))
    while not set(partials(out)) - before:
        assert run.poll() is None, "it ended before it wrote"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def is_complete(out: Path, expected: Path) -> bool:
    names = sorted(path.name for path in expected.iterdir())
    if sorted(path.name for path in out.iterdir()) != names:
        return False
    return not any(filecmp.cmpfiles(out, expected, names, shallow=False)[1:])


def kill_at_random_moments(large: Large, directory: Path, times: int, *, overwrite: bool) -> None:
    """Kill runs, early ones and late ones, and look at what is there after each."""
    out, log = directory / "out", directory / "log"
    chance = random.Random(times)
    incomplete = 0
    for number in range(times):
        for path in (*partials(out), *([] if overwrite else [out])):
            remove(path)
        if overwrite and not (out / "old").exists():
            remove(out)
            out.mkdir()
            (out / "old").write_text("old")
        run = start(large, out, log, *(["--overwrite"] if overwrite else []))
        wait_for_partial(run, out)
        time.sleep((number + chance.random()) / times * large.seconds * 1.2)
        run.kill()
        run.wait(timeout=60)
        if overwrite and (out / "old").exists():
            assert [path.name for path in out.iterdir()] == ["old"]
            assert (out / "old").read_text() == "old"
            incomplete += 1
        elif overwrite or out.exists():
            assert is_complete(out, large.output)
        else:
            assert len(partials(out)) == 1
            incomplete += 1
    assert incomplete, "no run was killed before its end"
    for path in (*partials(out), out):
        remove(path)


def remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)


def proven_units(home: Path) -> int:
    """How many units the journal of a partial directory proves, by its checksums."""
    count = 0
    for log in (home / "journal").glob("*.log"):
        for line in log.read_bytes().splitlines():
            text, _, checksum = line.rpartition(b"\t")
            if xxhash.xxh64_hexdigest(text).encode() == checksum:
                count += len(json.loads(text)["digests"])
    return count


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_killed_run_leaves_no_output_or_a_complete_one(
    tmp_path: Path, large: Large, overwrite: bool
) -> None:
    kill_at_random_moments(large, tmp_path, 3, overwrite=overwrite)


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_killed_again_and_again_leaves_no_output_or_a_complete_one(
    tmp_path: Path, large: Large, overwrite: bool
) -> None:
    """``KILLS`` times, eight by default."""
    kills = int(os.environ.get("KILLS", "8"))
    kill_at_random_moments(large, tmp_path, kills, overwrite=overwrite)


def test_the_next_run_succeeds_and_mentions_what_a_killed_one_left(
    tmp_path: Path, large: Large
) -> None:
    out = tmp_path / "out"
    run = start(large, out, tmp_path / "log")
    wait_for_partial(run, out)
    run.kill()
    run.wait(timeout=60)
    (left,) = partials(out)

    again = start(large, out, tmp_path / "log", "--json", "--quiet")
    assert again.wait(timeout=300) == 0

    report = json.loads((tmp_path / "log").read_text())
    assert [warning for warning in report["warnings"] if str(left) in warning]
    assert partials(out) == [left], "it is not ours to delete: that run may live on another machine"
    assert is_complete(out, large.output)


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.mark.parametrize(("number", "status"), SIGNALS)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_an_interrupted_run_leaves_nothing_behind_but_what_is_proven(
    tmp_path: Path, large: Large, number: signal.Signals, status: int, share: float
) -> None:
    out = tmp_path / "made" / "on the way" / "out"
    while True:
        run = start(large, out, tmp_path / "log")
        wait_for_partial(run, out)
        time.sleep(share * large.seconds)
        os.killpg(run.pid, number)
        if shell_status(run) != 0:
            break
        # It was done before the signal came: a busy machine had made the trial run look slow.
        assert share
        assert is_complete(out, large.output)
        shutil.rmtree(tmp_path / "made")
        share /= 2

    said = (tmp_path / "log").read_text()
    assert shell_status(run) == status, said
    assert not out.exists()
    assert "Traceback" not in said
    left = partials(out)
    if left:
        (home,) = left
        assert share, "nothing is proven at once"
        assert proven_units(home) > 0
        assert number is not signal.SIGINT or f"--resume goes on; or delete {home}" in said
    else:
        assert [path.name for path in tmp_path.iterdir()] == ["log"]
        assert number is not signal.SIGINT or "Interrupted; nothing was left behind." in said


@pytest.mark.parametrize(("number", "status"), SIGNALS)
def test_an_interrupted_run_leaves_the_old_output(
    tmp_path: Path, large: Large, number: signal.Signals, status: int
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    run = start(large, out, tmp_path / "log", "--overwrite")
    wait_for_partial(run, out)
    os.killpg(run.pid, number)

    assert shell_status(run) == status, (tmp_path / "log").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "out"]
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


@pytest.mark.parametrize(("number", "status"), SIGNALS)
def test_a_run_is_interrupted_while_transformers_describes_the_model(
    tmp_path: Path, fixtures: Path, number: signal.Signals, status: int
) -> None:
    run = start_small(fixtures, tmp_path)
    wait_for_child(run)
    time.sleep(0.5)
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
    for moment in range(int(number) % 2, 8, 2):
        run = start_small(fixtures, tmp_path)
        wait_for_child(run)
        time.sleep(0.12 * moment)
        run.send_signal(number)

        assert shell_status(run) == status, (tmp_path / "log").read_text()
        assert [path.name for path in tmp_path.iterdir()] == ["log"]


def shell_status(run: subprocess.Popen[bytes]) -> int:
    """The exit status as a shell gives it: Python ends some interrupted runs by the signal itself."""
    status = run.wait(timeout=60)
    return status if status >= 0 else 128 - status


def wait_for_child(run: subprocess.Popen[bytes]) -> None:
    tasks = Path(f"/proc/{run.pid}/task")
    if not tasks.exists():
        pytest.skip("children are found with Linux's /proc")
    deadline = time.monotonic() + 60
    while not any(children(task) for task in tasks.iterdir()):
        assert run.poll() is None, "it ended without asking"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def children(task: Path) -> str:
    try:
        return (task / "children").read_text()
    except OSError:
        return ""
