"""Measures what one core does in a second to bytes in memory: the steps of moving a master to bf16.

    python benchmarks/per_core.py DIRECTORY     # writes 1.5 GB there, and removes them

Prints GB/s of fp32 bytes for each step alone, and for all of them one after the other, as a worker does them.
`write` is of bf16, so it has half of the bytes. Owns no part of the report: `goals/notes.md` quotes it.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable

import torch
import xxhash

BLOCK, FILE = 4 << 20, 1 << 30
ROUNDS = 3


def main() -> None:
    torch.set_num_threads(1)
    source, target = bytearray(BLOCK), bytearray(BLOCK // 2)
    values = torch.frombuffer(source, dtype=torch.float32)
    rounded = torch.frombuffer(target, dtype=torch.bfloat16)
    with (
        tempfile.NamedTemporaryFile(dir=sys.argv[1]) as file,
        tempfile.NamedTemporaryFile(dir=sys.argv[1]) as out,
    ):
        for _ in range(FILE // BLOCK):
            file.write(os.urandom(BLOCK))
        file.flush()
        steps: dict[str, Callable[[int], object]] = {
            "read": lambda at: os.preadv(file.fileno(), [source], at),
            "crc32": lambda _: zlib.crc32(source),
            "cast": lambda _: rounded.copy_(values),
            "digest": lambda _: [
                xxhash.xxh3_128_digest(memoryview(target)[unit : unit + (1 << 20)])
                for unit in range(0, BLOCK // 2, 1 << 20)
            ],
            "write": lambda at: os.pwrite(out.fileno(), target, at // 2),
        }
        for name, step in steps.items():
            print(f"{name:8s} {rate([step]):6.2f} GB/s")
        print(f"{'all':8s} {rate(list(steps.values())):6.2f} GB/s")


def rate(steps: list[Callable[[int], object]]) -> float:
    """The best of some rounds, in GB of fp32 a second of processor time."""
    found = []
    for _ in range(ROUNDS):
        begin = time.thread_time()
        for at in range(0, FILE, BLOCK):
            for step in steps:
                step(at)
        found.append(FILE / (time.thread_time() - begin) / 1e9)
    return max(found)


if __name__ == "__main__":
    main()
