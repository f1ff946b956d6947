"""The cases of ``make faults``: what is run, how it is disturbed, and what must be true afterwards."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.functions import FUNCTIONS, called

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
_KINDS = [
    *("none", "count", "short-read", "short-write", "interrupt", "read-error", "write-error"),
    *("no-space", "quota", "sync-error", "write-nothing", "rename-error", "read-only"),
    *("vanish", "truncate", "change"),
]
# The faults of the input, and of the output; the others are of both.
_OF_INPUT = {"read-error", "vanish", "truncate", "change"}
_OF_OUTPUT = {
    *(
        "write-error",
        "no-space",
        "quota",
        "sync-error",
        "write-nothing",
        "rename-error",
        "read-only",
    )
}
_HARMLESS = {"short-read", "short-write", "interrupt"}
# Other work on the machine may take most of it.
_SECONDS = 300
# Statuses of a run that was disturbed: damaged input, output that cannot be written.
_STATUSES = {4, 6}


@dataclass
class Job:
    """A command, its input and what it writes when nothing disturbs it."""

    words: list[str]
    source: Path
    name: str
    expected: dict[str, str] = field(default_factory=dict)
    reads: int = 0
    writes: int = 0
    seconds: float = 0.0


class Shim:
    """The library that was loaded before the C library."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.fault_calls.restype = ctypes.c_long

    def arm(self, kind: str, path: Path, first: int = 0, times: int = 1 << 30) -> None:
        """Let calls on files below a path fail, from the first chosen one on."""
        number = _KINDS.index(kind)
        place = os.fsencode(os.path.realpath(path))
        self._library.fault_arm(number, place, ctypes.c_long(first), ctypes.c_long(times))

    def calls(self) -> int:
        """Number of calls since the shim was armed."""
        return int(self._library.fault_calls())


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(directory: Path) -> dict[str, str]:
    """Every file with the digest of its bytes. A manifest names the path of the output's source alone."""
    return {
        str(path.relative_to(directory)): digest(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def run(words: list[str], log: Path, before: Callable[[], None] | None = None) -> int:
    """The process of a command; it is a fork of this one, which has everything imported."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        from ckpt_tools.cli import main

        if before is not None:
            before()
        status = called(words) if words[0] in FUNCTIONS else main(words) or 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(bool(end.code))
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def wait_for(child: int) -> int | None:
    """The exit status; a negative number for a signal, None if it hangs and was killed."""
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


class Cases:
    """Runs cases, and counts what came of them."""

    def __init__(self, scratch: Path, seed: int) -> None:
        self.scratch, self.random, self.shim = scratch, random.Random(seed), Shim()
        self.log = scratch / "log"
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.failures: list[str] = []
        self.jobs = list(self._jobs())
        for job in self.jobs:
            self._measure(job)

    def _jobs(self) -> Iterator[Job]:
        """Every command that writes, on small shipped checkpoints."""
        inputs = {
            "zero2": FIXTURES / "zero" / "zero2-bf16-llama-3ranks" / "checkpoint",
            "zero3": FIXTURES / "zero" / "zero3-bf16-olmo2-chat-2ranks" / "checkpoint",
            "lora": FIXTURES / "zero" / "zero3-bf16-olmo2-lora-2ranks",
            "fsdp": FIXTURES / "accelerate" / "fsdp2-sharded-3ranks" / "checkpoint",
            "composite": FIXTURES / "composite" / "zero3-policy-value" / "checkpoint",
        }
        for name, path in inputs.items():
            shutil.copytree(path, self.scratch / "input" / name)
        plain = ["--weights-only", "--workers", "2"]
        # A third of the jobs write whole directories. What transformers says is asked once and then kept.
        os.environ["CKPT_TOOLS_CACHE"] = str(self.scratch / "cache")
        zero = FIXTURES / "zero"
        llama = ["--config", str(zero / "zero2-bf16-llama-3ranks" / "hf"), "--workers", "2"]
        olmo = str(zero / "zero3-bf16-olmo2-chat-2ranks" / "hf")
        chat = ["--config", olmo, "--tokenizer", olmo, "--workers", "2", "--sha256"]
        lora = self.scratch / "input" / "lora"
        commands = {
            "consolidate zero2": ("zero2", ["consolidate", "IN", "OUT", *llama]),
            "consolidate zero3": ("zero3", ["consolidate", "IN", "OUT", *chat]),
            "consolidate --verify": ("zero2", ["consolidate", "IN", "OUT", *plain, "--verify"]),
            "extract-attr": ("composite", ["extract-attr", "policy", "IN", "OUT", *plain]),
            "average": ("zero2", ["average", "IN", "IN", "OUT", *llama]),
            "merge_fsdp_weights": ("fsdp", ["merge_fsdp_weights", "IN", "OUT"]),
            "training.save": ("zero2", ["training.save", "IN", "OUT"]),
            "extract-lora": (
                "lora",
                [
                    "extract-lora",
                    str(lora / "checkpoint"),
                    "OUT",
                    "--adapter-config",
                    str(lora / "hf"),
                    "--base-model",
                    "owner/base",
                ],
            ),
            "merge-lora": (
                "lora",
                [
                    "merge-lora",
                    str(lora / "checkpoint"),
                    "OUT",
                    "--adapter-config",
                    str(lora / "hf"),
                    *plain,
                ],
            ),
        }
        for name, (source, words) in commands.items():
            place = self.scratch / "input" / source
            yield Job([str(place) if word == "IN" else word for word in words], place, name)

    def out(self) -> Path:
        """Where a job writes."""
        return self.scratch / "work" / "out"

    def words(self, job: Job, *more: str) -> list[str]:
        """The command of a job, with more options."""
        words = [str(self.out()) if word == "OUT" else word for word in job.words]
        return words if words[0] in FUNCTIONS else [*words, *more]

    def _measure(self, job: Job) -> None:
        """The output of an undisturbed run, and how many calls it makes."""
        for attribute, place in (("reads", job.source), ("writes", self.out().parent)):
            reader, writer = os.pipe()

            def armed(place: Path = place, writer: int = writer) -> None:
                self.shim.arm("count", place)
                leave = os._exit

                def told(code: int, writer: int = writer, leave: Any = leave) -> None:
                    os.write(writer, str(self.shim.calls()).encode())
                    leave(code)

                os._exit = told  # type: ignore[assignment]

            self.clear()
            started = time.monotonic()
            status = wait_for(run(self.words(job), self.log, armed))
            job.seconds = time.monotonic() - started
            os.close(writer)
            with os.fdopen(reader) as stream:
                setattr(job, attribute, int(stream.read() or 0))
            if status != 0:
                raise SystemExit(f"{job.name} fails undisturbed:\n{self.log.read_text()}")
        job.expected = tree(self.out())

    def clear(self) -> Path:
        """Make the place of the output empty."""
        work = self.out().parent
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        return self.out()

    def _judge(self, job: Job, kind: str, status: int | None, allowed: set[int]) -> None:
        """Note what came of a run, then run it again and compare."""
        out, text = self.out(), self.log.read_text(errors="replace")
        wrong = []
        if status is None:
            wrong.append(f"it took more than {_SECONDS} seconds")
        elif status not in allowed:
            wrong.append(f"it ended with status {status}")
        if "Traceback" in text or "unforeseen" in text:
            wrong.append("it printed a traceback")
        if out.exists() and any(out.iterdir()):
            if tree(out) != job.expected:
                wrong.append("the output is not that of an undisturbed run")
        elif status == 0:
            wrong.append("it ended with status 0 and has no output")
        if not out.exists():
            partials = [*out.parent.glob("*.partial-*")]
            again = wait_for(run(self.words(job, *(["--resume"] if partials else [])), self.log))
            if again != 0:
                wrong.append(f"the next run ended with status {again}: {self.log.read_text()}")
            elif tree(out) != job.expected:
                wrong.append("the next run gave other bytes")
        self.outcomes[kind, "as before" if status != 0 else "complete"] += 1
        if wrong:
            self.failures.append(f"{job.name}, {kind}: {'; '.join(wrong)}\n{text}")

    @contextlib.contextmanager
    def _input_kept(self, job: Job, *, spoiled: bool) -> Iterator[None]:
        """The input is the same afterwards; where the fault itself changes it, it is restored."""
        kept = self.scratch / "kept"
        shutil.copytree(job.source, kept)
        before = tree(job.source)
        try:
            yield
        finally:
            if spoiled:
                shutil.rmtree(job.source)
                kept.rename(job.source)
            else:
                shutil.rmtree(kept)
                if tree(job.source) != before:
                    self.failures.append(f"{job.name}: the input was changed")

    def kill(self, number: int) -> None:
        """Kill a run at a moment that is spread over its whole time."""
        job = self.jobs[number % len(self.jobs)]
        overwrite = number % 3 == 2 and job.words[0] not in FUNCTIONS
        self.clear()
        if overwrite:
            self.out().mkdir()
            (self.out() / "old").write_text("old")
        with self._input_kept(job, spoiled=False):
            child = run(self.words(job, *(["--overwrite"] if overwrite else [])), self.log)
            time.sleep(self.random.random() * job.seconds * 1.1)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            status = wait_for(child)
            out = self.out()
            if overwrite and (out / "old").exists():
                if sorted(path.name for path in out.iterdir()) != ["old"]:
                    self.failures.append(f"{job.name}: the old output was changed")
                shutil.rmtree(out)
            self._judge(job, "kill", status, {0, -signal.SIGKILL})

    def fault(self, number: int) -> None:
        """Let system calls fail in a run."""
        kinds = [kind for kind in _KINDS if kind not in ("none", "count")]
        kinds += ["file-size", "two-runs", "other-disk"]
        kind = kinds[number % len(kinds)]
        job = self.jobs[(number // len(kinds) + number) % len(self.jobs)]
        self.clear()
        if kind == "two-runs":
            return self._two_runs(job)
        if kind == "other-disk":
            return self._other_disk(job)
        if kind == "file-size":
            with self._input_kept(job, spoiled=False):
                size = self.random.choice([0, 1_000, 20_000])
                limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # noqa: E731
                # The limit is also that of a log.
                self.log.write_text("")
                status = wait_for(run(self.words(job), Path(os.devnull), limit))
                self._judge(job, kind, status, {0, 6})
            return None
        place = job.source if kind in _OF_INPUT or kind == "short-read" else self.out().parent
        if kind == "interrupt" and number % 2:
            place = job.source
        calls = job.reads if place == job.source else job.writes
        # Few calls of a kind follow the first ones; an input is read all the time.
        first = self.random.randrange(max(calls, 1)) if kind in _OF_INPUT else 0
        if kind in ("write-error", "no-space", "quota", "sync-error", "write-nothing"):
            first = self.random.choice([0, 0, 1, 2, 4])
        times = 1 << 30 if kind not in ("vanish", "truncate", "change") else 1
        allowed = {0} if kind in _HARMLESS else {0, 4} if kind in _OF_INPUT else {0, 6}
        with self._input_kept(job, spoiled=kind in ("vanish", "truncate", "change")):
            armed = lambda: self.shim.arm(kind, place, first, times)  # noqa: E731
            status = wait_for(run(self.words(job), self.log, armed))
            if kind in ("vanish", "truncate", "change") and status == 0:
                # It was read before; what was written is compared with the input as it was.
                self._judge(job, kind, status, allowed)
                return None
            if kind in ("vanish", "truncate", "change"):
                self._judge_spoiled(job, kind, status, allowed)
                return None
            self._judge(job, kind, status, allowed)
        return None

    def _judge_spoiled(self, job: Job, kind: str, status: int | None, allowed: set[int]) -> None:
        """The input is spoiled, so there is no second run."""
        text = self.log.read_text(errors="replace")
        wrong = (
            status is None
            or status not in allowed | {2, 3}
            or "Traceback" in text
            or "unforeseen" in text
        )
        if wrong or (self.out().exists() and any(self.out().iterdir())):
            self.failures.append(f"{job.name}, {kind}: status {status}\n{text}")
        self.outcomes[kind, "as before"] += 1

    def _two_runs(self, job: Job) -> None:
        """One publishes; the other publishes the same first, or is refused."""
        logs = [self.log, self.log.with_name("log2")]
        children = [run(self.words(job), log) for log in logs]
        statuses = [wait_for(child) for child in children]
        if 0 not in statuses or not {*statuses} <= {0, 2}:
            self.failures.append(
                f"{job.name}, two-runs: {statuses}\n{logs[0].read_text()}{logs[1].read_text()}"
            )
        self._judge(job, "two-runs", 0, {0})

    def _other_disk(self, job: Job) -> None:
        """The output's parent is a link to another file system."""
        other = Path("/dev/shm") / f"ckpt-tools-faults-{os.getpid()}"
        other.mkdir()
        try:
            work = self.out().parent
            shutil.rmtree(work)
            work.symlink_to(other)
            self._judge(job, "other-disk", wait_for(run(self.words(job), self.log)), {0})
        finally:
            work.unlink()
            shutil.rmtree(other)


def main() -> int:
    """Run the cases; arguments: scratch directory, numbers of kills, faults and ranks, seed."""
    scratch, kills, faults, ranks, seed = Path(sys.argv[1]), *map(int, sys.argv[2:6])
    # Everything that a run imports, before the forks.
    import torch  # noqa: F401

    import ckpt_tools.conversion.api
    import ckpt_tools.verification  # noqa: F401
    from tests.faults.ranks import RankCases

    cases = Cases(scratch, seed)
    for number in range(kills):
        cases.kill(number)
    for number in range(faults):
        cases.fault(number)
    together = RankCases(cases)
    for number in range(ranks):
        together.disturb(number)
    for (kind, outcome), count in sorted(cases.outcomes.items()):
        print(f"{kind}: {count} {outcome}")
    failures = len(cases.failures)
    print(f"{kills} kills, {faults} faults, {ranks} ranks, {failures} failures")
    for failure in cases.failures:
        print(f"--- {failure}")
    return 1 if cases.failures else 0


if __name__ == "__main__":
    sys.exit(main())
