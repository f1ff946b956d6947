"""Owns the share of one rank: it proves again what an earlier run wrote, and writes the other units.

The journal says which units were on disk when they were noted. A disk can lose or change bytes since then, so
each rank digests the noted units of its share again. A unit with another digest is written again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt_tools.storage.places import LOCAL, Requests
from ckpt_tools.storage.residence import Residence
from ckpt_tools.tensors.checksums import ReadLog
from ckpt_tools.tensors.threads import default_workers, pool
from ckpt_tools.writing import journal
from ckpt_tools.writing.bytes import Outputs, Written, write
from ckpt_tools.writing.output import Writing
from ckpt_tools.writing.units import Block, Units


@dataclass(frozen=True)
class Job:
    """The facts that every rank needs to write its share.

    Attributes:
        home: where the journal is.
        directories: where each output is made.
        units: those of each output.
        noted: units that an earlier run noted as written, with their digests.
        check_source: whether the checksums of what is read are noted.
        requests: how the sources are read best.
    """

    home: Path
    directories: tuple[Path, ...]
    units: tuple[Units, ...]
    noted: journal.Proven
    check_source: bool = True
    requests: Requests = LOCAL


@dataclass(frozen=True)
class Share:
    """What one rank did.

    Attributes:
        written: totals of what it wrote.
        digests: those of every unit of its share, by output.
        kept: the units that an earlier run wrote, by output; they have the digests that were noted.
        log: the checksums of what it read.
    """

    written: Written
    digests: Mapping[int, Mapping[int, bytes]]
    kept: Mapping[int, Sequence[int]]
    log: ReadLog | None


def write_shares(
    job: Job,
    writing: Writing,
    progress: Callable[[int], None] | None,
    residence: Residence | None = None,
) -> list[Share]:
    """Write this rank's share and wait for the others; the leader gets the shares of all.

    Args:
        job: what all ranks write.
        writing: the options of the write.
        progress: called with the number of bytes after each block.
        residence: opens the sources.
    """
    ranks = writing.ranks
    rank, machines = (0, (0,)) if ranks is None else (ranks.rank, ranks.machines)
    digests: dict[int, dict[int, bytes]] = {}
    kept: dict[int, list[int]] = {}
    written = []
    read = ReadLog() if job.check_source else None
    ended = None if ranks is None else ranks.failed

    def moved(nbytes: int) -> None:
        if ranks is not None:
            ranks.active(nbytes)
        if progress is not None:
            progress(nbytes)

    for number, (directory, units) in enumerate(zip(job.directories, job.units, strict=True)):
        share = units.share(rank, machines)
        noted = job.noted.get(number, {})
        names = [file.name for file in units.plan.files]
        with Outputs(units.plan, directory) as outputs:
            held = still_held(
                units, outputs, share, noted, workers=writing.workers, progress=moved, ended=ended
            )
            with journal.Log(job.home, number, outputs, names) as log:
                written.append(
                    write(
                        units,
                        outputs,
                        journal.gaps(share, held),
                        workers=writing.workers,
                        progress=moved,
                        record=log.record,
                        ended=ended,
                        log=read,
                        requests=job.requests,
                        residence=residence,
                    )
                )
            digests[number] = held | log.digests
            kept[number] = sorted(held)
        if ranks is not None:
            ranks.check()
    done = Share(Written.one_after_another(written), digests, kept, read)
    if ranks is None:
        return [done]
    return ranks.gather("written", done) or []


def still_held(
    units: Units,
    outputs: Outputs,
    share: range,
    noted: Mapping[int, bytes],
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
    ended: threading.Event | None = None,
) -> dict[int, bytes]:
    """The noted units of a share whose bytes in the output have the digest that was noted.

    Args:
        units: the plan's units.
        outputs: its files.
        share: the units to look at.
        noted: digests of units, from the journal.
        workers: number of threads.
        progress: called with the bytes of each unit that is as it was noted, from any thread.
        ended: once it is set no further block is read.
    """
    blocks = _blocks(units, share, noted)
    lock, stop = threading.Lock(), threading.Event()

    def work() -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        buffer = memoryview(bytearray(units.block_bytes))
        while not stop.is_set() and not (ended is not None and ended.is_set()):
            with lock:
                block = next(blocks, None)
            if block is None:
                break
            view = buffer[: block.nbytes]
            if not outputs.read(block.file, view, block.offset):
                continue
            for unit, digest in enumerate(units.digests(block, view), block.first):
                if digest == noted[unit]:
                    found[unit] = digest
                    if progress is not None:
                        _, start, end = units.span(unit)
                        progress(end - start)
        return found

    count = workers or default_workers()
    with pool(count) as threads:
        try:
            parts = [job.result() for job in [threads.submit(work) for _ in range(count)]]
        finally:
            stop.set()
    return {unit: digest for part in parts for unit, digest in part.items()}


def _blocks(units: Units, share: range, noted: Mapping[int, bytes]) -> Iterator[Block]:
    """The noted units of a share in runs that fit a buffer."""
    first = share.start
    for gap in (*journal.gaps(share, noted), range(share.stop, share.stop)):
        yield from units.blocks(range(first, gap.start))
        first = gap.stop
