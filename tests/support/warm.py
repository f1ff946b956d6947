"""Questions about models answered by a process that has imported transformers, or PEFT, already.

A fork of that process runs the module that a new interpreter runs outside the tests, on the same input. The
start is left out because it takes seconds, hundreds of times; ``test_reference`` and all that calls the
command line run it as it is.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

from ckpt_tools.hub.reference import process

# How it is done outside the tests.
cold_child = process.run_child

_ROOT = Path(__file__).resolve().parents[2]
_IMPORTED = {
    "ckpt_tools.hub.reference.child": ("torch", "transformers.modeling_utils"),
    "ckpt_tools.hub.reference.peft_child": ("torch", "peft"),
}
_STREAMS = ("in", "out", "err")


@contextmanager
def warm_children() -> Iterator[None]:
    """Answer the questions of this process so."""
    started: dict[str, subprocess.Popen[str]] = {}
    lock = threading.Lock()

    def run_child(
        module: str, question: str, *, timeout: float, threads: int = 1, memory: int = 6 << 30
    ) -> subprocess.CompletedProcess[str]:
        if module not in _IMPORTED:
            return cold_child(module, question, timeout=timeout, threads=threads, memory=memory)
        with lock, tempfile.TemporaryDirectory() as made:
            server = started.get(module) or started.setdefault(module, _start(module))
            files = {name: Path(made, name) for name in _STREAMS}
            files["in"].write_text(question, encoding="utf-8")
            assert server.stdin is not None
            assert server.stdout is not None
            print(json.dumps([module, made, dict(os.environ)]), file=server.stdin, flush=True)
            status = int(server.stdout.readline())
            out, err = (files[name].read_text("utf-8", "replace") for name in ("out", "err"))
            return subprocess.CompletedProcess([module], status, out, err)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "run_child", run_child)
        try:
            yield
        finally:
            for server in started.values():
                server.communicate()


def _start(module: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", __name__, module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
        env={**os.environ, **process._QUIET, "OMP_NUM_THREADS": "1"},
    )


def _serve(module: str) -> None:
    own = importlib.import_module(module)
    sys.modules.update(dict.fromkeys(getattr(own, "_ABSENT", ())))  # type: ignore[arg-type]
    for name in _IMPORTED[module]:
        importlib.import_module(name)
    del sys.modules[module]
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _answer(*json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _answer(module: str, files: str, environment: dict[str, str]) -> NoReturn:
    os.environ.clear()
    os.environ.update(environment, **process._QUIET)
    for number, name in enumerate(_STREAMS):
        os.dup2(os.open(Path(files, name), os.O_RDWR | os.O_CREAT), number)
    sys.stdin = os.fdopen(0, encoding="utf-8")
    status = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve(sys.argv[1])
