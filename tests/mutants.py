"""Mistakes that the tests must notice: each is made in a copy of the repository, where its tests then run.

    python tests/mutants.py --list           the mistakes and the tests that are expected to notice them
    python tests/mutants.py --check          whether each mistake can still be made in the code as it is
    python tests/mutants.py --json FILE      make all of them, one after the other (half an hour)
    python tests/mutants.py --compare A B    two such files side by side

The table is in ``mutants_table.py``. First the named tests run on code without a mistake. What fails there is
listed, and is left out of the runs with a mistake. Each copy has its own interpreter: a process that a test
starts imports the copy too, whatever the test does to PYTHONPATH. ``--json`` keeps what an earlier run wrote
of other mistakes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import queue
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REPORT = "CKPT_TOOLS_MUTANTS_REPORT"
# A mistake may make tests wait for ever; the machine may be busier than it was without one.
_LEAST_SECONDS, _TIMES = 120.0, 4.0


@dataclass(frozen=True)
class Mutant:
    """A mistake.

    Attributes:
        id: what it is called.
        file: the file, relative to the package.
        old: text that occurs once in the file.
        new: what a hasty hand would write instead.
        breaks: what is wrong then.
        tests: files or node ids, relative to ``tests``, that must notice; the nearest first.
    """

    id: str
    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The file, relative to the repository."""
        return Path("ckpt_tools", self.file)


@dataclass
class Ran:
    """What one run of pytest gave.

    Attributes:
        status: ``passed``, ``failed``, ``timeout`` or ``broken``.
        failed: node ids that failed, in their order; for a timeout or a crash the test that was running.
        passed: number of tests that passed.
        seconds: of the whole run.
        output: its last lines.
    """

    status: str
    failed: list[str]
    passed: int
    seconds: float
    output: str


# -- in the process that runs the tests --------------------------------------------------------------


def pytest_runtest_logstart(nodeid: str) -> None:
    """Note which test runs: where the process dies, it is the last one."""
    _note(nodeid, "started")


def pytest_runtest_logreport(report: Any) -> None:
    """Note what came of a step of a test."""
    if report.failed or (report.when == "call" and report.passed):
        _note(report.nodeid, report.outcome)


def pytest_collectreport(report: Any) -> None:
    """Note a file that cannot be imported."""
    if report.failed:
        _note(report.nodeid, "failed")


def _note(nodeid: str, outcome: str) -> None:
    if file := os.environ.get(REPORT):
        with open(file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps([nodeid, outcome]) + "\n")


# -- copies ------------------------------------------------------------------------------------------


class Copy:
    """A copy of the repository in ``home``, and an interpreter that imports it."""

    def __init__(self, home: Path) -> None:
        self.home, self.tree = home, home / "tree"
        self._scratch, self._report = home / "tmp", home / "report.jsonl"
        interpreter = home / "env"
        self.python = interpreter / "bin" / "python"
        command = [sys.executable, "-m", "venv", "--without-pip", "--symlinks", str(interpreter)]
        subprocess.run(command, check=True)
        found = [self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        site = Path(subprocess.run(found, check=True, capture_output=True, text=True).stdout[:-1])
        shared = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
        lines = [str(self.tree), *(f"import site; site.addsitedir({place!r})" for place in shared)]
        (site / "copy.pth").write_text("\n".join(lines) + "\n")

    def made_of(self, source: Path) -> Copy:
        """The same, with the files of another tree."""
        shutil.rmtree(self.tree, ignore_errors=True)
        shutil.copytree(source, self.tree, ignore=shutil.ignore_patterns(".hypothesis"))
        return self

    def prove(self) -> None:
        """Raise RuntimeError unless every process imports the copy, with PYTHONPATH and without."""
        program = "import ckpt_tools; print(ckpt_tools.__file__)"
        for path in (str(self.tree), ""):
            done = subprocess.run(
                [self.python, "-c", program],
                cwd="/",
                env=self._environment() | {"PYTHONPATH": path},
                check=True,
                capture_output=True,
                text=True,
            )
            if not Path(done.stdout.strip()).is_relative_to(self.tree):
                raise RuntimeError(f"a process of a test would import {done.stdout.strip()}")

    def run(self, tests: Sequence[str], *options: str, limit: float | None = None) -> Ran:
        """Run some tests."""
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir()
        self._report.unlink(missing_ok=True)
        command = [self.python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-p", "tests.mutants", "--hypothesis-seed=0", *options, *tests]
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=self.tree,
            env=self._environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            output, code = process.communicate(timeout=limit)[0], process.returncode
        except subprocess.TimeoutExpired:
            output, code = "", None
        finally:
            self._end(process)
        seconds = time.monotonic() - started
        noted = [(str(node), str(outcome)) for node, outcome in self._noted()]
        failed = list(dict.fromkeys(node for node, outcome in noted if outcome == "failed"))
        passed = sum(outcome == "passed" for _, outcome in noted)
        if code is None:
            return Ran("timeout", failed or _running(noted), passed, seconds, "")
        if code == 0:
            return Ran("passed", [], passed, seconds, "")
        status = "failed" if failed or code < 0 else "broken"
        return Ran(status, failed or _running(noted), passed, seconds, output[-3000:])

    def _noted(self) -> list[list[str]]:
        if not self._report.exists():
            return []
        return [json.loads(line) for line in self._report.read_text("utf-8").splitlines()]

    def _environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTEST_ADDOPTS", "PYTHONHOME")}
        return kept | {
            "PATH": f"{self.python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONPATH": str(self.tree),
            "VIRTUAL_ENV": str(self.python.parents[1]),
            "TMPDIR": str(self._scratch),
            REPORT: str(self._report),
        }

    def _end(self, process: subprocess.Popen[str]) -> None:
        """End what a run that was cut short has left: it is told by the file that it reports to."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        mark = f"{REPORT}={self._report}".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    os.kill(int(entry.name), signal.SIGKILL)


def _running(noted: Sequence[tuple[str, str]]) -> list[str]:
    return [node for node, outcome in noted if outcome == "started"][-1:]


def template(home: Path) -> Path:
    """The tracked files of the repository as they are now, compiled.

    What was compiled is taken for current by the digest of its source: by time and size, which is the
    default, a mistake of the same length would not be imported.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True
    ).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, home / name)
    compiling = ["-m", "compileall", "-q", "--invalidation-mode", "checked-hash", "ckpt_tools"]
    subprocess.run([sys.executable, *compiling], cwd=home, check=True)
    return home


# -- mistakes ----------------------------------------------------------------------------------------


def complaints(mutants: Sequence[Mutant]) -> Iterator[str]:
    """Why mistakes cannot be made in the code as it is."""
    ids = [mutant.id for mutant in mutants]
    yield from (f"{name}: two mistakes are called so" for name in ids if ids.count(name) > 1)
    for mutant in mutants:
        path = ROOT / mutant.path
        count = path.read_text("utf-8").count(mutant.old) if path.is_file() else -1
        if count != 1:
            what = "there is no such file" if count < 0 else f"its text occurs {count} times"
            yield f"{mutant.id}: {mutant.path}: {what}"
        if mutant.old == mutant.new:
            yield f"{mutant.id}: it changes nothing"
        for test in mutant.tests:
            if not (ROOT / "tests" / test.partition("::")[0]).is_file():
                yield f"{mutant.id}: there is no tests/{test}"


def tried(mutant: Mutant, copy: Copy, known: Sequence[str], limit: float, every: bool) -> Ran:
    """Make the mistake in a copy, and run its tests up to the first that fails."""
    path = copy.tree / mutant.path
    text = path.read_text("utf-8")
    changed = text.replace(mutant.old, mutant.new)
    compile(changed, str(path), "exec")
    path.write_text(changed, "utf-8")
    left_out = [f"--deselect={node}" for node in known]
    tests = ["tests"] if every else [f"tests/{test}" for test in mutant.tests]
    return copy.run(tests, "-x", *left_out, limit=limit)


def measured(
    mutants: Sequence[Mutant],
    *,
    jobs: int,
    every: bool,
    limit: float | None,
    keep: Callable[[dict[str, Any], dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Try all mistakes; what came of each, as plain values.

    Args:
        mutants: the mistakes.
        jobs: how many at a time.
        every: run the whole suite for each.
        limit: seconds for each; by default a multiple of what all tests take without a mistake.
        keep: called with the facts of this run and what came of a mistake, one after the other.
    """
    tests = list(dict.fromkeys(f"tests/{test}" for mutant in mutants for test in mutant.tests))
    with tempfile.TemporaryDirectory(prefix="mutants-") as made:
        homes = Path(made)
        source = template(homes / "template")
        copies: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        for number in range(jobs):
            (homes / str(number)).mkdir()
            copies.put(Copy(homes / str(number)))
        first = copies.get().made_of(source)
        first.prove()
        print(f"without a mistake: {len(tests)} files or tests ...", flush=True)
        before = first.run(["tests"] if every else tests)
        if before.status == "broken":
            raise RuntimeError(f"the tests cannot be run:\n{before.output}")
        # What pytest compiled of the tests is of use to every copy.
        source = shutil.copytree(first.tree, homes / "compiled", symlinks=True)
        copies.put(first)
        print(f"without a mistake: {before.passed} passed in {before.seconds:.0f} s")
        for node in before.failed:
            print(f"without a mistake it fails, and is left out: {node}", flush=True)
        most = limit or _LEAST_SECONDS + _TIMES * before.seconds
        facts = {
            "python": platform.python_version(),
            "processor": _processor(),
            "without": {
                "passed": before.passed,
                "failed": before.failed,
                "seconds": round(before.seconds, 1),
            },
        }
        commit, lock = _git("rev-parse", "HEAD"), threading.Lock()

        def result(mutant: Mutant) -> dict[str, Any]:
            copy = copies.get().made_of(source)
            try:
                ran = tried(mutant, copy, before.failed, most, every)
            finally:
                copies.put(copy)
            names = {"passed": "survived", "failed": "killed"}
            told = asdict(mutant) | {
                "status": names.get(ran.status, ran.status),
                "by": ran.failed[0] if ran.failed else None,
                "seconds": round(ran.seconds, 1),
            }
            told["commit"] = commit
            if ran.status == "broken":
                told["output"] = ran.output
            with lock:
                print(_line(told), flush=True)
                keep(facts, told)
            return told

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(result, mutants))


def written(path: Path) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """Writes what came of each mistake, so that nothing is lost of a run that is cut short."""
    before = json.loads(path.read_text("utf-8"))["mutants"] if path.exists() else []
    kept = {told["id"]: told for told in before}
    path.parent.mkdir(parents=True, exist_ok=True)

    def keep(facts: dict[str, Any], told: dict[str, Any]) -> None:
        kept[told["id"]] = told
        text = json.dumps({**facts, "mutants": list(kept.values())}, indent=1)
        path.with_suffix(".new").write_text(text + "\n", "utf-8")
        path.with_suffix(".new").replace(path)

    return keep


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


# -- words -------------------------------------------------------------------------------------------


def _line(told: dict[str, Any]) -> str:
    by = str(told["by"] or "").removeprefix("tests/")
    return f"{told['id']:32} {told['status']:9} {told['seconds']:6.1f} s  {by}"


def totals(results: Sequence[dict[str, Any]]) -> str:
    """How many came to which end."""
    statuses = [told["status"] for told in results]
    parts = (f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
    return f"{len(statuses)} mistakes: {', '.join(parts)}"


def side_by_side(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Two measurements as a table of Markdown."""
    then = {told["id"]: told for told in before["mutants"]}
    now = {told["id"]: told for told in after["mutants"]}
    lines = ["| mistake | before | after |", "|---|---|---|"]
    for name in dict.fromkeys((*then, *now)):
        cells = [_cell(measurement.get(name)) for measurement in (then, now)]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    lines += ["", f"before: {totals(before['mutants'])}", f"after: {totals(after['mutants'])}"]
    return "\n".join(lines)


def _cell(told: dict[str, Any] | None) -> str:
    if told is None:
        return "not tried"
    by = str(told["by"] or "").removeprefix("tests/").replace("|", "\\|")
    return by if told["status"] == "killed" else f"{told['status']} {by}".strip()


def main() -> None:
    """Do what is asked on the command line."""
    from tests.mutants_table import MUTANTS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="ID", help="make these mistakes alone")
    parser.add_argument("--list", action="store_true", help="say what there is, and do nothing")
    parser.add_argument("--check", action="store_true", help="whether each can still be made")
    parser.add_argument("--all-tests", action="store_true", help="run the whole suite for each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what came of it")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="copies at a time")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="for each mistake's tests")
    parser.add_argument("--compare", nargs=2, type=Path, metavar="FILE", help="two such files")
    options = parser.parse_args()
    if options.compare:
        print(side_by_side(*(json.loads(path.read_text()) for path in options.compare)))
        return
    chosen = [m for m in MUTANTS if options.only is None or m.id in options.only]
    unknown = set(options.only or ()) - {mutant.id for mutant in chosen}
    if unknown:
        parser.error(f"there is no mistake {', '.join(sorted(unknown))}")
    if options.list:
        for mutant in chosen:
            print(f"{mutant.id}: {mutant.breaks} ({mutant.path})")
            print(textwrap.indent("\n".join(mutant.tests), "    "))
        return
    wrong = list(complaints(chosen))
    if wrong:
        sys.exit("\n".join(wrong))
    if options.check:
        print(f"each of {len(chosen)} mistakes can be made")
        return
    found = measured(
        chosen,
        jobs=options.jobs,
        every=options.all_tests,
        limit=options.limit,
        keep=(lambda facts, told: None) if options.json is None else written(options.json),
    )
    print(totals(found))
    if any(told["status"] not in ("killed", "timeout") for told in found):
        sys.exit(1)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
