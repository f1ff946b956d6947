"""Mistakes that the tests must notice: each is made in a copy of the repository, where its tests then run.

    python tests/mutants.py --list           the mistakes and the tests that are expected to notice them
    python tests/mutants.py --check          whether each mistake can still be made in the code as it is
    python tests/mutants.py --json FILE      make all of them, one after the other (half an hour)
    python tests/mutants.py --compare A B    two such files side by side

The table is in ``mutants_table.py``. A test that notices a mistake must pass without one. So the tests that
failed run once more on the code as it is; those that fail there too are listed and left out, and the mistakes
that they seemed to notice are tried again. Each copy has its own interpreter: a process that a test starts
imports the copy too, whatever the test does to PYTHONPATH. The interpreter has imported torch, and is forked
for each run. ``--json`` keeps what an earlier run wrote of other mistakes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import queue
import select
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
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "ckpt_tools"
REPORT = "CKPT_TOOLS_MUTANTS_REPORT"
# A mistake may make tests wait for ever; other processes may have the processor.
_LIMIT_SECONDS = 900.0


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
        return Path(PACKAGE, self.file)


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


def serve() -> None:
    """Fork for each line on stdin, and run pytest there: a tree, the file of its output, its arguments."""
    # Not hypothesis: a run that shares its random state with others tries what they have tried.
    import huggingface_hub  # noqa: F401
    import numpy  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch  # noqa: F401

    for line in sys.stdin:
        tree, output, arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            _run_pytest(tree, output, arguments)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run_pytest(tree: str, output: str, arguments: list[str]) -> NoReturn:
    status = 3
    try:
        os.setsid()
        stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, stream), (2, stream)):
            os.dup2(source, number)
        os.chdir(tree)
        # As `python -m` puts it there; the directory of this script would hide packages.
        sys.path[0] = tree
        import pytest

        status = int(pytest.main(arguments))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


# -- copies ------------------------------------------------------------------------------------------


class Copy:
    """A copy of the repository in ``home``, and an interpreter that imports it."""

    def __init__(self, home: Path) -> None:
        self.home, self.tree = home, home / "tree"
        self._scratch, self._report = home / "tmp", home / "report.jsonl"
        self._output = home / "output.txt"
        self._server: subprocess.Popen[str] | None = None
        interpreter = home / "env"
        self.python = interpreter / "bin" / "python"
        command = [sys.executable, "-m", "venv", "--without-pip", "--symlinks", str(interpreter)]
        subprocess.run(command, check=True)
        found = [self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        site = Path(subprocess.run(found, check=True, capture_output=True, text=True).stdout[:-1])
        shared = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
        lines = [str(self.tree), *(f"import site; site.addsitedir({place!r})" for place in shared)]
        (site / "copy.pth").write_text("\n".join(lines) + "\n")

    def whole(self, source: Path) -> None:
        """Copy all of a tree."""
        shutil.copytree(source, self.tree)

    def mended(self, source: Path) -> Copy:
        """The same, with the package as it is in another tree."""
        shutil.rmtree(self.tree / ".hypothesis", ignore_errors=True)
        shutil.rmtree(self.tree / PACKAGE)
        shutil.copytree(source / PACKAGE, self.tree / PACKAGE)
        return self

    def check(self, source: Path) -> None:
        """Raise RuntimeError if a mistake has changed what the tests read."""
        for path in source.rglob("*"):
            own = self.tree / path.relative_to(source)
            if path.is_file() and _facts(own) != _facts(path):
                raise RuntimeError(f"a mistake changed {own}: the mistakes after it prove nothing")

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
        arguments = ["-q", "-p", "no:cacheprovider", "-p", "tests.mutants", *options, *tests]
        started = time.monotonic()
        code = self._forked(arguments, limit)
        self._end()
        seconds = time.monotonic() - started
        noted = [(str(node), str(outcome)) for node, outcome in self._noted()]
        failed = list(dict.fromkeys(node for node, outcome in noted if outcome == "failed"))
        passed = sum(outcome == "passed" for _, outcome in noted)
        if code is None:
            return Ran("timeout", failed or _running(noted), passed, seconds, "")
        if code == 0:
            return Ran("passed", [], passed, seconds, "")
        status = "failed" if failed or code < 0 else "broken"
        output = self._output.read_text("utf-8", "replace")[-3000:]
        return Ran(status, failed or _running(noted), passed, seconds, output)

    def _forked(self, arguments: Sequence[str], limit: float | None) -> int | None:
        """The status of pytest; None where it took too long."""
        if self._server is None or self._server.poll() is not None:
            self._server = subprocess.Popen(
                [self.python, __file__, "--serve"],
                cwd="/",
                env=self._environment()
                | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        server = self._server
        assert server.stdin is not None
        assert server.stdout is not None
        print(
            json.dumps([str(self.tree), str(self._output), list(arguments)]),
            file=server.stdin,
            flush=True,
        )
        process = int(server.stdout.readline())
        in_time = bool(select.select([server.stdout], [], [], limit)[0])
        if not in_time:
            os.killpg(process, signal.SIGKILL)
        code = int(server.stdout.readline())
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        return code if in_time else None

    def close(self) -> None:
        """End the interpreter."""
        if self._server is not None:
            self._server.communicate()

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

    def _end(self) -> None:
        """End what the run has left elsewhere: a process is told by the file that it reports to."""
        mark = f"{REPORT}={self._report}".encode()
        ours = {os.getpid(), self._server.pid if self._server is not None else 0}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if int(entry.name) not in ours and mark in (entry / "environ").read_bytes().split(
                    b"\0"
                ):
                    os.kill(int(entry.name), signal.SIGKILL)


def _facts(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_size, found.st_mtime_ns
    return None


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
    compiling = ["-m", "compileall", "-q", "--invalidation-mode", "checked-hash", PACKAGE]
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
    limit: float,
    keep: Callable[[dict[str, Any], dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Try all mistakes; what came of each, as plain values.

    Args:
        mutants: the mistakes.
        jobs: how many at a time.
        every: run the whole suite for each.
        limit: seconds for each.
        keep: called with the facts of this run and what came of a mistake, one after the other.
    """
    proven: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="mutants-") as made, ExitStack() as stack:
        homes = Path(made)
        source = template(homes / "template")
        copies: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        for number in range(jobs):
            (homes / str(number)).mkdir()
            copy = Copy(homes / str(number))
            copy.whole(source)
            copy.prove()
            stack.callback(copy.close)
            copies.put(copy)
        facts: dict[str, Any] = {
            "python": platform.python_version(),
            "processor": _processor(),
            "left_out": [],
        }
        left_out: list[str] = facts["left_out"]
        commit, lock = _git("rev-parse", "HEAD"), threading.Lock()

        def result(mutant: Mutant) -> dict[str, Any]:
            copy = copies.get().mended(source)
            try:
                ran = tried(mutant, copy, left_out, limit, every)
            finally:
                copies.put(copy)
            names = {"passed": "survived", "failed": "killed"}
            told = asdict(mutant) | {
                "status": names.get(ran.status, ran.status),
                "by": ran.failed[0] if ran.failed else None,
                "seconds": round(ran.seconds, 1),
                "commit": commit,
            }
            if ran.status == "broken":
                told["output"] = ran.output
            with lock:
                print(_line(told), flush=True)
                keep(facts, told)
            return told

        found: dict[str, dict[str, Any]] = {}
        again = list(mutants)
        with ThreadPoolExecutor(jobs) as pool:
            while again:
                found |= {told["id"]: told for told in pool.map(result, again)}
                known = {told["by"] for told in found.values() if told["status"] == "killed"}
                copy = copies.get().mended(source)
                new = sorted(known - proven)
                failing = known.intersection(copy.run(new).failed if new else ())
                # Where one fails others of its file may, one after the other.
                files = sorted({node.partition("::")[0] for node in failing})
                red = failing.union(copy.run(files).failed if files else ())
                copies.put(copy)
                proven |= known - failing
                left_out += sorted(red)
                for node in sorted(red):
                    print(f"it fails without a mistake too, and is left out: {node}", flush=True)
                again = [mutant for mutant in again if found[mutant.id]["by"] in failing]
        for _ in range(jobs):
            copies.get().mended(source).check(source)
        print(f"without a mistake the {len(proven)} tests that noticed one pass", flush=True)
        return list(found.values())


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="ID", help="make these mistakes alone")
    parser.add_argument("--list", action="store_true", help="say what there is, and do nothing")
    parser.add_argument("--check", action="store_true", help="whether each can still be made")
    parser.add_argument("--all-tests", action="store_true", help="run the whole suite for each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what came of it")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="copies at a time")
    parser.add_argument(
        "--limit", type=float, default=_LIMIT_SECONDS, metavar="SECONDS", help="for each"
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--compare", nargs=2, type=Path, metavar="FILE", help="two such files")
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    if options.compare:
        print(side_by_side(*(json.loads(path.read_text()) for path in options.compare)))
        return
    from tests.mutants_table import MUTANTS

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
    if "--serve" not in sys.argv:
        sys.path.insert(0, str(ROOT))
    main()
