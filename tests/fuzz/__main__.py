"""``make fuzz``: all targets for a while, each in a process with limits of time and memory.

Coverage guides the mutation where atheris is installed. Findings are written to ``build/fuzz``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

FINDINGS = Path("build/fuzz")
_HANG_SECONDS = 5
# What waits uses no processor time. The process may also be stopped for minutes.
_LONGEST_WAIT = 240
_MEMORY = 1 << 30


def main() -> int:
    """Run the targets one after the other, and report."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=float, default=600, help="for all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="run this target in this process")
    asked = parser.parse_args()
    if asked.only:
        return _run(asked.only, asked.seconds, asked.seed)
    from tests.fuzz.targets import TARGETS

    names = [*TARGETS, "fixtures", "finished"]
    failed = []
    for name in names:
        share = asked.seconds / (len(names) + 1) * (2 if name == "fixtures" else 1)
        words = ["--only", name, "--seconds", str(share), "--seed", str(asked.seed)]
        done = subprocess.run([sys.executable, "-m", "tests.fuzz", *words], check=False)
        if done.returncode:
            failed.append(name)
    print("found something in: " + ", ".join(failed) if failed else "nothing was found", flush=True)
    return 1 if failed else 0


class _Watch:
    """Limits of one input, and what was found."""

    def __init__(self, name: str) -> None:
        self.name, self.runs, self.found, self.slowest = name, 0, 0, 0.0
        self._known: set[str] = set()
        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
        signal.signal(signal.SIGALRM, self._hang)

    @staticmethod
    def _hang(*_: object) -> None:
        raise AssertionError(f"it did not end in {_LONGEST_WAIT} seconds")

    def run(self, call: Any, data: bytes) -> None:
        """Call with one input."""
        from ckpt_tools.errors import CkptError

        self.runs += 1
        started = time.process_time()
        signal.setitimer(signal.ITIMER_REAL, _LONGEST_WAIT)
        try:
            call(data)
        except CkptError:
            pass
        except Exception as error:
            self._note(error, data)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        took = time.process_time() - started
        self.slowest = max(self.slowest, took)
        if took > _HANG_SECONDS:
            self._note(AssertionError(f"it took {took:.1f} seconds"), data)

    def _note(self, error: Exception, data: bytes) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        place = (
            f"{type(error).__name__}:{frames[-1].filename}:{frames[-1].lineno}"
            if frames
            else str(error)
        )
        if place in self._known:
            return
        self._known.add(place)
        self.found += 1
        FINDINGS.mkdir(parents=True, exist_ok=True)
        (FINDINGS / f"{self.name}-{self.found}").write_bytes(data)
        print(f"--- {self.name} {self.found}", flush=True)
        traceback.print_exception(error)

    def report(self) -> None:
        """Print the counts."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{self.name}: {self.runs:,} inputs, {self.found} findings, slowest {self.slowest:.2f} s, "
            f"{peak:.0f} MB",
            flush=True,
        )


def _run(name: str, seconds: float, seed: int) -> int:
    watch = _Watch(name)
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if os.path.isdir("/dev/shm") else None
    ) as scratch:
        if name in ("fixtures", "finished"):
            _mutate_fixtures(watch, Path(scratch), end, seed, finished=name == "finished")
        elif importlib.util.find_spec("atheris"):
            _with_coverage(watch, Path(scratch), seconds, seed)
        else:
            _without_coverage(watch, Path(scratch), end, seed)
    watch.report()
    return 1 if watch.found else 0


def _without_coverage(watch: _Watch, scratch: Path, end: float, seed: int) -> None:
    from tests.fuzz.mutation import mutated
    from tests.fuzz.targets import TARGETS, seeds

    target, generator = TARGETS[watch.name], random.Random(seed)
    inputs = seeds(watch.name)
    while time.monotonic() < end:
        data = mutated(generator.choice(inputs), generator)
        watch.run(lambda data: target(data, scratch), data)


def _with_coverage(watch: _Watch, scratch: Path, seconds: float, seed: int) -> None:
    import atheris

    with atheris.instrument_imports(include=["ckpt_tools"]), contextlib.suppress(ImportError):
        from tests.fuzz.targets import TARGETS, seeds
    from tests.fuzz.mutation import mutated

    target = TARGETS[watch.name]
    FINDINGS.mkdir(parents=True, exist_ok=True)
    corpus = scratch / "corpus"
    corpus.mkdir()
    for number, data in enumerate(seeds(watch.name)):
        (corpus / str(number)).write_bytes(data)
    generator = random.Random(seed)
    # Instrumenting is no fuzzing.
    end = time.monotonic() + seconds

    def one(data: bytes) -> None:
        if time.monotonic() > end:
            watch.report()
            sys.stdout.flush()
            os._exit(1 if watch.found else 0)
        # Half of what coverage has led to is mutated by its structure, too.
        if data and generator.random() < 0.5:
            data = mutated(data, generator)
        watch.run(lambda data: target(data, scratch), data)

    words = [
        sys.argv[0],
        str(corpus),
        f"-seed={seed + 1}",
        "-max_len=65536",
        "-rss_limit_mb=0",
        "-timeout=0",
        f"-artifact_prefix={FINDINGS}/",
    ]
    atheris.Setup([*words, "-verbosity=0"], one)
    atheris.Fuzz()


def _mutate_fixtures(
    watch: _Watch, scratch: Path, end: float, seed: int, *, finished: bool
) -> None:
    from tests.fuzz.mutation import mutated
    from tests.fuzz.targets import FINISHED, Fixture, fixtures

    generator = random.Random(seed)
    paths = [FINISHED] if finished else [*fixtures()]
    while time.monotonic() < end:
        place = Path(tempfile.mkdtemp(dir=scratch))
        copy = Fixture(generator.choice(paths), place, finished=finished)
        for _ in range(40):
            file = generator.choice(copy.small)
            watch.run(partial(copy.try_with, file), mutated(file.read_bytes(), generator))
        shutil.rmtree(copy.path)


if __name__ == "__main__":
    sys.exit(main())
