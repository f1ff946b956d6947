"""Whatever ends a rank, a machine or a disk: all ranks end soon, one tells why, and the next run goes on."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import FIXTURES
from tests.support.forked import Forked
from tests.support.outputs import contents, partials, written
from tests.support.ranks.launching import (
    DRIVER,
    GATED,
    IP,
    REPOSITORY,
    Ended,
    ended,
    free_port,
    is_running,
    kill_all,
    launch,
    namespace,
    needs_cables,
    needs_namespaces,
    ranks_of,
    start,
    until,
)
from tests.support.waiting import cpu_seconds, wait_until

# More than one block, and no rank's share is less.
FIRST_BYTES = 5_000_000
OPTIONS = ("--weights-only", "--dtype", "bf16", "--max-shard-size", "10MB", "--workers", "1")


@dataclass(frozen=True)
class Large:
    """A source of some dozens of blocks, none of whose bytes are zero, and what comes of it."""

    path: Path
    whole: dict[str, bytes]

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.whole.values()))

    def command(self, out: Path, *options: str | Path) -> list[str | Path]:
        return ["consolidate", self.path, out, *OPTIONS, *options]

    def gated(self, out: Path, *options: str | Path, nbytes: int = FIRST_BYTES) -> list[str | Path]:
        """Each rank that has written so much waits for the file ``gate`` beside the output."""
        return [GATED, str(nbytes), gate_of(out), *self.command(out, *options)]

    def resumed(self, out: Path, *, ranks: int) -> dict[str, Any]:
        """The report of a run with ``--resume``, whose output must be whole."""
        command = ["-m", "ckpt_tools", *self.command(out, "--resume", "--json")]
        if ranks == 1:
            done = ended(popen([sys.executable, *command]))
        else:
            done = launch(command, ranks=ranks)
        assert done.status == 0, done.said
        assert contents(out) == self.whole
        assert not partials(out)
        report: dict[str, Any] = json.loads(done.stdout)
        return report


def popen(command: Sequence[str | Path]) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    kind = Forked if command[0] == sys.executable else subprocess.Popen
    return kind(command, stdout=pipe, stderr=pipe, text=True, cwd=REPOSITORY)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Large]:
    """96 MB in two files, of which 48 MB are written."""
    root = tmp_path_factory.mktemp("large")
    source = Large(root / "source", {})
    source.path.mkdir()
    values = torch.arange(1, 1_000_001, dtype=torch.float32)
    names: dict[str, str] = {}
    for number in range(2):
        held = {f"layers.{number * 12 + i}.weight": values + number * 12 + i for i in range(12)}
        name = f"model-{number + 1:05}-of-00002.safetensors"
        save_file(held, source.path / name, metadata={"format": "pt"})
        names |= dict.fromkeys(held, name)
    index = {"metadata": {"total_size": 96_000_000}, "weight_map": names}
    (source.path / "model.safetensors.index.json").write_text(json.dumps(index))
    alone = ended(popen([sys.executable, "-m", "ckpt_tools", *source.command(root / "out")]))
    assert alone.status == 0, alone.said
    source.whole.update(contents(root / "out"))
    yield source
    shutil.rmtree(root)


def proven(out: Path) -> bool:
    """Whether something of it is in the journal."""
    return any(path.stat().st_size for home in partials(out) for path in home.glob("journal/*.log"))


def gate_of(out: Path) -> Path:
    """Lets the ranks go on once it is there."""
    return out.with_name("gate")


def assert_told_once(said: str, message: str) -> None:
    """One rank says it, and no rank says anything else of the kind."""
    assert said.count(message) == 1, said
    assert said.count("error: ") + said.count("Interrupted") == 1, said
    assert "Exception in thread" not in said, said
    assert said.count("Traceback") == said.count("Traceback (most recent call last):\n  File") <= 1


def assert_missed(said: str, *, rank: int) -> None:
    """Its last progress was before its last heartbeat, so a busy machine may miss either first, or late."""
    assert_told_once(said, f"error: rank {rank} has ")
    assert re.search(r"has (sent no heartbeat|made no progress) for \d+ s", said), said


def went_on(report: dict[str, Any]) -> bool:
    return any("continued an earlier run" in note for note in report["notes"])


# Damage


def source_with_own(large: Large, directory: Path, name: str) -> Path:
    """The source, of which one file is a copy that may be damaged."""
    directory.mkdir()
    for path in large.path.iterdir():
        (directory / path.name).hardlink_to(path)
    (directory / name).unlink()
    shutil.copyfile(large.path / name, directory / name)
    return directory


@pytest.mark.slow
def test_a_shard_that_is_cut_while_a_follower_reads_it_ends_all_with_one_message(
    large: Large, tmp_path: Path
) -> None:
    name, out = "model-00002-of-00002.safetensors", tmp_path / "out"
    shard = source_with_own(large, tmp_path / "source", name) / name
    run = start(Large(tmp_path / "source", {}).gated(out, "--json"), ranks=2)
    until(lambda: written(out), run)
    os.truncate(shard, 40_000_000)
    gate_of(out).touch()

    done = ended(run)

    assert done.status != 0
    assert not out.exists()
    assert_told_once(done.stderr, "error: rank 1: the file ends at byte 40,000,000")
    error = json.loads(done.stdout)["error"]
    assert error["path"] == str(shard)
    assert error["exit_code"] == 4


def copied(name: str, directory: Path) -> Path:
    shutil.copytree(FIXTURES / name / "checkpoint", directory)
    return directory


@pytest.mark.slow
def test_what_one_rank_meets_every_rank_raises_and_the_next_command_works(tmp_path: Path) -> None:
    zstd = copied("dcp/zstd-2ranks", tmp_path / "zstd")
    chunk = zstd / "__1_0.distcp"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    chunk.write_bytes(data)
    good = FIXTURES / "zero" / "zero2-bf16-llama-3ranks" / "checkpoint"
    cases: list[dict[str, Any]] = [
        {"arguments": [zstd]},
        {
            "arguments": [good],
            "changed": changed(2, "ckpt_tools.writing.shares", "write", "no function"),
        },
        {
            "arguments": [good],
            "changed": changed(1, "ckpt_tools.ranks.session", "__version__", "0.0.1"),
        },
        {
            "arguments": [good],
            "changed": changed(2, "ckpt_tools.writing.delivery", "__version__", "0.0.1"),
        },
        {"arguments": [tmp_path / "nothing"]},
        {"arguments": [good]},
    ]
    outcomes = said_by_ranks(launch([DRIVER, listed(cases, tmp_path)], ranks=3))

    damaged, strange, older, differing, missing, whole = outcomes
    for told, fact in (
        (damaged, "a compressed chunk is damaged"),
        (strange, "TypeError"),
        (older, "rank 1 was started with ckpt-tools 0.0.1, and rank 0 with ckpt-tools"),
        (differing, "rank 2 computes another digest of the plan than rank 0"),
        (missing, "nothing"),
    ):
        assert all(fact in str(said) for said in told), told
        assert len({said["exit_code"] for said in told}) == 1, told
        assert [said["told_elsewhere"] for said in told] == [False, True, True]
    assert [said["error"] for said in strange] == ["RankFailed", "RankFailed", "TypeError"]
    assert "error" not in whole[0]
    assert [path.name for path in tmp_path.glob("out*")] == ["out5"]


def changed(rank: int, module: str, name: str, value: str) -> dict[str, Any]:
    return {"rank": rank, "module": module, "name": name, "value": value}


def listed(cases: list[dict[str, Any]], directory: Path) -> Path:
    """The cases as the driver reads them, each with an output of its own."""
    for number, case in enumerate(cases):
        case["function"] = "consolidate"
        (source, *out) = case["arguments"]
        case["arguments"] = [str(source), str(out[0] if out else directory / f"out{number}")]
        case["options"] = {"weights_only": True, "workers": 1} | case.get("options", {})
    path = directory / "cases.json"
    path.write_text(json.dumps(cases))
    return path


def said_by_ranks(*done: Ended) -> list[list[dict[str, Any]]]:
    """Of each case, what each rank said."""
    assert [each.status for each in done] == [0] * len(done), [each.said for each in done]
    found: dict[str, list[dict[str, Any]]] = {}
    for line in "".join(each.stdout for each in done).splitlines():
        rank, is_rank, said = line.partition(": ")
        if is_rank:
            found.setdefault(rank, []).append(json.loads(said))
    return [list(case) for case in zip(*(found[rank] for rank in sorted(found)), strict=True)]


# Machines


@pytest.mark.slow
@needs_namespaces
def test_machines_that_hold_too_little_or_too_much_are_told_so(tmp_path: Path) -> None:
    zero = "zero/zero3-bf16-olmo2-chat-2ranks"
    seen = tmp_path / "seen"
    seen.mkdir()
    disks = [tmp_path / f"disk{node}" for node in range(2)]
    for node, disk in enumerate(disks):
        for case in ("whole", "lacking", "differing"):
            copied(zero, disk / case)
            for path in (disk / case).rglob(f"*pp_rank_{1 - node}_*"):
                path.unlink()
    (lost,) = (disks[1] / "lacking").rglob("*pp_rank_1_*optim_states.pt")
    lost.unlink()
    (stale,) = (disks[1] / "differing").rglob("*pp_rank_1_*optim_states.pt")
    shutil.copyfile(stale, disks[0] / stale.relative_to(disks[1]))
    os.truncate(stale, stale.stat().st_size - 1000)
    cases: list[dict[str, Any]] = [
        {"arguments": [seen / case], "options": {"node_local": True}}
        for case in ("lacking", "differing", "whole")
    ]
    alone = {"rank": 1, "options": {"node_local": False}}
    cases.append({**cases[-1], "changed": alone})
    cases.append({"arguments": [seen / "whole", seen / "out"], "options": {"node_local": True}})
    script, port = listed(cases, tmp_path), free_port()

    runs = [
        start([DRIVER, script], ranks=1, nodes=2, node=node, port=port, binds={disks[node]: seen})
        for node in range(2)
    ]
    lacking, differing, whole, unlike, unseen = said_by_ranks(*map(ended, runs))

    for said, error, *facts in (
        (lacking, "DamagedCheckpoint", "1 of 2 optim_states files are missing: rank 1"),
        (differing, "DamagedCheckpoint", "bytes in", "machine 1", stale.name),
        (unlike, "RankFailed", "rank 1 was started with no --node-local"),
        (unseen, "RankFailed", "rank 1: machine 1 cannot see it", "out.partial-"),
    ):
        assert [each["told_elsewhere"] for each in said] == [False, True]
        assert said[0]["error"] == error
        assert all(fact in str(said[0]) for fact in facts), said[0]
    assert "error" not in whole[0]
    assert [path.name for path in tmp_path.glob("out*")] == ["out2"]
    assert not list(tmp_path.glob("disk*/out*"))


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_machine_that_is_lost_ends_the_other(large: Large, tmp_path: Path, lost: int) -> None:
    out, port = tmp_path / "out", free_port()
    command, ranks = large.gated(out, "--timeout", "5"), 1 if lost else 2
    runs = [start(command, ranks=ranks, nodes=2, node=node, port=port) for node in range(2)]
    until(lambda: proven(out), runs[0])
    kill_all(runs[lost])
    gate_of(out).touch()

    done = ended(runs[1 - lost])
    ended(runs[lost])

    assert done.status != 0
    assert not out.exists()
    if lost:
        assert_missed(done.said, rank=1)
    else:
        assert_told_once(done.said, "error: rank 2 lost the others")
    assert "Exception raised from" not in done.said, "torch tells each frame of its stack"
    assert "--resume" in done.said
    assert went_on(large.resumed(out, ranks=1))


@pytest.mark.slow
@needs_namespaces
def test_a_machine_whose_files_are_asked_for_is_lost_and_comes_back(
    large: Large, tmp_path: Path
) -> None:
    out, seen = tmp_path / "out", tmp_path / "seen"
    seen.mkdir()
    disks = [tmp_path / f"disk{node}" for node in range(2)]
    for node, disk in enumerate(disks):
        disk.mkdir()
        for path in large.path.glob("*1-of-*" if node else "*"):
            if node or "1-of-" not in path.name:
                shutil.copyfile(path, disk / path.name)
    source = Large(seen, {})

    def both(command: list[str | Path]) -> list[subprocess.Popen[str]]:
        port = free_port()
        return [
            start(command, ranks=1, nodes=2, node=node, port=port, binds={disk: seen})
            for node, disk in enumerate(disks)
        ]

    # The first machine lacks most of what it writes. Eight of its twelve blocks are read at a time, so it
    # waits at the first one, and the last ones are asked for when the other machine is lost.
    first, second = both(source.gated(out, "--node-local", nbytes=1))
    until(lambda: proven(out), first)
    kill_all(second)
    gate_of(out).touch()

    done = ended(first)
    ended(second)

    assert done.status != 0
    assert not out.exists()
    assert_told_once(done.said, "error: rank 0 asked rank 1 for model-00001-of-00002.safetensors")
    resume = ["-m", "ckpt_tools", *source.command(out, "--node-local", "--resume", "--json")]
    again, _ = map(ended, both(resume))
    assert again.status == 0, again.said
    assert went_on(json.loads(again.stdout))
    weights = {n: data for n, data in contents(out).items() if n.endswith(".safetensors")}
    assert weights == {n: large.whole[n] for n in weights}
    assert len(weights) > 4


@pytest.mark.slow
@needs_cables
def test_machines_whose_cable_is_pulled_end_both(large: Large, tmp_path: Path) -> None:
    """No process dies and no connection is closed: there is nothing but silence."""
    out = tmp_path / "out"
    with ExitStack() as stack:
        nets = [stack.enter_context(namespace("-n")) for _ in range(2)]
        join(nets)
        runs = [
            start(
                large.gated(out, "--timeout", "5"),
                ranks=1,
                nodes=2,
                node=node,
                port=29501,
                address="10.99.0.1",
                within=net,
            )
            for node, net in enumerate(nets)
        ]
        until(lambda: proven(out), runs[0])
        subprocess.run([*nets[0], IP, "link", "set", "end0", "down"], check=True)
        gate_of(out).touch()

        first, second = (ended(run) for run in runs)

    assert 0 not in (first.status, second.status)
    assert not out.exists()
    assert_missed(first.said, rank=1)
    assert_told_once(second.said, "error: rank 1 lost the others (the store has not answered")


def join(nets: list[list[str]]) -> None:
    """A cable between two network namespaces."""
    other = nets[1][-1]
    plugs = "type veth peer name end1 netns"
    subprocess.run([*nets[0], IP, "link", "add", "end0", *plugs.split(), other], check=True)
    for number, net in enumerate(nets):
        for command in (
            f"addr add 10.99.0.{number + 1}/24 dev end{number}",
            f"link set end{number} up",
            "link set lo up",
        ):
            subprocess.run([*net, IP, *command.split()], check=True)


# Signals, and ranks that stand still


@pytest.mark.slow
def test_a_run_that_is_told_to_end_keeps_what_was_done(large: Large, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = start(large.gated(out), ranks=2)
    until(lambda: proven(out), run)
    run.terminate()
    gate_of(out).touch()

    done = ended(run)

    assert done.status != 0
    assert not out.exists()
    assert_told_once(done.said, "Interrupted. The finished part is kept")
    assert went_on(large.resumed(out, ranks=3))


@pytest.mark.slow
def test_a_rank_that_stands_still_ends_the_others(large: Large, tmp_path: Path) -> None:
    """Of the leader that is most: a follower that is silent is missed as one on a lost machine is."""
    out, frozen = tmp_path / "out", 0
    run = start(large.gated(out, "--timeout", "5"), ranks=2)
    until(lambda: proven(out), run)
    pids = ranks_of(run)
    os.kill(pids[frozen], signal.SIGSTOP)
    gate_of(out).touch()
    wait_until(lambda: not is_running(pids[1 - frozen]))
    os.kill(pids[frozen], signal.SIGKILL)  # torchrun itself waits half a minute before it does

    done = ended(run)

    assert not out.exists()
    assert_missed(done.said, rank=frozen)


@pytest.mark.slow
def test_a_command_that_is_wrong_is_said_so_once(tmp_path: Path) -> None:
    done = launch(["-m", "ckpt_tools", "consolidate", tmp_path, "--bogus"], ranks=2)

    assert done.status != 0
    assert done.said.count("error: no such option '--bogus'") == 1
    assert done.said.count("next: Run ckpt-tools consolidate --help.") == 1


def test_a_rank_says_why_it_ends_though_it_is_told_to_end_meanwhile(tmp_path: Path) -> None:
    """As torchrun tells it when another rank has left before."""
    script = (
        "import os, signal, click\n"
        "from ckpt_tools import cli\n"
        "echo = click.echo\n"
        "click.echo = lambda *said, **how: (os.kill(os.getpid(), signal.SIGTERM), echo(*said, **how))\n"
        f"cli.main(['consolidate', {str(tmp_path)!r}, {str(tmp_path / 'out')!r}, '--weights-only'])\n"
    )
    rank = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env=os.environ | rank,
    )

    assert done.returncode == 3, done.stderr
    assert done.stderr.count("error: ") == 1


# Disks


@pytest.mark.slow
@needs_namespaces
def test_a_disk_that_fills_ends_the_run_and_a_larger_one_lets_it_go_on(
    large: Large, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    disk = tmp_path / "disk"
    with namespace("-m") as within:

        def mount(*options: str) -> None:
            subprocess.run([*within, "mount", *options], check=True)

        mount("-t", "tmpfs", "-o", "size=200m", "none", str(disk))
        seen = Path(f"/proc/{within[-1]}/root") / disk.relative_to("/") / "out"
        run = start(large.gated(disk / "out"), ranks=2, within=within)
        until(lambda: proven(seen), run)
        mount("-o", "remount,size=30m", str(disk))
        (seen.parent / "gate").touch()

        done = ended(run)

        assert done.status != 0
        assert not seen.exists()
        assert_told_once(done.said, "no space left on the output's disk")
        assert "Run the same command with --resume" in done.said
        mount("-o", "remount,size=200m", str(disk))
        resumed = ["-m", "ckpt_tools", *large.command(disk / "out", "--resume", "--json")]
        again = ended(popen([*within, sys.executable, *resumed]))
        assert again.status == 0, again.said
        assert went_on(json.loads(again.stdout))
        assert contents(seen) == large.whole


# Any rank, at any moment


@dataclass
class Kill:
    """What a killed run left, and how the next one went."""

    ranks: int
    victim: int
    moment: str
    went_on: bool


def kill_one(large: Large, out: Path, chance: random.Random, number: int) -> Kill:
    """Run, kill a rank at some moment, look at what is left, and go on with another number of ranks."""
    size = chance.choice([2, 3])
    victim = chance.randrange(size)
    # The first one is hit while it writes; others before that, or when all is written.
    share = chance.uniform(-0.3, 1.3) if number else chance.uniform(0.2, 0.8)
    gate_of(out).unlink(missing_ok=True)
    run = start(large.gated(out, nbytes=int(max(share, 0) * large.nbytes / size)), ranks=size)
    if share < 0:
        until(lambda: len(ranks_of(run)) == size, run)
        used = chance.uniform(0, 2)
        wait_until(lambda: run.poll() is not None or cpu_seconds(ranks_of(run)[victim]) >= used)
    else:
        until(lambda: written(out) >= min(share, 1) * large.nbytes or out.exists(), run)
    moment = "after" if out.exists() else "writing" if written(out) else "before"
    pid = ranks_of(run).get(victim)
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
    gate_of(out).touch()
    said = ended(run).said
    assert said.count("Interrupted") + said.count("error: ") <= 1, said
    assert "Exception in thread" not in said, said
    if out.exists():
        assert contents(out) == large.whole, "an output appeared that is not whole"
        shutil.rmtree(out)
        resumes = False
    else:
        resumes = went_on(large.resumed(out, ranks=number % 3 + 1))
        shutil.rmtree(out)
    for left in partials(out):
        shutil.rmtree(left)
    return Kill(size, victim, moment, resumes)


@pytest.mark.slow
def test_a_rank_killed_at_any_moment_leaves_no_output_or_a_whole_one(
    large: Large, tmp_path: Path
) -> None:
    """``KILLS`` runs, one by default; ``KILL_SEED`` gives others. `make faults` ends many more."""
    count = int(os.environ.get("KILLS", "1"))
    chance = random.Random(int(os.environ.get("KILL_SEED", "7")))
    kills = []
    for number in range(count):
        kills.append(kill_one(large, tmp_path / "out", chance, number))
        print(kills[-1])
    print(Counter(kill.moment for kill in kills), "went on:", sum(kill.went_on for kill in kills))
    assert kills[0].moment == "writing"
