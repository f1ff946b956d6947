"""Delivers planned outputs: every rank writes its share, and the directory appears when all is proven.

Owns the order of things from a plan to a published directory: agree on the plan, lay out the files, write
the shares, then the files that are not tensors, manifest, checksums, verification, and the one rename. One
process delivers alone; of several the leader does, and the others :func:`follow`. Knows plans, units and
ranks; knows no formats and nothing of how a plan came about.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ckpt_tools import __version__, journal, manifest
from ckpt_tools.assets.files import AssetFile
from ckpt_tools.errors import OutputFailed, RankFailed, VerificationFailed
from ckpt_tools.manifest import Provenance
from ckpt_tools.output import Output, Writing
from ckpt_tools.publish import check_room, leftovers, partial_directory
from ckpt_tools.ranks import Ranks
from ckpt_tools.units import Units
from ckpt_tools.write import Outputs, Written, lay_out, write

_SHOW_SECONDS = 0.2
_COUNTS = ("bytes_read", "bytes_written")
_SECONDS = ("move_seconds", "sync_seconds")


@dataclass(frozen=True)
class Delivered:
    """What was written.

    Attributes:
        written: of all ranks together; seconds are those of the slowest.
        files: bytes of every file, by its path in the output.
        notes: what a person should know of it.
    """

    written: Written
    files: Mapping[str, int]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Job:
    """What every rank needs to know to write its share.

    Attributes:
        home: where the journal is.
        directories: where each output is made.
        units: those of each output.
        done: what an earlier run proved.
    """

    home: Path
    directories: tuple[Path, ...]
    units: tuple[Units, ...]
    done: journal.Proven


@dataclass(frozen=True)
class _Share:
    """What one rank wrote: the digests of its units, by output."""

    written: Written
    digests: Mapping[int, Mapping[int, bytes]]


def deliver(
    target: Path, outputs: Sequence[Output], writing: Writing, provenance: Provenance
) -> Delivered | None:
    """Write the outputs and put them in place together; nothing is done in a dry run.

    Raises:
        CkptError: the target appeared meanwhile, a source is damaged, the disk refused, another rank
            failed, or verify found the result wrong.
    """
    if writing.dry_run:
        return None
    units = tuple(Units(output.layout) for output in outputs)
    identity = journal.Identity(
        __version__, provenance.identity(), _plan_digest(outputs, units, provenance)
    )
    found = journal.find(leftovers(target), identity) if writing.resume else None
    if found is None:
        check_room(target, sum(output.nbytes for output in outputs))
    if writing.ranks is not None:
        _agree(units, writing.ranks)
    with partial_directory(target, overwrite=writing.overwrite, resume=found) as partial:
        if found is None:
            journal.begin(partial.home, identity)
        lock = journal.Lock(partial.home)
        try:
            directories = tuple(partial.path / output.folder for output in outputs)
            job = _Job(partial.home, directories, units, _laid_out(partial.home, directories, units))
            with _told(writing.ranks):
                if writing.ranks is not None:
                    writing.ranks.put("job", job)
                with _shown(job, writing) as progress:
                    shares = _write_shares(job, writing, progress)
                for number, output in enumerate(outputs):
                    digests = dict(job.done.get(number, {}))
                    for share in shares:
                        digests |= share.digests.get(number, {})
                    _finish(directories[number], output, units[number], digests, provenance, writing)
                files = _sizes(partial.path)
        except BaseException:
            partial.keep = found is not None or journal.has_proof(partial.home)
            raise
        finally:
            lock.close()
    return Delivered(_together([share.written for share in shares]), files, _notes(job))


def follow(ranks: Ranks, workers: int) -> Any:
    """Write this rank's share of whatever the leader delivers.

    Returns:
        What the leader reports.

    Raises:
        CkptError: as :func:`deliver`.
    """
    if ranks.first(("plan", "report")) == "plan":
        _agree(ranks.get("plan"), ranks)
        _write_shares(ranks.get("job"), Writing(workers, ranks=ranks), None)
    return ranks.get("report")


def _agree(units: tuple[Units, ...], ranks: Ranks) -> None:
    """Give the leader's plan to all, and see that all understand it alike."""
    if ranks.leads:
        ranks.put("plan", units)
    answers = ranks.gather("agreed", _layout_digest(units, ranks.machines))
    for rank, answer in enumerate(answers or ()):
        if answer != answers[0]:  # type: ignore[index]
            raise RankFailed(
                f"rank {rank} understands the plan otherwise than rank 0",
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
                where = getattr(move.source, "name", type(move.source).__name__)
                digest.update(f"{name} {where} {move.offset} {move.dtype}".encode())
    return digest.hexdigest()


def _plan_digest(
    outputs: Sequence[Output], units: Sequence[Units], provenance: Provenance
) -> str:
    digest = xxhash.xxh3_128()
    for output, each in zip(outputs, units, strict=True):
        digest.update(f"{output.folder} {each.nbytes}".encode())
        for file in output.layout.files:
            digest.update(file.name.encode() + file.header)
        for name, tensor in output.layout.tensors.items():
            digest.update(f"{name} {provenance.recipe(tensor)}".encode())
    return digest.hexdigest()


def _laid_out(
    home: Path, directories: Sequence[Path], units: Sequence[Units]
) -> dict[int, dict[int, bytes]]:
    """Make every weight file that is not there yet; what is proven of the others."""
    whole = {}
    for number, (directory, each) in enumerate(zip(directories, units, strict=True)):
        try:
            directory.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputFailed(f"cannot be made ({error.strerror})", path=directory) from error
        made = lay_out(each.plan, directory)
        whole[number] = {file.name for file in each.plan.files} - set(made)
    return journal.proven(home, whole)


def _write_shares(
    job: _Job, writing: Writing, progress: Callable[[int], None] | None
) -> list[_Share]:
    """Write this rank's share, and wait for the others; the leader gets what all of them wrote."""
    ranks = writing.ranks
    rank, machines = (0, (0,)) if ranks is None else (ranks.rank, ranks.machines)
    digests: dict[int, dict[int, bytes]] = {}
    written = []

    def moved(nbytes: int) -> None:
        if ranks is not None:
            ranks.active(nbytes)
        if progress is not None:
            progress(nbytes)

    for number, (directory, units) in enumerate(zip(job.directories, job.units, strict=True)):
        todo = journal.gaps(units.share(rank, machines), job.done.get(number, {}))
        names = [file.name for file in units.plan.files]
        with Outputs(units.plan, directory) as outputs:
            with journal.Log(job.home, number, outputs, names) as log:
                written.append(
                    write(
                        units,
                        outputs,
                        todo,
                        workers=writing.workers,
                        progress=moved,
                        record=log.record,
                        ended=None if ranks is None else ranks.failed,
                    )
                )
            digests[number] = log.digests
        if ranks is not None:
            ranks.check()
    share = _Share(_summed(written), digests)
    if ranks is None:
        return [share]
    return ranks.gather("written", share) or []


@contextmanager
def _told(ranks: Ranks | None) -> Iterator[None]:
    """Have the other ranks stop before the directory that they write into is removed."""
    try:
        yield
    except BaseException as error:
        if ranks is not None:
            ranks.fail(error)
        raise


@contextmanager
def _shown(job: _Job, writing: Writing) -> Iterator[Callable[[int], None] | None]:
    """Tell how far all ranks together are; of one process, how far it is."""
    progress, ranks = writing.progress, writing.ranks
    if progress is None:
        yield None
        return
    total = sum(units.plan.tensor_bytes for units in job.units)
    before, lock = _done_bytes(job), threading.Lock()
    done = before
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
            progress(before + ranks.nbytes(), total)

    thread = threading.Thread(target=poll, name="progress", daemon=True)
    thread.start()
    try:
        yield None
    finally:
        ended.set()
        thread.join()
    progress(total, total)


def _finish(
    directory: Path,
    output: Output,
    units: Units,
    digests: Mapping[int, bytes],
    provenance: Provenance,
    writing: Writing,
) -> None:
    """Everything of an output but its weights, and the last look at it."""
    for asset in output.files:
        _write_asset(directory, asset)
    text = manifest.manifest_text(
        directory,
        output.layout,
        provenance,
        unit_bytes=units.nbytes,
        digests=units.tensor_digests(digests),
    )
    _write_asset(directory, AssetFile(manifest.NAME, text.encode()))
    if writing.sha256:
        sums = manifest.sums_text(directory, writing.workers)
        _write_asset(directory, AssetFile(manifest.SUMS_NAME, sums.encode()))
    if writing.verify:
        _verify(directory, writing.workers)


def _verify(directory: Path, workers: int) -> None:
    from ckpt_tools.verify import verify

    verdict = verify(directory, read_data=True, workers=workers)
    errors = [problem for problem in verdict.problems if problem.severity == "error"]
    if errors:
        first = errors[0]
        more = f", and {len(errors) - 1} more problems" if len(errors) > 1 else ""
        raise VerificationFailed(
            f"verify found the output wrong: {first.kind}: {first.detail}{more}",
            path=first.file,
            tensor=first.tensor,
            hint="Nothing was published. Write it without --verify, then run ckpt-tools verify on it "
            "for the whole list.",
        )


def _write_asset(directory: Path, asset: AssetFile) -> None:
    path = directory / asset.name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if asset.content is not None:
            path.write_bytes(asset.content)
        elif asset.source is not None:
            shutil.copyfile(asset.source, path)
    except OSError as error:
        raise OutputFailed(f"cannot be written ({error.strerror})", path=path) from error


def _sizes(directory: Path) -> dict[str, int]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in paths}


def _done_bytes(job: _Job) -> int:
    total = 0
    for number, done in job.done.items():
        spans = map(job.units[number].span, done)
        total += sum(stop - start for _, start, stop in spans)
    return total


def _notes(job: _Job) -> tuple[str, ...]:
    done = _done_bytes(job)
    if not done:
        return ()
    return (f"went on with what an earlier run had proven: {done:,} bytes were not written again",)


def _summed(parts: Sequence[Written]) -> Written:
    """What one rank did, output by output."""
    return Written(
        *(sum(getattr(part, name) for part in parts) for name in _COUNTS),
        *(sum(getattr(part, name) for part in parts) for name in _SECONDS),
    )


def _together(parts: Sequence[Written]) -> Written:
    """What all ranks did, side by side."""
    return Written(
        *(sum(getattr(part, name) for part in parts) for name in _COUNTS),
        *(max(getattr(part, name) for part in parts) for name in _SECONDS),
    )
