"""Runs a command while other processes burn the processor: ``python -m tests.support.loaded N COMMAND ...``.

No test may depend on how fast the machine is; this is how to see it.
"""

from __future__ import annotations

import subprocess
import sys

BURN = "while True: pass"


def main(count: int, command: list[str]) -> int:
    """Run the command beside ``count`` busy processes; its exit status."""
    busy = [subprocess.Popen([sys.executable, "-c", BURN]) for _ in range(count)]
    try:
        return subprocess.run(command, check=False).returncode
    finally:
        for process in busy:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
