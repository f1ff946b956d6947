"""The journal of a run: which units of its output are on disk, and their digests, for ``--resume``.

Lies beside the partial directory and goes with it. Each process that writes has a log of its own, to which a
thread appends: every half a second it takes the blocks that were written meanwhile, waits until the files
are on disk, and only then notes them. So a line in a log is a proof, whatever was killed whenever; a line
that was cut off, or damaged by a lost node, fails its checksum and is as if it had not been written. Knows
units and their digests; knows no tensors, ranks or formats.
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
    """What makes two runs the same run: only then may one go on with what the other left.

    Attributes:
        tool: version of ckpt-tools.
        sources: digest of names, sizes and times of the files that are read.
        options: those by which tensors are chosen and cast.
        plan: digest of the layout of the output and of how each of its tensors is derived.
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
    """Of which run a partial directory is; None where nothing tells."""
    try:
        found = Identity(**json.loads((home / _DIRECTORY / _RUN).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    return found if isinstance(found.options, dict) else None


def find(homes: Sequence[Path], identity: Identity) -> Path | None:
    """The partial directory that a run can go on with; None where there is none at all.

    Raises:
        UsageError: there are such directories, but of another run.
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
        why = f"it was begun by ckpt-tools {found.tool}, and this is {identity.tool}"
    elif found.sources != identity.sources:
        why = "it was begun from another checkpoint, or the checkpoint changed since"
    else:
        why = f"it was begun with other options{_difference(found.options, identity.options)}"
    raise UsageError(
        f"the run cannot go on with what is there: {why}",
        path=home,
        hint=f"Repeat the command as it was, or begin anew: delete {home}, or leave out --resume.",
    )


def _difference(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    changed = [
        f"{name} was {before.get(name)}, and is {now.get(name)}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    return f" ({'; '.join(changed)})" if changed else ", so its layout is another"


class Lock:
    """Keeps two runs from writing into one partial directory; held until the process ends or closes it.

    Taken before the journal begins, and closed after the directory was published or removed: whoever has
    it and finds the journal may go on.
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
                "another run is writing there", path=home, hint="Wait for it, or end it first."
            ) from error
        except OSError:
            return  # a file system without locks

    def close(self) -> None:
        """Let others have it."""
        os.close(self._fd)
        if not (self.home / _DIRECTORY / _RUN).exists():
            # Removed while it was held: NFS keeps a name for a file, and so its directory, until then.
            shutil.rmtree(self.home, ignore_errors=True)


def proven(home: Path, whole: Mapping[int, set[str]]) -> dict[int, dict[int, bytes]]:
    """What the logs prove: for each output, the digests of its finished units.

    Args:
        home: where the partial directory and the journal lie.
        whole: for each output, the names of its files that have been there since they were noted.
    """
    done: dict[int, dict[int, bytes]] = {}
    for path in _logs(home):
        for _, entry in _entries(path):
            if entry["file"] in whole.get(entry["output"], ()):
                digests = map(bytes.fromhex, entry["digests"])
                done.setdefault(entry["output"], {}).update(enumerate(digests, entry["first"]))
    return done


def keep(home: Path, whole: Mapping[int, set[str]]) -> None:
    """Strike out what the logs say of files that are gone, before those are made anew.

    Args:
        home: where the partial directory and the journal lie.
        whole: for each output, the names of its files that are there.

    Raises:
        OutputFailed: the disk refused.
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
    """Whether anything at all is proven."""
    return any(True for path in _logs(home) for _ in _entries(path))


def _logs(home: Path) -> list[Path]:
    return sorted((home / _DIRECTORY).glob("*.log"))


def _entries(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of a log that were written to their end, and what each says."""
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
    """The units that are not done, in runs."""
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
    """One process's log of one output, and the digests that it noted. Close it after use.

    Attributes:
        digests: of every unit that was recorded.
        noted: how many blocks are proven.
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
        """Note that a block was written; it is proven some time later.

        Raises:
            OutputFailed: what was recorded before could not be noted.
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
