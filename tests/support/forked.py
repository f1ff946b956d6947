"""Owns commands that start as forks of a process that has imported torch.

A new interpreter takes two seconds of the processor to import it, and a run of the tests starts hundreds.
Tests of kills, signals and full disks need a process of their own, not an import of its own. What a user
types is run in a new interpreter by the tests of the command line, of the pages and of the examples.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

_PR_SET_CHILD_SUBREAPER = 36
_LONGEST = 1 << 20
_TURN = threading.Lock()
_ROOT = Path(__file__).resolve().parents[2]
_IMPORTED = (
    "torch.distributed.run",
    "ckpt_tools.cli",
    "ckpt_tools.conversion",
    "safetensors.torch",
)


class _Forked(subprocess.Popen[Any]):
    """A process that runs ``[sys.executable, ...]`` in a session of its own.

    It is a child of this process as any other, with a process id, a status and streams of its own.
    """

    def _execute_child(  # type: ignore[no-untyped-def]
        self,
        args,
        executable,
        preexec_fn,
        close_fds,
        pass_fds,
        cwd,
        env,
        startupinfo,
        creationflags,
        shell,
        p2cread,
        p2cwrite,
        c2pread,
        c2pwrite,
        errread,
        errwrite,
        *_,
    ) -> None:
        assert args[0] == sys.executable, args
        streams = [own if own != -1 else n for n, own in enumerate((p2cread, c2pwrite, errwrite))]
        asked = {
            "arguments": [str(word) for word in args[1:]],
            "environment": dict(os.environ if env is None else env),
            "directory": str(cwd or os.getcwd()),
        }
        with _TURN:
            socket.send_fds(_server(), [json.dumps(asked).encode()], streams)
            self.pid = int(_server().recv(_LONGEST))
        self._child_created = True
        self._close_pipe_fds(  # type: ignore[attr-defined]
            p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite
        )


# Elsewhere a child of a child cannot become one's own.
Forked: type[subprocess.Popen[Any]] = _Forked if sys.platform == "linux" else subprocess.Popen


@functools.cache
def _server() -> socket.socket:
    """The process that is forked; it ends with this one."""
    # Then a process below this one becomes its child when its own parent ends: so does a fork of a fork.
    status = ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    assert status == 0
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            cwd=_ROOT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    return ours


def _serve(tests: socket.socket) -> dict[str, Any]:
    """Fork until the tests end; returns in the forks, with what they are to run."""
    while True:
        data, streams, *_ = socket.recv_fds(tests, _LONGEST, 3)
        if not data:
            os._exit(0)
        told, tell = os.pipe()
        between = os.fork()
        if between == 0:
            child = os.fork()
            if child == 0:
                tests.close()
                # Before its number is known: who knows it may signal its group at once.
                os.setsid()
                os.write(tell, str(os.getpid()).encode())
                os.closerange(told, tell + 1)
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                    os.close(stream)
                return dict(json.loads(data))
            os._exit(0)
        os.waitpid(between, 0)
        tests.send(os.read(told, _LONGEST))
        for stream in (*streams, told, tell):
            os.close(stream)


def run(arguments: list[str]) -> None:
    """What an interpreter does with ``-m MODULE ...``, ``-c PROGRAM ...`` or ``SCRIPT ...``."""
    how, *rest = arguments
    if how == "-m":
        sys.argv = rest
        sys.modules.pop(rest[0], None)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif how == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)  # noqa: S102
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(os.path.abspath(how))
        runpy.run_path(how, run_name="__main__")


def _main() -> None:
    for name in _IMPORTED:
        importlib.import_module(name)
    # As in a new interpreter; a shell lets its background jobs ignore this signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    asked = _serve(socket.socket(fileno=int(sys.argv[1])))
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["directory"])
    sys.path[0] = asked["directory"]
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1, closefd=False)
    run(asked["arguments"])


if __name__ == "__main__":
    _main()
