"""Ranks of a real torchrun that are killed or stopped, and what must be true afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tests.faults.cases import Cases, Job, run, tree, wait_for
from tests.faults.functions import FUNCTIONS
from tests.support.ranks.launching import GATED, ended, is_running, kill_all, ranks_of, start
from tests.support.waiting import wait_until

# The limit that the command is given for a rank that stands still.
_TIMEOUT = "5"
# The ranks of the smallest job write this many bytes each.
_MOST_WRITTEN = 20_000


class RankCases:
    """Runs cases under torchrun on the jobs of :class:`Cases`, and notes their outcomes there."""

    def __init__(self, cases: Cases) -> None:
        self.cases = cases

    def disturb(self, number: int) -> None:
        """Kill or stop one of two or three ranks."""
        cases = self.cases
        jobs = [job for job in cases.jobs if job.words[0] not in FUNCTIONS]
        job = jobs[number % len(jobs)]
        size, stops = 2 + number % 2, number // 2 % 2 == 1
        out = cases.clear()
        gate = cases.scratch / f"gate-{number}"
        # Most are struck while they write: a rank that has written so much stands at the gate.
        limit = cases.random.randrange(_MOST_WRITTEN)
        process = start(
            [GATED, str(limit), gate, *cases.words(job, "--timeout", _TIMEOUT)],
            ranks=size,
            environment={"LD_PRELOAD": ""},
        )
        try:
            self._reach(process, out, size, begun=stops or number % 3 > 0)
            ranks = ranks_of(process)
            victim = cases.random.choice([*ranks] or [0])
            self._strike(ranks, victim, gate, stops=stops)
            done = ended(process)
        except AssertionError as error:
            kill_all(process)
            cases.failures.append(f"{job.name}, {size} ranks: {error}")
            return
        kind = "rank stopped" if stops else "rank killed"
        self._judge(job, f"{kind}, {size} ranks", done.status, done.said)

    def _reach(self, process: subprocess.Popen[str], out: Path, size: int, *, begun: bool) -> None:
        """Wait for a moment: while the ranks start, or after they have begun to write."""
        if begun:
            wait_until(lambda: [*out.parent.glob("out*")] or process.poll() is not None)
            time.sleep(self.cases.random.random() * 0.5)
        else:
            wait_until(lambda: len(ranks_of(process)) == size or process.poll() is not None)
            time.sleep(self.cases.random.random() * 5)

    def _strike(self, ranks: dict[int, int], victim: int, gate: Path, *, stops: bool) -> None:
        with contextlib.suppress(ProcessLookupError, KeyError):
            os.kill(ranks[victim], signal.SIGSTOP if stops else signal.SIGKILL)
        gate.touch()
        if stops:
            others = [pid for rank, pid in ranks.items() if rank != victim]
            try:
                wait_until(lambda: not any(map(is_running, others)))
            finally:
                # torchrun waits half a minute before it does so.
                with contextlib.suppress(ProcessLookupError, KeyError):
                    os.kill(ranks[victim], signal.SIGKILL)

    def _judge(self, job: Job, kind: str, status: int, said: str) -> None:
        cases, out, wrong = self.cases, self.cases.out(), []
        whole = out.exists()
        if whole and tree(out) != job.expected:
            wrong.append("the output is not that of an undisturbed run")
        if not whole and status == 0:
            wrong.append("it ended with status 0 and has no output")
        if "unforeseen" in said:
            wrong.append("it printed an unforeseen error")
        if not whole:
            resume = ["--resume"] if [*out.parent.glob("*.partial-*")] else []
            again = wait_for(run(cases.words(job, *resume), cases.log))
            if again != 0:
                wrong.append(f"the next run ended with status {again}: {cases.log.read_text()}")
            elif tree(out) != job.expected:
                wrong.append("the next run gave other bytes")
        cases.outcomes[kind, "complete" if whole else "as before"] += 1
        if wrong:
            cases.failures.append(f"{job.name}, {kind}: {'; '.join(wrong)}\n{said}")
        shutil.rmtree(out, ignore_errors=True)
