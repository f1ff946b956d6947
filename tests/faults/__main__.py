"""``make faults``: conversions that are killed, and conversions whose system calls fail.

The runs are forks of one process, so that each takes a fraction of a second. A shim that is loaded before
the C library lets calls on chosen files fail. After each run: the output is absent or complete, the input is
as it was, and a second run without faults gives the bytes of a run that nothing disturbed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SHIM = Path(__file__).with_name("shim.c")


def main() -> int:
    """Build the shim, and run the cases in a process that has it loaded."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=50, help="ranks of torchrun to kill or stop")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    compiler = shutil.which("cc")
    if compiler is None:
        print("cc is not installed, so the shim cannot be built")
        return 2
    with tempfile.TemporaryDirectory(prefix="ckpt-tools-faults-") as scratch:
        library = Path(scratch) / "shim.so"
        words = ["-O1", "-shared", "-fPIC", "-o", str(library), str(SHIM), "-ldl"]
        subprocess.run([compiler, *words], check=True)
        environment = {**os.environ, "LD_PRELOAD": str(library), "HF_HUB_OFFLINE": "1"}
        counts = map(str, [asked.kills, asked.faults, asked.ranks, asked.seed])
        run = [sys.executable, "-m", "tests.faults.cases", scratch, *counts]
        return subprocess.run(run, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
