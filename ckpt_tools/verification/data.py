"""Owns the check of every byte: the division of files into pieces, and the comparison with recorded digests.

Pieces depend on the files alone, and their results are merged in order.
:mod:`~ckpt_tools.verification.values` judges the values.
"""

from __future__ import annotations

import zipfile
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import xxhash

from ckpt_tools.errors import counted
from ckpt_tools.hub.config import TIE_SCALES_OUTPUT
from ckpt_tools.hub.reference import ReferenceModel
from ckpt_tools.ranks import Ranks
from ckpt_tools.verification.container import Entry
from ckpt_tools.verification.directory import MANIFEST, Directory, Manifest
from ckpt_tools.verification.manifest import read_sums
from ckpt_tools.verification.model import states_untied, written_ties
from ckpt_tools.verification.problem import Findings
from ckpt_tools.verification.reading import read_together
from ckpt_tools.verification.run import Progress, Run
from ckpt_tools.verification.scan import BLOCK_BYTES, Piece, Seen, Summary, scan
from ckpt_tools.verification.values import judge

ORDER = 50

# A few blocks: small enough to divide one file among all workers, large enough for one task.
PIECE_BYTES = 16 * BLOCK_BYTES
_READ_BYTES = 1 << 20


def check(run: Run) -> None:
    """Read every byte, if that was asked for."""
    asked = run.request
    if asked.read_data:
        check_data(
            run.directory,
            run.manifests,
            run.reference,
            run.findings,
            workers=asked.workers,
            progress=asked.progress,
            ranks=asked.ranks,
        )


def check_data(
    directory: Directory,
    manifests: Sequence[Manifest],
    reference: ReferenceModel | None,
    findings: Findings,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> None:
    """Read every byte of a directory.

    Args:
        directory: the directory, its headers read.
        manifests: the manifests of the directory.
        reference: the model, if it is known.
        findings: takes the problems.
        workers: threads; by default one for each processor, up to 16.
        progress: called with bytes done and bytes in all.
        ranks: the ranks that read together. The others call :func:`help_to_read`.
    """
    entries = _entries_by_file(directory)
    sums = read_sums(directory, findings)
    summed = {file for file, _ in sums}
    pieces = divide(directory, entries, _hashes(directory, manifests, summed))
    seen: dict[str, list[Summary]] = {f: [Summary() for _ in held] for f, held in entries.items()}
    hashes: dict[str, Mapping[str, str]] = {}
    total, done = sum(piece.nbytes for piece in pieces), 0

    for piece, found in read_together(
        _reader(directory, entries, manifests), pieces, workers, ranks
    ):
        if isinstance(found, OSError):
            findings.add("file-unreadable", f"cannot be read ({found.strerror})", file=piece.file)
            continue
        for number, summary in found.tensors.items():
            seen[piece.file][number].merge(summary)
        if piece.hashes:
            hashes[piece.file] = found.hashes
        if found.nbytes < piece.nbytes:
            findings.add(
                "file-unreadable", "the file became shorter during the read", file=piece.file
            )
        done += piece.nbytes
        if progress is not None:
            progress(done, total)
    summaries = {
        (e.file, e.name): s
        for f, held in entries.items()
        for e, s in zip(held, seen[f], strict=True)
    }
    for manifest in manifests:
        _compare_digests(directory, manifest, summaries, hashes, findings)
    for file, digest in sums:
        if file in hashes and hashes[file]["sha256"] != digest:
            findings.add("sha256-mismatch", "its SHA-256 differs from SHA256SUMS", file=file)
    judge(directory, reference, summaries, findings)
    _compare_ties(directory, reference, findings)
    for file in entries:
        if file.endswith(".bin"):
            _check_records(directory.path, file, findings)
    findings.checked.append(f"every byte of the weights{', digests' if manifests else ''}")
    if sums:
        findings.checked.append(f"SHA-256 of {counted(len(summed), 'file')}")


def help_to_read(
    directory: Directory, manifests: Sequence[Manifest], ranks: Ranks, workers: int | None
) -> None:
    """Read this rank's share of what the leader's :func:`check_data` checks."""
    entries = _entries_by_file(directory)
    summed = {file for file, _ in read_sums(directory, Findings())}
    pieces = divide(directory, entries, _hashes(directory, manifests, summed))
    deque(read_together(_reader(directory, entries, manifests), pieces, workers, ranks), maxlen=0)


def _reader(
    directory: Directory, entries: Mapping[str, Sequence[Entry]], manifests: Sequence[Manifest]
) -> Callable[[Piece], Seen]:
    units = {file: m.unit_bytes for m in manifests for file, _ in m.tensors.values()}

    def read(piece: Piece) -> Seen:
        return scan(directory.path, piece, entries.get(piece.file, ()), units.get(piece.file))

    return read


def divide(
    directory: Directory,
    entries: Mapping[str, Sequence[Entry]],
    hashes: Mapping[str, tuple[str, ...]],
) -> list[Piece]:
    """The pieces, in the order in which their results are merged.

    Args:
        directory: the files.
        entries: the tensors of each weight file.
        hashes: the files that need a digest of the whole file, with its kinds. Such a file is one piece.
    """
    pieces: list[Piece] = []
    for file, nbytes in directory.files.items():
        if file in hashes:
            pieces.append(Piece(file, 0, nbytes, hashes[file]))
        elif file in entries:
            starts = range(0, nbytes, PIECE_BYTES)
            pieces += [Piece(file, at, min(at + PIECE_BYTES, nbytes)) for at in starts]
    return pieces


def _entries_by_file(directory: Directory) -> dict[str, list[Entry]]:
    """The tensors of each file, by ascending offset."""
    by_file: dict[str, list[Entry]] = {}
    for container in directory.containers.values():
        by_file[container.file] = list(container.entries.values())
    for entry in directory.every_tensor:
        if entry.file not in directory.containers:
            by_file.setdefault(entry.file, []).append(entry)
    return {
        file: sorted(held, key=lambda entry: (entry.start, entry.stop))
        for file, held in sorted(by_file.items())
    }


def _hashes(
    directory: Directory, manifests: Sequence[Manifest], summed: Collection[str]
) -> dict[str, tuple[str, ...]]:
    """The kinds of digests that each file needs as a whole."""
    wanted: dict[str, tuple[str, ...]] = dict.fromkeys(summed, ("sha256",))
    for manifest in manifests:
        for file in manifest.digests.keys() - manifest.headers:
            if file in directory.files:
                wanted[file] = ("xxh3_128", *wanted.get(file, ()))
    return wanted


def _compare_digests(
    directory: Directory,
    manifest: Manifest,
    summaries: Mapping[tuple[str, str], Summary],
    hashes: Mapping[str, Mapping[str, str]],
    findings: Findings,
) -> None:
    for name, (file, digest) in manifest.tensors.items():
        summary = summaries.get((file, name))
        if summary is not None and summary.digest != digest:
            findings.add(
                "digest-mismatch",
                "its bytes differ from those that were written",
                file=file,
                tensor=name,
                hint="Copy the file again, or write the directory again.",
            )
    for file, digest in manifest.digests.items():
        if file in manifest.headers:
            container = directory.containers.get(file)
            found = container and _header_digest(directory.path / file, container.header_size)
            what = "its header differs from the one that was written"
        else:
            found = hashes.get(file, {}).get("xxh3_128")
            what = "the file differs from the one that was written"
        if found is not None and found != digest:
            findings.add(
                "digest-mismatch",
                what,
                file=file,
                hint="Copy the file again. If it was edited on purpose, the manifest is out of date: "
                f"delete {MANIFEST}.",
            )


def _header_digest(path: Path, nbytes: int) -> str:
    with path.open("rb") as stream:
        return xxhash.xxh3_128_hexdigest(stream.read(nbytes))


def _compare_ties(
    directory: Directory, reference: ReferenceModel | None, findings: Findings
) -> None:
    if states_untied(directory):
        return
    scales = (directory.config or {}).get("model_type") in TIE_SCALES_OUTPUT
    hint = "Set tie_word_embeddings to false if both were trained."
    if scales:
        hint = "Read it with transformers 5, which keeps both. transformers 4 ties them again."
    for alias, kept in written_ties(directory, reference).items():
        one, other = directory.tensors[alias], directory.tensors.get(kept)
        if other is None:
            continue
        if (one.code, one.shape) == (other.code, other.shape) and not _equal(directory, one, other):
            findings.add(
                "tie-differs",
                f"the config ties it to {kept}, but their values differ",
                file=one.file,
                tensor=alias,
                hint=hint,
                severity="warning" if scales else None,
            )


def _equal(directory: Directory, one: Entry, other: Entry) -> bool:
    with (directory.path / one.file).open("rb") as a, (directory.path / other.file).open("rb") as b:
        a.seek(one.start)
        b.seek(other.start)
        for start in range(0, one.nbytes, _READ_BYTES):
            count = min(_READ_BYTES, one.nbytes - start)
            if a.read(count) != b.read(count):
                return False
    return True


def _check_records(directory: Path, file: str, findings: Findings) -> None:
    """Compare each record of a zip file with its checksum."""
    with (directory / file).open("rb") as stream:
        is_zip = zipfile.is_zipfile(stream)
    if not is_zip:
        findings.skipped.append(f"checksums of {file} (torch's old format has none)")
        return
    try:
        with (directory / file).open("rb") as held, zipfile.ZipFile(held) as archive:
            for record in archive.infolist():
                try:
                    with archive.open(record) as stream:
                        while stream.read(_READ_BYTES):
                            pass
                except zipfile.BadZipFile as error:
                    findings.add("crc-mismatch", f"{record.filename}: {error}", file=file)
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        findings.add("crc-mismatch", f"its records cannot be read ({error})", file=file)
