"""Owns the journal of a run: which units of its output are on disk, and their digests, for ``--resume``.

The journal is beside the partial directory and is removed with it. Each writing process has its own log. A
thread appends to it: every half a second it takes the written blocks, waits until the files are on disk, and
then records them. So a line in a log is a proof, even after a kill. A line that was cut off or damaged fails
its checksum and is ignored.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from ckpt_tools.errors import OutputFailed, UsageError
from ckpt_tools.writing.bytes import Outputs, refused
from ckpt_tools.writing.publish import sync_directory
from ckpt_tools.writing.units import Block

_DIRECTORY = "journal"
_RUN = "run.json"
_INTERVAL_SECONDS = 0.5
_INTERRUPTED_SECONDS = 0.5

Proven = Mapping[int, Mapping[int, bytes]]


@dataclass(frozen=True)
class Identity:
    """The identity of a run. A run can resume only a run with the same identity.

    Attributes:
        tool: version of ckpt-tools.
        sources: digest of names, sizes and times of the files that are read.
        options: the options that choose and cast tensors.
        plan: digest of the layout of the output and of the derivation of each tensor.
    """

    tool: str
    sources: str
    options: Mapping[str, object]
    plan: str


def begin(home: Path, identity: Identity) -> None:
    """Start the journal of a new partial directory.

    Raises:
        OutputFailed: the disk refused.
    """
    directory = home / _DIRECTORY
    try:
        directory.mkdir(exist_ok=True)
        _put(directory / _RUN, json.dumps(asdict(identity)).encode())
        sync_directory(directory)
        sync_directory(home)
    except OSError as error:
        raise refused(error, directory) from error


def identity_of(home: Path) -> Identity | None:
    """The identity of the run of a partial directory; None if it has no record."""
    try:
        found = Identity(**json.loads((home / _DIRECTORY / _RUN).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    return found if isinstance(found.options, dict) else None


def find(homes: Sequence[Path], identity: Identity) -> Path | None:
    """The partial directory that a run can resume; None if there is none.

    Raises:
        UsageError: all partial directories belong to other runs.
    """
    others = []
    for home in homes:
        found = identity_of(home)
        if found == identity:
            return home
        if found is not None:
            others.append((home, found))
    if not others:
        return None
    home, found = others[0]
    if found.tool != identity.tool:
        why = f"it was started by ckpt-tools {found.tool}; this is {identity.tool}"
    elif found.sources != identity.sources:
        why = "it was started from another checkpoint, or the checkpoint changed"
    else:
        why = f"it was started with other options{_difference(found.options, identity.options)}"
    raise UsageError(
        f"the earlier run cannot be resumed: {why}",
        path=home,
        hint=f"Repeat the earlier command. To start again, delete {home} or omit --resume.",
    )


def _difference(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    changed = [
        f"{name} was {before.get(name)}, now {now.get(name)}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    return f" ({'; '.join(changed)})" if changed else ", so its layout differs"


class Lock:
    """Prevents two runs from writing into one partial directory, until the process ends or closes it.

    It is taken before the journal starts, and closed after the directory was published or removed. A run that
    holds it and finds the journal can resume.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        try:
            (home / _DIRECTORY).mkdir(exist_ok=True)
            self._fd = os.open(home / _DIRECTORY / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        except OSError as error:
            raise refused(error, home) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._fd)
            raise UsageError(
                "another run is writing there", path=home, hint="Wait for that run, or stop it."
            ) from error
        except OSError:
            return  # a file system without locks

    def close(self) -> None:
        """Let others have it."""
        os.close(self._fd)
        if not (self.home / _DIRECTORY / _RUN).exists():
            # NFS keeps a removed file that is open, and so its directory, until the file is closed.
            shutil.rmtree(self.home, ignore_errors=True)


def proven(home: Path, whole: Mapping[int, set[str]]) -> dict[int, dict[int, bytes]]:
    """The proven units: for each output, the digests of its finished units.

    Args:
        home: the directory of the partial directory and the journal.
        whole: for each output, the names of its files that still exist.
    """
    done: dict[int, dict[int, bytes]] = {}
    for path in _logs(home):
        for _, entry in _entries(path):
            if entry["file"] in whole.get(entry["output"], ()):
                digests = map(bytes.fromhex, entry["digests"])
                done.setdefault(entry["output"], {}).update(enumerate(digests, entry["first"]))
    return done


def keep(home: Path, whole: Mapping[int, set[str]]) -> None:
    """Remove the log lines of files that no longer exist, before these files are made again.

    Args:
        home: the directory of the partial directory and the journal.
        whole: for each output, the names of its files that still exist.

    Raises:
        OutputFailed: the disk reports an error.
    """
    for path in _logs(home):
        lines = list(_entries(path))
        kept = [line for line, entry in lines if entry["file"] in whole.get(entry["output"], ())]
        if len(kept) == len(lines):
            continue
        fresh = path.with_suffix(".new")
        try:
            _put(fresh, b"".join(line + b"\n" for line in kept))
            fresh.replace(path)
            sync_directory(path.parent)
        except OSError as error:
            raise refused(error, path) from error


def has_proof(home: Path) -> bool:
    """Whether any unit is proven."""
    return any(True for path in _logs(home) for _ in _entries(path))


def _logs(home: Path) -> list[Path]:
    return sorted((home / _DIRECTORY).glob("*.log"))


def _entries(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The complete lines of a log, with their content."""
    for line in path.read_bytes().split(b"\n"):
        text, _, checksum = line.rpartition(b"\t")
        if text and xxhash.xxh64_hexdigest(text).encode() == checksum:
            yield line, json.loads(text)


def _put(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def gaps(units: range, done: Mapping[int, object]) -> list[range]:
    """The units that are not done, as ranges."""
    return list(_gaps(units, done))


def _gaps(units: range, done: Mapping[int, object]) -> Iterator[range]:
    first = None
    for unit in units:
        if unit in done and first is not None:
            yield range(first, unit)
            first = None
        elif unit not in done and first is None:
            first = unit
    if first is not None:
        yield range(first, units.stop)


class Log:
    """One process's log of one output. Close it after use.

    Attributes:
        digests: the digest of every recorded unit.
        noted: the number of proven blocks.
    """

    def __init__(self, home: Path, number: int, outputs: Outputs, names: Sequence[str]) -> None:
        self.digests: dict[int, bytes] = {}
        self.noted = 0
        self._path = home / _DIRECTORY / f"{secrets.token_hex(6)}.log"
        self._number, self._outputs, self._names = number, outputs, names
        self._fresh: list[tuple[Block, Sequence[bytes]]] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._error: OutputFailed | None = None
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        # An interrupted run does not wait for a slow disk; what is not noted is written again.
        interrupted = kind is not None and not issubclass(kind, Exception)
        self._thread.join(_INTERRUPTED_SECONDS if interrupted else None)
        # A failure to sync is told once for each open file: it would not be met again.
        if self._error is not None and error is None:
            raise self._error

    def record(self, block: Block, digests: Sequence[bytes]) -> None:
        """Record that a block was written. It is proven later.

        Raises:
            OutputFailed: an earlier block could not be recorded.
        """
        with self._lock:
            self.digests.update(enumerate(digests, block.first))
            self._fresh.append((block, digests))
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while not self._ended.wait(_INTERVAL_SECONDS):
            with self._lock:
                fresh, self._fresh = self._fresh, []
            if fresh:
                try:
                    self._outputs.sync({block.file for block, _ in fresh})
                    self._append(fresh)
                except OutputFailed as error:
                    self._error = error
                    return

    def _append(self, fresh: Sequence[tuple[Block, Sequence[bytes]]]) -> None:
        lines = []
        for block, digests in fresh:
            entry = {
                "output": self._number,
                "file": self._names[block.file],
                "first": block.first,
                "digests": [digest.hex() for digest in digests],
            }
            text = json.dumps(entry).encode()
            lines.append(text + b"\t" + xxhash.xxh64_hexdigest(text).encode() + b"\n")
        try:
            with self._path.open("ab") as stream:
                stream.write(b"".join(lines))
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise refused(error, self._path) from error
        self.noted += len(fresh)
