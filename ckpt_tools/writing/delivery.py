"""Delivers planned outputs: every rank writes its share, and the directory appears when all is proven.

Owns the steps from a plan to a published directory: agree on the plan, lay out the files, write the shares,
finish each output, rename once. A single process delivers alone. Of several ranks the leader delivers,
and the others :func:`follow`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from ckpt_tools._version import __version__
from ckpt_tools.errors import DamagedCheckpoint, OutputFailed, RankFailed, listed
from ckpt_tools.ranks import Ranks
from ckpt_tools.storage.reading import slowest
from ckpt_tools.storage.residence import Residence
from ckpt_tools.tensors.checksums import ReadLog
from ckpt_tools.tensors.freeing import give_back
from ckpt_tools.writing import journal
from ckpt_tools.writing.bytes import Written, laid_out, lay_out
from ckpt_tools.writing.closing import close_files
from ckpt_tools.writing.finishing import Checks, finish
from ckpt_tools.writing.manifest import Provenance
from ckpt_tools.writing.output import Output, Writing
from ckpt_tools.writing.publish import Partial, check_room, leftovers, partial_directory
from ckpt_tools.writing.shares import Job, Share, write_shares
from ckpt_tools.writing.source import CHANCE_BYTES, Checked, check_sources, runs_of
from ckpt_tools.writing.units import Units

_SHOW_SECONDS = 0.2


@dataclass(frozen=True)
class Delivered:
    """What was written.

    Attributes:
        written: totals of all ranks; seconds are those of the slowest.
        files: bytes of every file, by its path in the output.
        checked: what was compared with the checksums of the sources.
        notes: facts for the report.
    """

    written: Written
    files: Mapping[str, int]
    checked: Checked
    notes: tuple[str, ...] = ()


def deliver(
    target: Path,
    outputs: Sequence[Output],
    writing: Writing,
    provenance: Provenance,
    checks: Checks,
    residence: Residence | None = None,
) -> Delivered | None:
    """Write the outputs and put them in place together; nothing is done in a dry run.

    Args:
        target: the directory to make.
        outputs: the planned directories in it.
        writing: the options of the write.
        provenance: the origin of the outputs.
        checks: the last checks of sources and output.
        residence: opens the sources on this rank.

    Raises:
        CkptError: the target appeared meanwhile, a source is damaged, the disk refused, another rank
            failed, or verify found the result wrong.
    """
    if writing.dry_run:
        return None
    give_back()
    units = tuple(Units(output.layout) for output in outputs)
    identity = journal.Identity(
        __version__,
        provenance.identity(),
        provenance.options,
        _plan_digest(outputs, units, provenance),
    )
    with ExitStack() as locked:
        found = _found(target, identity, locked) if writing.resume else None
        if found is None:
            check_room(target, sum(output.nbytes for output in outputs))
        if writing.ranks is not None:
            _agree(units, writing.ranks)
        with partial_directory(target, overwrite=writing.overwrite, resume=found) as partial:
            if found is None:
                locked.callback(journal.Lock(partial.home).close)
                journal.begin(partial.home, identity)
            try:
                directories = tuple(partial.path / output.folder for output in outputs)
                noted = _laid_out(partial, directories, units)
                reads = slowest(provenance.files())
                job = Job(partial.home, directories, units, noted, writing.check_source, reads)
                with writing.ranks.ending_all() if writing.ranks is not None else nullcontext():
                    if writing.ranks is not None:
                        # Units are most of the job, and all ranks hold them since they agreed on the plan.
                        writing.ranks.put("job", replace(job, units=()))
                    give_back()
                    with _shown(job, writing) as progress:
                        shares = write_shares(job, writing, progress, residence)
                    try:
                        checked, equal = _checked(job, shares, provenance)
                    except DamagedCheckpoint:
                        # What was written while it was read is not damaged.
                        checks.refuse_changed()
                        raise
                    checks.refuse_changed()
                    for directory, each in zip(directories, units, strict=True):
                        close_files(each.plan, directory, writing.workers, writing.active)
                    _finish_all(job, outputs, shares, provenance, writing, checks)
                    files = _sizes(partial.path)
            finally:
                proven = found is not None or journal.has_proof(partial.home)
                partial.keep = writing.resumable and proven
    return Delivered(
        Written.side_by_side([share.written for share in shares]),
        files,
        checked,
        (*equal, *_notes(job, shares, checked)),
    )


def _found(target: Path, identity: journal.Identity, locked: ExitStack) -> Path | None:
    """The home of an earlier run to continue; no other run writes there until ``locked`` is closed."""
    home = journal.find(leftovers(target), identity)
    if home is None:
        return None
    locked.callback(journal.Lock(home).close)
    # The run that wrote there may have ended meanwhile and removed it.
    return home if journal.identity_of(home) == identity else None


def follow(ranks: Ranks, workers: int) -> Any:
    """Write this rank's share of whatever the leader delivers.

    Returns:
        What the leader reports.

    Raises:
        CkptError: as :func:`deliver`.
    """
    if ranks.first(("plan", "report")) == "plan":
        units = ranks.get("plan")
        _agree(units, ranks)
        job = replace(ranks.get("job"), units=units)
        if not job.home.is_dir():
            raise OutputFailed(
                f"machine {ranks.names[ranks.rank]} cannot see it",
                path=job.home,
                hint="OUT must lie on a file system that all machines see, under the same path.",
            )
        write_shares(job, Writing(workers=workers, ranks=ranks), None)
    return ranks.get("report")


def _agree(units: tuple[Units, ...], ranks: Ranks) -> None:
    """Send the leader's plan to all ranks, and compare their digests of it."""
    if ranks.leads:
        ranks.put("plan", units)
    answers = ranks.gather("agreed", _layout_digest(units, ranks.machines))
    for rank, answer in enumerate(answers or ()):
        if answer != answers[0]:  # type: ignore[index]
            raise RankFailed(
                f"rank {rank} computes another digest of the plan than rank 0",
                hint="Every machine must run the same version of ckpt-tools.",
            )


def _layout_digest(units: tuple[Units, ...], machines: Sequence[int]) -> str:
    digest = xxhash.xxh3_128(__version__.encode())
    for each in units:
        for file in each.plan.files:
            digest.update(file.name.encode() + file.header)
        digest.update(each.plan.index[1] if each.plan.index else b"")
        digest.update(str([each.share(rank, machines) for rank in range(len(machines))]).encode())
        for name, tensor in each.plan.tensors.items():
            for move in tensor.moves(0, min(tensor.numel, 1)):
                digest.update(f"{name} {move.offset} {move.dtype}".encode())
    return digest.hexdigest()


def _plan_digest(outputs: Sequence[Output], units: Sequence[Units], provenance: Provenance) -> str:
    digest = xxhash.xxh3_128(json.dumps(dict(provenance.options)).encode())
    for output, each in zip(outputs, units, strict=True):
        digest.update(f"{output.folder} {each.nbytes}".encode())
        for file in output.layout.files:
            digest.update(file.name.encode() + file.header)
        for name, tensor in output.layout.tensors.items():
            digest.update(f"{name} {provenance.recipe(tensor)}".encode())
    return digest.hexdigest()


def _laid_out(
    partial: Partial, directories: Sequence[Path], units: Sequence[Units]
) -> dict[int, dict[int, bytes]]:
    """Make every weight file that is missing; return the units of the others that were noted."""
    plans = [each.plan for each in units]
    placed = list(zip(directories, plans, strict=True))
    _clear(partial.path, {folder / file.name for folder, plan in placed for file in plan.files})
    whole = {number: laid_out(plan, folder) for number, (folder, plan) in enumerate(placed)}
    journal.keep(partial.home, whole)
    for folder, plan in placed:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputFailed(f"cannot be made ({error.strerror})", path=folder) from error
        lay_out(plan, folder)
    return journal.proven(partial.home, whole)


def _clear(directory: Path, weights: set[Path]) -> None:
    """Remove what an earlier run wrote after its weights; this run may write other files."""
    try:
        for path in sorted(directory.rglob("*"), reverse=True):
            if not path.is_dir():
                if path not in weights:
                    path.unlink()
            elif not any(path.iterdir()):
                path.rmdir()
    except OSError as error:
        raise OutputFailed(f"cannot be cleared ({error.strerror})", path=directory) from error


@contextmanager
def _shown(job: Job, writing: Writing) -> Iterator[Callable[[int], None] | None]:
    """Report the progress of all ranks together."""
    progress, ranks = writing.progress, writing.ranks
    if progress is None:
        yield None
        return
    total = sum(units.plan.data_bytes for units in job.units)
    done, lock = 0, threading.Lock()
    progress(done, total)

    def add(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            progress(done, total)

    if ranks is None:
        yield add
        return
    ended = threading.Event()

    def poll() -> None:
        while not ended.wait(_SHOW_SECONDS) and not ranks.failed.is_set():
            progress(ranks.nbytes(), total)

    thread = threading.Thread(target=poll, name="progress", daemon=True)
    thread.start()
    try:
        yield None
    finally:
        ended.set()
        thread.join()
    progress(total, total)


def _finish_all(
    job: Job,
    outputs: Sequence[Output],
    shares: Sequence[Share],
    provenance: Provenance,
    writing: Writing,
    checks: Checks,
) -> None:
    give_back()
    # Inner folders first: the manifest of a directory covers everything below it.
    inward = sorted(enumerate(outputs), key=lambda pair: pair[1].folder, reverse=True)
    for number, output in inward:
        digests: dict[int, bytes] = {}
        for share in shares:
            digests |= share.digests[number]
        directory, units = job.directories[number], job.units[number]
        tensors = units.tensor_digests(digests)
        finish(directory, output, tensors, units.nbytes, provenance, writing, checks)


def _sizes(directory: Path) -> dict[str, int]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in paths}


def _kept(job: Job, shares: Sequence[Share]) -> Iterator[tuple[Units, int]]:
    """The units that an earlier run wrote, each with the units of its output."""
    for share in shares:
        for number, kept in share.kept.items():
            yield from ((job.units[number], unit) for unit in kept)


def _checked(
    job: Job, shares: Sequence[Share], provenance: Provenance
) -> tuple[Checked, tuple[str, ...]]:
    """Compare what all ranks read with the checksums of the sources; what an earlier run read, too.

    Returns:
        What was compared, and notes on files that hold the same bytes. Tied tensors may, and equal buffers.

    Raises:
        DamagedCheckpoint: a record of a source is not what was saved, or two parts of one tensor are equal.
    """
    if not job.check_source:
        return Checked(), ()
    log = ReadLog()
    for share in shares:
        if share.log is not None:
            log.include(share.log)
    earlier = (
        run
        for units, unit in _kept(job, shares)
        for block in units.blocks(range(unit, unit + 1))
        for piece in block.slices
        for run in runs_of(piece.tensor, piece.start, piece.stop)
    )
    checked, equal = check_sources(log, earlier)
    for file, other, nbytes in equal:
        if nbytes >= CHANCE_BYTES and (name := provenance.in_both(file, other)) is not None:
            raise DamagedCheckpoint(
                f"it holds the same bytes as {other.name}, but another part of the tensor: one was copied "
                "over the other",
                path=file,
                tensor=name,
                hint="Copy the files of this checkpoint again from where they were written.",
            )
    names = [f"{file.name} and {other.name}" for file, other, _ in equal]
    note = (
        f"files that hold the same bytes, as those of equal tensors do: {listed(names)}. If these "
        "tensors are not equal in the model, one file was copied over the other"
    )
    return checked, (note,) if names else ()


def _notes(job: Job, shares: Sequence[Share], checked: Checked) -> tuple[str, ...]:
    notes = []
    if checked.partly:
        notes.append(
            f"{checked.partly:,} bytes were not compared with the checksums of their files, because "
            "the rest of their records was not read"
        )
    spans = [units.span(unit) for units, unit in _kept(job, shares)]
    if spans:
        done = sum(stop - start for _, start, stop in spans)
        notes.append(f"continued an earlier run: {done:,} bytes were proven and not written again")
    damaged = sum(map(len, job.noted.values())) - len(spans)
    if damaged:
        notes.append(
            f"units of the earlier run that changed on disk and were written again: {damaged:,}. "
            "Check the disk."
        )
    return tuple(notes)
