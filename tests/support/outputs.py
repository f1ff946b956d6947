"""Outputs and what runs leave of them, as they lie on disk."""

from __future__ import annotations

import json
from pathlib import Path

import xxhash


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory, by its path."""
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def partials(out: Path) -> list[Path]:
    """The partial directories of an output."""
    return sorted(out.parent.glob(f"{out.name}.partial-*"))


def written(out: Path) -> int:
    """Bytes on disk of an output that is being written."""
    total = 0
    for partial in partials(out):
        for path in partial.glob("output/*.safetensors"):
            try:
                total += path.stat().st_blocks * 512
            except OSError:
                continue  # it was published in this moment
    return total


def units_in(log: Path) -> int:
    """How many units a log of the journal proves, by its checksums."""
    count = 0
    for line in log.read_bytes().splitlines():
        text, _, checksum = line.rpartition(b"\t")
        if xxhash.xxh64_hexdigest(text).encode() == checksum:
            count += len(json.loads(text)["digests"])
    return count


def proven_units(home: Path) -> int:
    """How many units the journal of a partial directory proves."""
    return sum(map(units_in, (home / "journal").glob("*.log")))
