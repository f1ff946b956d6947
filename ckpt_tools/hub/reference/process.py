"""Owns child processes that answer one question with libraries that the parent never imports.

Both ends are here: how the parent starts a child, limits it and reports its failure, and how the child
reads the question and writes the answer. Question and answer are JSON objects.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from ckpt_tools.errors import CkptError

# Importing transformers from a cold network disk takes a minute; building the largest model less.
_TIMEOUT_SECONDS = 600
# A description of the largest models takes less than a gigabyte. Libraries that are mapped and not used count
# in the address space alone.
_MEMORY, _ADDRESS_SPACE = 6 << 30, 64 << 30

# What pip takes to install each library that a child needs.
INSTALLED_BY = {"peft": "ckpt-tools[peft]", "transformers": "ckpt-tools"}
# Packages whose files may be edited in place; of other packages a version has one content.
_MAKERS = ("__main__", "ckpt_tools", "transformers", "peft")

_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}


def run_child(
    module: str, question: str, *, timeout: float, threads: int = 1, memory: int = _MEMORY
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m module`` with a question on standard input, and wait for its end.

    Args:
        module: the module of the child; it calls :func:`question_and_answers`.
        question: the text of the question.
        timeout: seconds after which the child is killed; each of its threads may also use as much processor
            time.
        threads: threads of torch's arithmetic in the child.
        memory: bytes that the child may take.

    Raises:
        subprocess.TimeoutExpired: the child was killed.
        OSError: the child cannot be started.
    """
    command = [sys.executable, "-m", module]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        # `-m` imports from the working directory first, so that must be where the package lies.
        cwd=Path(__file__).resolve().parents[3],
        env={**os.environ, **_QUIET, "OMP_NUM_THREADS": str(threads)},
        # Ctrl-C in a terminal must reach the parent alone: a killed child would look like a failure.
        start_new_session=True,
    ) as child:
        try:
            _limit(child.pid, (math.ceil(timeout) + 1) * threads, memory)
            output, errors = child.communicate(question, timeout=timeout)
        except BaseException:
            # What the child has started belongs to its session.
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, child.returncode, output, errors)


def _limit(process: int, seconds: int, memory: int) -> None:
    """Limit memory and processor time of a child from outside."""
    limits = (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory + _ADDRESS_SPACE),
        (resource.RLIMIT_DATA, memory),
    )
    for kind, limit in limits:
        # A limit of the parent may be lower. The child may have ended.
        with suppress(OSError, ValueError):
            soft, hard = resource.prlimit(process, kind)
            least = [one for one in (soft, hard, limit) if one != resource.RLIM_INFINITY]
            resource.prlimit(process, kind, (min(least), min(least)))


@contextmanager
def question_and_answers() -> Iterator[tuple[Any, TextIO]]:
    """In the child: the question, and the stream for answers; all other output goes to standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        yield json.load(sys.stdin), answers


def imported_files() -> list[tuple[str, int, int]]:
    """In the child: the imported files that make its answer, each with its size and time of change."""
    paths = {
        module.__file__
        for name, module in tuple(sys.modules.items())
        if name.partition(".")[0] in _MAKERS and getattr(module, "__file__", None)
    }
    found = [(path, os.stat(path)) for path in sorted(filter(None, paths))]
    return [(path, each.st_size, each.st_mtime_ns) for path, each in found]


def is_installed(library: str) -> bool:
    """Whether the library lies in this environment; an installation that is broken counts."""
    try:
        return importlib.util.find_spec(library) is not None
    except (ImportError, ValueError):
        return True  # something of this name was found, and is no package


def failure_of(child: subprocess.CompletedProcess[str]) -> str:
    """The last line that a failed child wrote to standard error, or its exit status."""
    return (child.stderr.strip() or f"exit status {child.returncode}").splitlines()[-1]


def ask(module: str, question: str, library: str = "transformers") -> dict[str, Any]:
    """The answer of a module that answers with an object; see :func:`ask_any`."""
    answer = ask_any(module, question, library)
    assert isinstance(answer, dict)
    return answer


def ask_any(module: str, question: str, library: str = "transformers") -> Any:
    """The answer of ``python -m module`` to a question.

    Args:
        module: reads JSON on standard input and prints JSON on standard output.
        question: the JSON object.
        library: the library that the child needs, for messages.

    Raises:
        CkptError: the library is not installed, or the child failed.
    """
    if not is_installed(library):
        raise CkptError(
            f"the package `{library}` is not installed",
            hint=f'Install it with pip install "{INSTALLED_BY[library]}".',
        )
    try:
        child = run_child(module, question, timeout=_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise CkptError(
            f"{library} did not describe the model within {_TIMEOUT_SECONDS} seconds",
            hint="If the disk that holds the Python environment is slow, try again.",
        ) from error
    except OSError as error:
        raise CkptError(
            f"the process that asks {library} about the model cannot be started ({error})"
        ) from error
    if child.returncode:
        raise CkptError(
            f"{library} failed to describe the model: {failure_of(child)}",
            hint=f"Check that `python -c 'import {library}'` works in this environment.",
        )
    return json.loads(child.stdout)
