"""Owns the protocol of a place where files lie, and its implementation for a directory of this machine.

Files are read at positions, from several threads at once. Remote files implement the same protocol. Nothing
here writes.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    from typing_extensions import Buffer

# Files of which two copies are equal or belong to different saves.
_OF_A_SAVE = (".pt", ".bin", ".pth", ".safetensors", ".distcp", ".metadata")
# Files among them that each machine may write by itself, under one name.
_OF_A_MACHINE = (
    "dl_state_dict",
    "random_states",
    "rng_state",
    "sampler",
    "scheduler",
    "training_args",
)


@dataclass(frozen=True, slots=True)
class FileFacts:
    """Facts about a file.

    Attributes:
        size: bytes.
        mtime_ns: time of the last write, in nanoseconds since 1970.
        version: what changes whenever a file of a store is written anew; None where nothing says it.
    """

    size: int
    mtime_ns: int
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Requests:
    """How a place is read best. The defaults are those of a local disk.

    Attributes:
        nbytes: most bytes of one request for several short runs. The default is large enough for disks and
            shared file systems. It is small enough that the bytes are still in the processor's cache when
            they are cast.
        gap_bytes: reading a gap this long between two runs costs less than a second request.
        at_once: the number of requests that one thread makes at a time. If more than 1, a long run is cut
            into requests of ``nbytes``.
        block_bytes: at least so many bytes of an output are made at a time.
        fetched: whether its files are :class:`Fetching`.
        threads: the largest number of threads that read, whatever the number of processors; None if they are
            as many.
        buffer_bytes: bytes of the buffers of these threads together. With large blocks they are fewer.
    """

    nbytes: int = 1 << 20
    gap_bytes: int = 64 << 10
    at_once: int = 1
    threads: int | None = None
    block_bytes: int = 0
    fetched: bool = False
    buffer_bytes: int = 0

    def threads_for(self, block_bytes: int) -> int | None:
        """The number of threads that read for blocks of an output; None if they are as many as processors."""
        if self.threads is None:
            return None
        # A source has twice the size of its block where elements are cast to half their size.
        sources = 2 if self.is_ahead(block_bytes) else 1
        return max(min(self.threads, self.buffer_bytes // ((1 + 2 * sources) * block_bytes)), 1)

    def is_ahead(self, block_bytes: int) -> bool:
        """Whether the source of the next block is asked for while a block is made."""
        return self.fetched and 5 * block_bytes <= self.buffer_bytes


LOCAL = Requests()


class Readable(Protocol):
    """An open file. Several threads may read at once."""

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill ``view`` from byte ``offset`` on, as ``os.preadv`` does.

        Returns:
            Number of bytes read: at least 1, at most ``len(view)``; 0 at the end of the file.

        Raises:
            OSError: the file cannot be read.
        """

    def close(self) -> None:
        """Close the file. A second call does nothing."""


@runtime_checkable
class Fetching(Readable, Protocol):
    """An open file whose bytes arrive in memory of the library that asks for them."""

    def fetch(self, offset: int, nbytes: int) -> memoryview:
        """A run of the file, to be read only, without a copy of it; shorter at the end of the file."""


@runtime_checkable
class Distant(Readable, Protocol):
    """An open file of which a short read takes as long as one of many kilobytes."""

    def peek_into(self, view: memoryview, offset: int) -> int:
        """As :meth:`Readable.read_into`, for metadata: what lies near is read with it, and kept."""


class Place(Protocol):
    """Where some of the files of a tree lie."""

    @property
    def requests(self) -> Requests:
        """How its files are read best."""

    @property
    def label(self) -> str:
        """Its name in messages: a directory, ``machine node7``, ``memory of rank 3``."""

    def listing(self) -> Mapping[str, FileFacts]:
        """Every file by its path in the tree, with forward slashes. A pool asks once.

        Raises:
            OSError: the place cannot be read.
        """

    def open(self, relative: str) -> Readable:
        """Open one of the files.

        Raises:
            OSError: the file cannot be opened.
        """


@runtime_checkable
class Addressed(Place, Protocol):
    """A place whose files have addresses, and can be copied to this machine while they are small."""

    def address(self, relative: str) -> str:
        """The address of a path of the tree, for messages and the manifest."""

    def local(self, relative: str) -> Path:
        """A copy of a file on this machine, or of the small files of a directory.

        Raises:
            OSError: the file is too large for that.
        """


def read_fully(file: Readable, view: memoryview, offset: int) -> int:
    """Fill ``view`` from byte ``offset`` on, up to the end of the file; returns the number of bytes.

    Raises:
        OSError: the file cannot be read.
    """
    done = 0
    while done < len(view):
        count = file.read_into(view[done:], offset + done)
        if not count:
            break
        done += count
    return done


class LocalFile:
    """A file of this machine.

    Raises:
        OSError: it cannot be opened.
    """

    __slots__ = ("_fd",)

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read_into(self, view: memoryview, offset: int) -> int:
        """See :meth:`Readable.read_into`."""
        return os.preadv(self._fd, [view], offset)

    def fileno(self) -> int:
        """Its file descriptor."""
        return self._fd

    def close(self) -> None:
        """See :meth:`Readable.close`."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Region(io.RawIOBase):
    """A run of a file's bytes as a stream.

    Args:
        file: the file. Closing the region closes it.
        offset: first byte of the run in the file.
        size: bytes of the run.
    """

    def __init__(self, file: Readable, offset: int, size: int) -> None:
        self._file = file
        self._start = offset
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move to a byte of the run."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, "before the start of the region")
        self._at = base + offset
        return self._at

    def readinto(self, into: Buffer, /) -> int:
        """Read up to the end of the run."""
        view = memoryview(into).cast("B")[: max(self._size - self._at, 0)]
        file, at = self._file, self._start + self._at
        count = file.peek_into(view, at) if isinstance(file, Distant) else file.read_into(view, at)
        self._at += count
        return count

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            self._file.close()
        super().close()


@dataclass(frozen=True)
class DirectoryPlace:
    """A directory of this machine.

    Attributes:
        root: the directory.
        under: its path in the tree, with forward slashes; empty for the root of the tree.
    """

    root: Path
    under: str = ""
    requests: ClassVar[Requests] = LOCAL

    @property
    def label(self) -> str:
        """The directory."""
        return str(self.root)

    def listing(self) -> Mapping[str, FileFacts]:
        """Every file below it. A directory in it that cannot be read counts as empty.

        Raises:
            OSError: the directory itself cannot be read.
        """
        return _Listing(self)

    def open(self, relative: str) -> Readable:
        """See :meth:`Place.open`."""
        return LocalFile(self.path(relative))

    def covers(self, relative: str) -> bool:
        """Whether a path of the tree is this directory, or in it."""
        return not self.under or f"{relative}/".startswith(f"{self.under}/")

    def path(self, relative: str) -> Path:
        """The plain path of a path of the tree that it covers."""
        return self.root / relative[len(self.under) :].lstrip("/")


class _Listing(Mapping[str, FileFacts]):
    """Names are listed at once, sizes on demand: a run may hold a thousand other checkpoints."""

    def __init__(self, place: DirectoryPlace) -> None:
        self._place = place
        self._names = dict.fromkeys(_walk(place.root, place.under, ()))

    def __getitem__(self, relative: str) -> FileFacts:
        if relative not in self._names:
            raise KeyError(relative)
        found = self._place.path(relative).stat()
        return FileFacts(found.st_size, found.st_mtime_ns)

    def __contains__(self, relative: object) -> bool:
        return relative in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _walk(directory: Path | str, under: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    try:
        found = os.stat(directory)
        with os.scandir(directory) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError:
        if not above:
            raise
        return
    here = (found.st_dev, found.st_ino)
    if here in above:  # a link to a directory above itself
        return
    for entry in listed:
        name = f"{under}/{entry.name}" if under else entry.name
        try:
            is_directory, is_file = entry.is_dir(), entry.is_file()
        except OSError:
            continue
        if is_directory:
            yield from _walk(entry.path, name, (*above, here))
        elif is_file:
            yield name


@dataclass(slots=True)
class Directory:
    """A directory of a tree.

    Attributes:
        names: the names in it.
        holders: numbers of the listings that have a file below it.
    """

    names: set[str] = field(default_factory=set)
    holders: set[int] = field(default_factory=set)


class Tree:
    """Several listings as one.

    If a name is a file in one listing and a directory in another, the first listing decides.

    Args:
        listings: paths of files, with forward slashes.

    Attributes:
        files: for each file, the numbers of the listings that have it.
        directories: every directory that is not empty, and the root, whose name is empty.
    """

    def __init__(self, listings: Iterable[Iterable[str]]) -> None:
        self.files: dict[str, tuple[int, ...]] = {}
        self.directories = {"": Directory()}
        for index, listing in enumerate(listings):
            for name in listing:
                above, _, base = name.rpartition("/")
                if name not in self.directories and self._enter(above, index):
                    self.directories[above].names.add(base)
                    self.files[name] = (*self.files.get(name, ()), index)

    def _enter(self, name: str, index: int) -> bool:
        known = self.directories.get(name)
        if known is not None and index in known.holders:
            return True
        if name:
            above, _, base = name.rpartition("/")
            if name in self.files or not self._enter(above, index):
                return False
            self.directories[above].names.add(base)
        self.directories.setdefault(name, Directory()).holders.add(index)
        return True

    def holders(self, name: str) -> list[int]:
        """Numbers of the listings with a file, or with something in a directory, in order."""
        found = self.directories.get(name)
        return sorted(self.files.get(name, ()) or (found.holders if found else ()))


def is_of_a_save(relative: str) -> bool:
    """Whether a file with this path holds tensors or metadata of one save, so that its copies must agree."""
    name = relative.rpartition("/")[2]
    return name.endswith(_OF_A_SAVE) and not name.startswith(_OF_A_MACHINE)
