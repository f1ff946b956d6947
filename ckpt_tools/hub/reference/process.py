"""Runs a child process that answers one question with libraries that this process never imports.

Owns how the child is started and what its failure means. A question and its answer are JSON objects;
what they are about is known to those who ask.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ckpt_tools.errors import CkptError

# Importing transformers from a cold network disk takes a minute; building the largest model less.
_TIMEOUT_SECONDS = 600

_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}


def run_child(
    module: str, question: str, *, timeout: float | None, threads: int = 1
) -> subprocess.CompletedProcess[str]:
    """``python -m module``, with a question on standard input; however it ends.

    Args:
        module: the module; whatever it imports stays out of this process.
        question: what it reads.
        timeout: seconds after which it is killed; None for never.
        threads: of torch's arithmetic in it.

    Raises:
        subprocess.TimeoutExpired: it was killed.
        OSError: it cannot be started.
    """
    return subprocess.run(
        [sys.executable, "-m", module],
        input=question,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        # `-m` imports from the working directory first: let that be where the package lies.
        cwd=Path(__file__).resolve().parent.parent.parent,
        env={**os.environ, **_QUIET, "OMP_NUM_THREADS": str(threads)},
        # Ctrl-C in a terminal is for this process: the child's end would look like a failure.
        start_new_session=True,
        timeout=timeout,
        check=False,
    )


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
        library: what the child needs, for messages.

    Raises:
        CkptError: the child failed.
    """
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
        last = (child.stderr.strip() or f"exit status {child.returncode}").splitlines()[-1]
        raise CkptError(
            f"{library} failed to describe the model: {last}",
            hint=f"Check that `python -c 'import {library}'` works in this environment.",
        )
    return json.loads(child.stdout)
