"""A child process that waits, or takes a gigabyte of memory, as the question says."""

from __future__ import annotations

import sys
import time

if __name__ == "__main__":
    if sys.stdin.read() == "wait":
        time.sleep(3600)
    time.sleep(0.5)  # the parent sets limits after the start
    print(len(bytearray(1 << 30)))
