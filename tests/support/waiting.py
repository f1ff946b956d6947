"""Waiting in tests: for what happens, not for how long it takes.

The only bound is one that no machine needs, shorter than the timeout of pytest so that threads end too.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONGEST_SECONDS = 500
LOOK_SECONDS = 0.002


def wait_until(true: Callable[[], object], run: subprocess.Popen[Any] | None = None) -> None:
    """Wait for something; if a process is to do it, it must be alive until then."""
    deadline = time.monotonic() + LONGEST_SECONDS
    while not true():
        assert run is None or run.poll() is None, "it ended before"
        assert time.monotonic() < deadline, "it never happens"
        time.sleep(LOOK_SECONDS)


def cpu_seconds(pid: int) -> float:
    """Seconds of the processor that a process has used; so far it has come, on any machine, loaded or not."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("inf")  # it has ended
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
