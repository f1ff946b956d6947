"""Owns the command that is run after each conversion, and its environment."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

_STDERR = 2
# A signal may come while the process is made, when nothing can end the process yet. So the process waits
# for a line on its input before it begins, and ends if the pipe is closed first.
_WHEN_TOLD = 'read -r _ && exec /bin/sh -c "$1" < /dev/null'
# A command that is to end gets so long to do so.
_END_SECONDS = 10.0


def environment(checkpoint: Path, output: Path, step: int | None) -> dict[str, str]:
    """The variables that a command gets beside those of this process."""
    return {
        "CKPT_TOOLS_CHECKPOINT": str(checkpoint.absolute()),
        "CKPT_TOOLS_OUTPUT": str(output.absolute()),
        "CKPT_TOOLS_NAME": output.name,
        "CKPT_TOOLS_STEP": "" if step is None else str(step),
    }


def run_command(command: str, variables: Mapping[str, str]) -> int:
    """Run a command by ``sh`` and wait for it. What it prints goes to stderr.

    A signal that ends this process ends the command and what it has started.

    Returns:
        Its exit status; of one that a signal ended, 128 and the number of the signal.
    """
    process = subprocess.Popen(
        ["/bin/sh", "-c", _WHEN_TOLD, "sh", command],
        stdin=subprocess.PIPE,
        stdout=_STDERR,
        env={**os.environ, **variables},
        start_new_session=True,
    )
    try:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.close()
        status = process.wait()
    except BaseException:
        _end(process)
        raise
    return status if status >= 0 else 128 - status


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except OSError:
            return
        try:
            process.wait(_END_SECONDS)
            return
        except subprocess.TimeoutExpired:
            continue
