"""The command line with a gate: a rank that has written so many bytes waits until a file is there.

``gated.py BYTES GATE COMMAND ...``

So a run stands where a test can hit it, on a machine of any speed.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

from ckpt_tools.cli import main
from ckpt_tools.writing import bytes as write

LIMIT, GATE = int(sys.argv[1]), Path(sys.argv[2])
write_block = write.Outputs.write
# One thread at a time, so that the gate stops all of them behind the same block.
turn = threading.Lock()
written = 0


def write_or_wait(outputs: Any, file: int, data: memoryview, offset: int) -> None:
    global written
    with turn:
        while written >= LIMIT and not GATE.exists():
            time.sleep(0.005)
        write_block(outputs, file, data, offset)
        written += data.nbytes


write.Outputs.write = write_or_wait  # type: ignore[method-assign]
if __name__ == "__main__":
    main(sys.argv[3:])
