"""Places where files lie, and reading them there: at positions, from several threads at once.

Owns what a place must offer, and the one kind of place that needs nothing else: a directory of this machine.
What is on another machine is offered by whoever can reach it, in the same words, so that bytes from there are
read as those of a disk are. Reads only; knows no format, no tensor and no network.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

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
    """What a place tells of a file.

    Attributes:
        size: bytes.
        mtime_ns: when it was last written, in nanoseconds since 1970.
    """

    size: int
    mtime_ns: int


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
    """

    nbytes: int = 1 << 20
    gap_bytes: int = 64 << 10
    at_once: int = 1


LOCAL = Requests()


class Readable(Protocol):
    """An open file. Several threads may read at once."""

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill ``view`` from byte ``offset`` on, as ``os.preadv`` does.

        Returns:
            Bytes read, at least 1 and perhaps fewer than asked for; 0 at the end of the file.

        Raises:
            OSError: it cannot be read.
        """

    def close(self) -> None:
        """Let go of the file; nothing happens the second time."""


class Place(Protocol):
    """Where some of the files of a tree lie."""

    @property
    def requests(self) -> Requests:
        """How its files are read best."""

    @property
    def label(self) -> str:
        """What it is, for messages: a directory, ``machine node7``, ``memory of rank 3``."""

    def listing(self) -> Mapping[str, FileFacts]:
        """Every file by its path in the tree, with forward slashes. Asked for once a pool.

        Raises:
            OSError: the place cannot be read.
        """

    def open(self, relative: str) -> Readable:
        """Open one of the files.

        Raises:
            OSError: it is gone, or cannot be opened.
        """


def read_fully(file: Readable, view: memoryview, offset: int) -> int:
    """Fill ``view`` from byte ``offset`` on, and say how much of it: all, or up to the end of the file.

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

    def close(self) -> None:
        """See :meth:`Readable.close`."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Region(io.RawIOBase):
    """A run of a file's bytes as a file of its own.

    Args:
        file: the file, which is closed with it.
        offset: its first byte of the run.
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
        count = self._file.read_into(view, self._start + self._at)
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
        under: where in the tree it belongs, with forward slashes; empty for the tree's own root.
    """

    root: Path
    under: str = ""
    requests: ClassVar[Requests] = LOCAL

    @property
    def label(self) -> str:
        """The directory."""
        return str(self.root)

    def listing(self) -> Mapping[str, FileFacts]:
        """Every file below it. A directory in it that may not be read counts as empty.

        Raises:
            OSError: the directory itself cannot be read.
        """
        return _Listing(self)

    def open(self, relative: str) -> Readable:
        """See :meth:`Place.open`."""
        return LocalFile(self.path(relative))

    def covers(self, relative: str) -> bool:
        """Whether a path of the tree would lie in this directory, or is the directory."""
        return not self.under or f"{relative}/".startswith(f"{self.under}/")

    def path(self, relative: str) -> Path:
        """Where a path of the tree that it covers lies."""
        return self.root / relative[len(self.under) :].lstrip("/")


class _Listing(Mapping[str, FileFacts]):
    """Names at once, sizes when they are asked for: a run may have a thousand checkpoints beside this."""

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
        names: what is in it.
        holders: numbers of the listings with a file somewhere below it.
    """

    names: set[str] = field(default_factory=set)
    holders: set[int] = field(default_factory=set)


class Tree:
    """Several listings as one.

    A name that is a file in one listing and a directory in another is what the first of them says.

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
