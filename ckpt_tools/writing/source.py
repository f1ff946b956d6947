"""Proves that the bytes that were read are the bytes that were saved, where a file records that.

Owns the comparison of what passed through the readers (:class:`ReadLog`) with the CRC-32 of each record of a
torch file. Bytes of a record that no tensor needs, such as the padding of a partition, are read now, if they
are few. A record of which only a part was read, as for an adapter, is counted as not checked.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.readers.containers.records import Record, Records
from ckpt_tools.storage.stamps import Stamp, changed_since, refusal_of, stamp_of
from ckpt_tools.tensors.catalogue import Computed, Tensor
from ckpt_tools.tensors.checksums import ReadLog, joined
from ckpt_tools.tensors.threads import read_each

# So much of a record, or this share of it, is read for its checksum alone.
_REST_BYTES = 1 << 20
_REST_SHARE = 16
_READ_BYTES = 4 << 20
# Parts of one tensor with less data than this may be equal by chance, as those of a norm's weights in bf16.
CHANCE_BYTES = 1 << 10
_SAMPLE_BYTES = 1 << 20
COPY_AGAIN = "The file was damaged after it was saved. Copy it again from where it was written."
_OR_CONVERT = f"{COPY_AGAIN} --no-check-source converts it as it is."

Run = tuple[int, int, int]


@dataclass(frozen=True)
class Checked:
    """How many of the bytes that were read agree with a checksum.

    Attributes:
        checked: bytes in records that agree with their CRC-32.
        partly: bytes in records of which the rest was not read.
        without: bytes in files that record no checksum.
    """

    checked: int = 0
    partly: int = 0
    without: int = 0

    def __add__(self, other: Checked) -> Checked:
        return Checked(
            self.checked + other.checked,
            self.partly + other.partly,
            self.without + other.without,
        )


class Equal(NamedTuple):
    """Two files whose records are the same.

    Attributes:
        file, other: the files.
        nbytes: the number of bytes in those records that were read.
    """

    file: Path
    other: Path
    nbytes: int


def check_sources(
    log: ReadLog,
    resumed: Iterable[tuple[Path, int, int]] = (),
    *,
    hint: str = _OR_CONVERT,
) -> tuple[Checked, list[Equal]]:
    """Compare what was read with the checksums of its files.

    Args:
        log: the runs that were read.
        resumed: file, start and stop of runs that an earlier run read; they are read again.
        hint: the next step where a record is not what was saved.

    Returns:
        What was compared, and the files of one folder that have the same records.

    Raises:
        DamagedCheckpoint: a record is not what was saved.
    """
    again: dict[Path, list[tuple[int, int]]] = {}
    for file, start, stop in resumed:
        again.setdefault(file, []).append((start, stop))
    total = Checked()
    equal: list[Equal] = []
    seen: dict[tuple[Path, tuple[tuple[int, int, int], ...]], Path] = {}
    files = list(dict.fromkeys((*log.files, *again)))

    def check(file: Path) -> tuple[Checked, list[Record], tuple[tuple[int, int, int], ...]]:
        with Records(file, hint) as records:
            found, held = _check_file(records, list(log.runs(file)), again.get(file, ()))
            return found, held, records.signature if held else ()

    for file, (found, held, signature) in zip(files, read_each(check, files), strict=True):
        total += found
        if not held:
            continue
        other = seen.setdefault((file.parent, signature), file)
        if other is not file and not _is_constant(file, hint, held):
            nbytes = sum(record.stop - record.start for record in held)
            equal.append(Equal(file, other, nbytes))
    return total, equal


def _is_constant(file: Path, hint: str, held: Sequence[Record]) -> bool:
    """Whether the records may be equal by nature: one number, or one value over and over."""
    with Records(file, hint) as records:
        for record in held:
            data = records.read(record.start, min(record.stop, record.start + _SAMPLE_BYTES))
            if data[8:] != data[:-8]:
                return False
    return True


def _check_file(
    records: Records, runs: Sequence[Run], again: Sequence[tuple[int, int]]
) -> tuple[Checked, list[Record]]:
    if not records:
        return Checked(without=sum(stop - start for start, stop, _ in runs)), []
    held: dict[Record, list[Run]] = {}
    whole: set[Record] = set()
    for run in runs:
        for record in records.holding(run[0], run[1]):
            held.setdefault(record, []).append(run)
    for start, stop in again:
        for record in records.holding(start, stop):
            held.setdefault(record, [])
            whole.add(record)
    total = Checked()
    for record, parts in held.items():
        total += _check_record(records, record, parts, read_all=record in whole)
    return total, list(held)


def _check_record(
    records: Records, record: Record, runs: Sequence[Run], *, read_all: bool
) -> Checked:
    covered: list[tuple[int, int, int | None]] = []
    rest, at = 0, record.start
    for start, stop, crc in runs:
        if start < at or stop > record.stop:
            continue  # read twice, or more than the record
        if start > at:
            covered.append((at, start, None))
            rest += start - at
        covered.append((start, stop, crc))
        at = stop
    if at < record.stop:
        covered.append((at, record.stop, None))
        rest += record.stop - at
    size = record.stop - record.start
    read = size - rest
    if not read_all and rest > max(_REST_BYTES, size // _REST_SHARE):
        return Checked(partly=read)
    total = 0
    for start, stop, known in covered:
        crc = _crc(records, start, stop) if known is None else known
        total = joined(total, crc, stop - start)
    if total != record.crc:
        raise DamagedCheckpoint(
            f"the bytes of record {record.name} are not those that were saved: their CRC-32 is "
            f"{total:08x}, and the file records {record.crc:08x}",
            path=records.path,
            hint=records.hint,
        )
    return Checked(checked=read)


def _crc(records: Records, start: int, stop: int) -> int:
    crc = 0
    for at in range(start, stop, _READ_BYTES):
        crc = zlib.crc32(records.read(at, min(at + _READ_BYTES, stop)), crc)
    return crc


class Stamps:
    """Size, time and inode of source files, to see at the end that none was changed meanwhile."""

    def __init__(self) -> None:
        self._before: dict[Path, Stamp | None] = {}
        self._seen: dict[Path, Stamp | None] = {}

    def see(self, stamps: Mapping[Path, Stamp | None]) -> None:
        """Remember stamps from before files were read, for those that :meth:`add` will name."""
        self._seen = {**stamps, **self._seen}

    def add(self, files: Iterable[Path]) -> None:
        """Note the files as they were seen, or else as they are; those that were noted before stay."""
        for path in files:
            if path not in self._before:
                seen = self._seen
                self._before[path] = seen[path] if path in seen else stamp_of(path)

    def refuse_changed(self) -> None:
        """Compare every file with its note.

        Raises:
            DamagedCheckpoint: a file was written, replaced or removed since.
        """
        if changed := changed_since(self._before):
            raise refusal_of(changed, len(self._before))


def runs_of(tensor: Tensor, start: int, stop: int) -> Iterable[tuple[Path, int, int]]:
    """File, start and stop of the runs that a window of a tensor is read from; none of computed ones."""
    for move in tensor.moves(start, stop):
        if not isinstance(move.source, Computed):
            yield move.file, move.offset, move.offset + move.nbytes
