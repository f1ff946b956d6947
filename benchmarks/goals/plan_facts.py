"""Facts of the plan of a conversion, as JSON: requests, their sizes, balance over ranks, a sample of blocks.

    python plan_facts.py CHECKPOINT OUT

Plans as `consolidate --dry-run` does, makes the output's files as holes with their headers and index in OUT,
and reads a sample of blocks. Every request to a file is counted where it is made.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import ckpt_tools
from ckpt_tools.conversion import pipeline
from ckpt_tools.tensors import gather
from ckpt_tools.tensors.threads import casting_on_one_core
from ckpt_tools.writing.bytes import lay_out
from ckpt_tools.writing.units import Units

RANKS, RANKS_OF_A_MACHINE, SAMPLE = 64, 8, 48


def main(checkpoint: Path, out: Path) -> dict[str, Any]:
    plans = []
    deliver = pipeline.deliver

    def kept(target: Path, outputs: Any, *others: Any) -> Any:
        plans.extend(output.layout for output in outputs)
        return deliver(target, outputs, *others)

    pipeline.deliver = kept  # type: ignore[attr-defined]
    ckpt_tools.consolidate(checkpoint, out, config=checkpoint / "hf", dtype="bf16", dry_run=True)
    (plan,) = plans
    units = Units(plan)
    machines = [rank // RANKS_OF_A_MACHINE for rank in range(RANKS)]
    shares = [nbytes(units, units.share(rank, machines)) for rank in range(RANKS)]
    out.mkdir(parents=True)
    lay_out(plan, out)
    shutil.copy(checkpoint / "hf" / "config.json", out)
    return {
        "tensors": len(plan.tensors),
        "files": len(plan.files),
        "output_bytes": plan.tensor_bytes,
        "source_bytes": sum(tensor.numel * 4 for tensor in plan.tensors.values()),
        "largest_share": max(shares) / (sum(shares) / RANKS),
        **sample(units),
    }


def nbytes(units: Units, share: range) -> int:
    """Bytes of a run of units."""
    return sum(
        units.span(r[-1])[2] - units.span(r[0])[1] for _, r in units.by_file(share) if len(r)
    )


def sample(units: Units) -> dict[str, Any]:
    """Read some blocks, and count."""
    made: list[int] = []
    read = gather._read

    def counted(file: Any, request: Any, into: memoryview) -> None:
        made.append(len(into))
        read(file, request, into)

    gather._read = counted
    step = max(units.plan.block_bytes // units.nbytes, 1)
    choose = random.Random(0)
    starts = sorted(choose.sample(range(0, len(units) - step, step), SAMPLE))
    blocks = [next(units.blocks(range(start, start + step))) for start in starts]
    buffer = bytearray(units.block_bytes)
    with gather.Gatherer() as gatherer, casting_on_one_core():
        for _ in range(2):  # the first time the kernel fills pages for the holes
            made.clear()
            begin, user = time.process_time(), os.times().user
            for block in blocks:
                gatherer.fill(buffer, block.slices)
                units.digests(block, memoryview(buffer)[: block.nbytes])
            spent, user = time.process_time() - begin, os.times().user - user
    written = sum(block.nbytes for block in blocks)
    sizes = sorted(made)
    return {
        "sample_blocks": len(blocks),
        "sample_written": written,
        "sample_read": sum(made),
        "sample_requests": len(made),
        "median_request": sizes[len(sizes) // 2],
        "smallest_request": sizes[0],
        "largest_request": sizes[-1],
        "sample_cpu_seconds": spent,
        "sample_user_seconds": user,
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
