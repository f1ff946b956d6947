"""Goal 6: metadata of many ranks and of many tensors. The values are holes in files.

The metadata of the sharded checkpoint is made of the classes of `torch.distributed.checkpoint`.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import pickle
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from goals.memory import hollow
from goals.raw import Line, add, column, has, load

NAME = "metadata"
RANKS, TENSORS, LINES, SHARDS = 1024, 400, 1_000_000, 8
SHARDED = f"DCP, {RANKS:,} ranks x {TENSORS} tensors"
MANY = "300,000 tensors in one file"
INDEX = f"an index of {LINES:,} lines, {SHARDS} files"
COMMAND = "ckpt-tools inspect CKPT"


def run(checkpoint: Path) -> None:
    """One round."""
    # What is made takes a gigabyte. The peak of a command that this process starts later begins at its own.
    apart = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as scratch, apart:
        for name, make in ((SHARDED, _sharded), (MANY, _many), (INDEX, _index)):
            source = Path(scratch, str(len(name)))
            source.mkdir()
            apart.submit(make, source).result()
            begin = time.monotonic()
            command = [sys.executable, "-m", "ckpt_tools", "inspect", str(source), "--json"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds = time.monotonic() - begin
            print(f"{name}: {seconds:.2f} s", file=sys.stderr)
            add(NAME, [{"contender": name, "seconds": seconds}])


def _sharded(source: Path) -> None:
    """Each tensor is cut into rows of one for each rank, each rank has a file."""
    width = 8
    item = io.BytesIO()
    torch.save(torch.zeros(1, width), item)
    nbytes = len(item.getvalue())
    properties = dcp.TensorProperties(dtype=torch.float32)
    state: dict[str, dcp.STORAGE_TYPES] = {}
    places = {}
    for tensor in range(TENSORS):
        name = f"model.layers.{tensor}.weight"
        chunks = [
            dcp.ChunkStorageMetadata(torch.Size([rank, 0]), torch.Size([1, width]))
            for rank in range(RANKS)
        ]
        state[name] = dcp.TensorStorageMetadata(properties, torch.Size([RANKS, width]), chunks)
        for rank, chunk in enumerate(chunks):
            key = dcp.MetadataIndex(name, chunk.offsets)
            places[key] = _StorageInfo(f"__{rank}_0.distcp", tensor * nbytes, nbytes)
    with open(source / ".metadata", "wb") as file:
        pickle.dump(dcp.Metadata(state, storage_data=places), file)
    for rank in range(RANKS):
        with open(source / f"__{rank}_0.distcp", "wb") as file:
            file.write(item.getvalue())  # the first says which kind all are of
            file.truncate(TENSORS * nbytes)


def _many(source: Path) -> None:
    hollow(source / "model.safetensors", [16, 16], 300_000)


def _index(source: Path) -> None:
    names = {}
    for number in range(SHARDS):
        file = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        first = number * LINES // SHARDS
        count = LINES // SHARDS
        hollow(source / file, [4, 4], count, first)
        names |= {f"layers.{i}.weight": file for i in range(first, first + count)}
    index = {"metadata": {"total_size": 64 * LINES}, "weight_map": names}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def lines() -> list[Line]:
    """What the rounds say."""
    raw = load(NAME)
    return [
        Line(6, f"metadata, {name}", COMMAND, column(raw, name, "seconds"), "s")
        for name in (SHARDED, MANY, INDEX)
        if has(raw, name)
    ]
