"""One directory tree whose files lie in several places.

Owns where a file of such a tree is read. A :class:`Pool` is the union of its places, of which the first that
holds a file counts; a :class:`PooledPath` is a path in it, which whoever looks for files and opens them need
not tell from a plain one. Reads only; knows no format, no tensor and no network.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import stat
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path, PosixPath, PurePath
from typing import IO, Any, ClassVar
from weakref import WeakValueDictionary

from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.storage.places import DirectoryPlace as DirectoryPlace
from ckpt_tools.storage.places import FileFacts as FileFacts
from ckpt_tools.storage.places import LocalFile, Region, Tree, read_fully
from ckpt_tools.storage.places import Place as Place
from ckpt_tools.storage.places import Readable as Readable

# Files whose copies are one and the same, or of different saves.
_OF_A_SAVE = (".pt", ".bin", ".pth", ".safetensors", ".distcp", ".metadata")
# Those of them that each machine may write by itself, under one name.
_OF_A_MACHINE = (
    "dl_state_dict",
    "random_states",
    "rng_state",
    "sampler",
    "scheduler",
    "training_args",
)
# A request to another machine costs about as much for this many bytes as for one.
_BUFFER = 64 << 10


class Pool:
    """Directories and other places, read as one tree.

    The places are looked at when it is made. Where several hold a file the first counts. Copies of a file
    with tensors that differ in size are of two saves: an error, raised when the file is wanted. Copies of one
    size are not told apart here: readers compare what the files of a checkpoint state about themselves.

    Args:
        root: what the tree is called: the directory that the caller named. It need not exist.
        places: where the files lie; one's own place first.
        key: under which an unpickled path finds the pool again; in another process, the pool there of the
            same key. The newest pool of a key is meant. By default no other has it.

    Raises:
        OSError: a place cannot be read.
    """

    def __init__(self, root: Path, places: Sequence[Place], *, key: str | None = None) -> None:
        self.root = Path(root)
        self.places = tuple(places)
        self.key = secrets.token_hex(8) if key is None else key
        self._listings = [place.listing() for place in self.places]
        self._tree = Tree(self._listings)
        ways = (self.root, self.root.absolute(), Path(os.path.abspath(root)), self.root.resolve())
        self._stems = tuple(dict.fromkeys(way.parts for way in ways))
        self._kind: type[PooledPath] = type("PooledPath", (PooledPath,), {"pool": self})
        _POOLS[self.key] = self

    def path(self, relative: str = "") -> PooledPath:
        """A path of the tree; by default its root."""
        return self._kind(self.root, relative)

    def relative(self, path: PurePath) -> str | None:
        """Where a path is in the tree, empty for the root; None for what lies elsewhere."""
        parts = PurePath(os.path.abspath(path)).parts if ".." in path.parts else path.parts
        for stem in self._stems:
            if parts[: len(stem)] == stem and (stem or parts[:1] != ("/",)):
                return "/".join(parts[len(stem) :])
        return None

    def files(self) -> Iterable[str]:
        """Every file of the tree."""
        return self._tree.files

    def is_file(self, relative: str) -> bool:
        """Whether a place holds such a file."""
        return relative in self._tree.files

    def is_directory(self, relative: str) -> bool:
        """Whether a place holds a file below it. The root is always a directory."""
        return relative in self._tree.directories

    def names(self, relative: str) -> list[str]:
        """What is in a directory, sorted; nothing in one that is not there."""
        found = self._tree.directories.get(relative)
        return sorted(found.names) if found else []

    def holders(self, relative: str) -> list[Place]:
        """The places with a file, or with something below a directory, the first first."""
        return [self.places[index] for index in self._tree.holders(relative)]

    def place_of(self, relative: str) -> Place:
        """The place that a file is read from.

        Raises:
            FileNotFoundError: no place holds it.
            DamagedCheckpoint: places hold it in different sizes, and it is no file of one machine.
        """
        held = self._tree.files.get(relative)
        if held is None:
            raise _absent(self.root / relative)
        if len(held) > 1 and _is_of_a_save(relative):
            self._check_copies(relative, held)
        return self.places[held[0]]

    def _check_copies(self, relative: str, held: Iterable[int]) -> None:
        sizes = [(self.places[i].label, self._listings[i][relative].size) for i in held]
        (first, size), *others = sizes
        for label, other in others:
            if other != size:
                raise DamagedCheckpoint(
                    f"it has {size:,} bytes in {first} and {other:,} in {label}",
                    path=self.root / relative,
                    hint="One of the two is stale, of another save. Name folders of one save, or move the "
                    "stale file away.",
                )

    def facts(self, relative: str) -> FileFacts:
        """Size and time of a file; raises as :meth:`place_of` does."""
        self.place_of(relative)
        return self._listings[self._tree.files[relative][0]][relative]

    def open(self, relative: str) -> Readable:
        """Open a file; raises as :meth:`place_of` does, and OSError."""
        return self.place_of(relative).open(relative)

    def shown(self, relative: str) -> str | None:
        """Where a file is, for a person; None for what is no file."""
        if not self.is_file(relative):
            return None
        place = self.holders(relative)[0]
        if isinstance(place, DirectoryPlace):
            return str(place.path(relative))
        return f"{place.label}:{self.root / relative}"


_POOLS: WeakValueDictionary[str, Pool] = WeakValueDictionary()


def _is_of_a_save(relative: str) -> bool:
    name = relative.rpartition("/")[2]
    return name.endswith(_OF_A_SAVE) and not name.startswith(_OF_A_MACHINE)


def _absent(path: PurePath) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


class PooledPath(PosixPath):
    """A path in the tree of a :class:`Pool`, made by :meth:`Pool.path`; paths derived from it are such too.

    Outside the tree it is a plain path. Inside, what it is called decides what it equals and how it is
    sorted, and it equals no plain path. As text it is where a file really lies, for messages; ``as_posix()``
    is what it is called. ``os.fspath`` gives the real place of a file of this machine, and refuses where
    there is no such place or, for a directory, no single one. Empty directories are not seen. Each pool has
    a class of its own, which is how a derived path keeps the pool, in every version of pathlib.
    """

    pool: ClassVar[Pool]

    @cached_property
    def _plain(self) -> Path:
        return Path(PosixPath.__str__(self))

    @cached_property
    def within(self) -> str | None:
        """Where it is in the tree; None outside."""
        return self.pool.relative(self._plain)

    def __str__(self) -> str:
        shown = self.pool.shown(self.within) if self.within is not None else None
        return PosixPath.__str__(self) if shown is None else shown

    def as_posix(self) -> str:
        """What it is called."""
        return PosixPath.__str__(self)

    def __repr__(self) -> str:
        return f"PooledPath({self.as_posix()!r})"

    def __fspath__(self) -> str:
        held = self.pool.holders(self.within) if self.within is not None else []
        if not held:
            return self.as_posix()
        if self.is_file():
            held = [self.pool.place_of(self.within or "")]
        place = held[0]
        if len(held) == 1 and isinstance(place, DirectoryPlace) and place.covers(self.within or ""):
            return str(place.path(self.within or ""))
        where = ", ".join(place.label for place in held)
        raise OSError(errno.EREMOTE, f"it is read from {where} and has no path here", str(self))

    def __hash__(self) -> int:
        return hash(self._plain)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, PurePath):
            return NotImplemented
        return self._sorted_as(self) == self._sorted_as(other)

    def __lt__(self, other: PurePath) -> bool:
        return self._sorted_as(self) < self._sorted_as(other)

    def __le__(self, other: PurePath) -> bool:
        return self._sorted_as(self) <= self._sorted_as(other)

    def __gt__(self, other: PurePath) -> bool:
        return self._sorted_as(self) > self._sorted_as(other)

    def __ge__(self, other: PurePath) -> bool:
        return self._sorted_as(self) >= self._sorted_as(other)

    @staticmethod
    def _sorted_as(path: PurePath) -> tuple[PurePath, str]:
        if not isinstance(path, PooledPath):
            return path, ""
        return path._plain, "" if path.within is None else path.pool.key

    def __reduce__(self) -> tuple[Callable[..., Path], tuple[str, ...]]:
        if self.within is None:
            return Path, (self.as_posix(),)
        return _pooled, (self.pool.key, self.within)

    def relative_to(self, *other: Any, **options: Any) -> Path:  # type: ignore[override]
        """The way here from another path, which is no path of the tree."""
        named = [o._plain if isinstance(o, PooledPath) else o for o in other]
        return self._plain.relative_to(*named, **options)

    def is_relative_to(self, *other: Any) -> bool:
        """Whether it is called as something below another path."""
        named = [o._plain if isinstance(o, PooledPath) else o for o in other]
        return self._plain.is_relative_to(*named)

    def match(self, *pattern: Any, **options: Any) -> bool:
        """Whether what it is called fits a pattern."""
        return self._plain.match(*pattern, **options)

    def exists(self, **options: Any) -> bool:
        """Whether the tree has it; like those below, for a plain path what pathlib says."""
        return super().exists(**options) if self.within is None else self.is_file() or self.is_dir()

    def is_file(self, **options: Any) -> bool:
        """Whether it is a file of the tree."""
        return super().is_file(**options) if self.within is None else self.pool.is_file(self.within)

    def is_dir(self, **options: Any) -> bool:
        """Whether it is a directory of the tree."""
        if self.within is None:
            return super().is_dir(**options)
        return self.pool.is_directory(self.within)

    def stat(self, **options: Any) -> os.stat_result:
        """Kind, size and time. Raises also as :meth:`Pool.place_of` does."""
        if self.within is None:
            return super().stat(**options)
        if self.is_dir():
            return _stat_result(stat.S_IFDIR | 0o555, FileFacts(0, 0))
        return _stat_result(stat.S_IFREG | 0o444, self.pool.facts(self.within))

    def open(  # type: ignore[override]
        self, mode: str = "r", buffering: int = -1, *text: Any, **options: Any
    ) -> IO[Any]:
        """Open for reading. Raises also as :meth:`Pool.place_of` does."""
        if self.within is None:
            return super().open(mode, buffering, *text, **options)
        if set(mode) - set("rbt"):
            raise OSError(errno.EROFS, "a tree of several places is only read", str(self))
        if isinstance(place := self.pool.place_of(self.within), DirectoryPlace):
            return place.path(self.within).open(mode, buffering, *text, **options)
        region = Region(self.pool.open(self.within), 0, self.pool.facts(self.within).size)
        if not buffering:
            return region  # type: ignore[return-value]
        stream = io.BufferedReader(region, buffering if buffering > 1 else _BUFFER)
        return stream if "b" in mode else io.TextIOWrapper(stream, *text, **options)

    def iterdir(self) -> Generator[PooledPath, None, None]:
        """What is in the directory, sorted by name."""
        if self.within is None:
            yield from super().iterdir()
            return
        if not self.is_dir():
            raise _absent(self)
        for name in self.pool.names(self.within):
            yield self / name

    def glob(self, pattern: str, **options: Any) -> Iterator[PooledPath]:  # type: ignore[override]
        """What fits a pattern; ``**`` is this directory and all below it."""
        if self.within is None:
            yield from map(type(self), self._plain.glob(pattern, **options))
        else:
            yield from dict.fromkeys(self._fitting(PurePath(pattern).parts))

    def rglob(self, pattern: str, **options: Any) -> Iterator[PooledPath]:  # type: ignore[override]
        """What fits a pattern in this directory or anywhere below it."""
        yield from self.glob(f"**/{pattern}", **options)

    def _fitting(self, pattern: Sequence[str]) -> Iterator[PooledPath]:
        if not pattern:
            yield self
        elif self.is_dir():
            if pattern[0] == "**":
                yield from self._fitting(pattern[1:])
            for child in self.iterdir():
                if pattern[0] != "**":
                    fits = fnmatchcase(child.name, pattern[0])
                    yield from child._fitting(pattern[1:]) if fits else ()
                elif child.is_dir():
                    yield from child._fitting(pattern)

    def resolve(self, strict: bool = False) -> PooledPath:
        """The same, without links on the way to the tree."""
        if self.within is None:
            return type(self)(self._plain.resolve(strict))
        if strict and not self.exists():
            raise _absent(self)
        return type(self)(self.pool.root.resolve(), self.within)


def _pooled(key: str, relative: str) -> PooledPath:
    pool = _POOLS.get(key)
    if pool is None:
        raise LookupError(f"this process has no pool {key!r}")
    return pool.path(relative)


def _stat_result(mode: int, facts: FileFacts) -> os.stat_result:
    seconds = facts.mtime_ns // 10**9
    precise = {f"st_{kind}time_ns": facts.mtime_ns for kind in "amc"}
    return os.stat_result((mode, 0, 0, 1, 0, 0, facts.size, *(seconds,) * 3), precise)


def open_for_reading(path: Path) -> Readable:
    """Open a file, wherever it lies.

    Raises:
        OSError: it cannot be opened.
        DamagedCheckpoint: as of :meth:`Pool.place_of`.
    """
    if isinstance(path, PooledPath) and path.within is not None:
        return path.pool.open(path.within)
    return LocalFile(path)


def read_at(path: Path, offset: int, count: int) -> bytes:
    """Bytes of a file, fewer than ``count`` where it ends; raises as :func:`open_for_reading` does."""
    data = bytearray(count)
    with contextlib.closing(open_for_reading(path)) as file:
        return bytes(data[: read_fully(file, memoryview(data), offset)])


def searched(path: Path) -> list[str]:
    """Labels of all places that are searched for what is under a path; none for a plain one."""
    if isinstance(path, PooledPath) and path.within is not None:
        return [place.label for place in path.pool.places]
    return []


def folders_of(path: Path) -> list[Path]:
    """The plain directories of this machine that are searched for what is under a path."""
    if not isinstance(path, PooledPath) or path.within is None:
        return local_paths(path)
    roots = (place.root for place in path.pool.places if isinstance(place, DirectoryPlace))
    return [*local_paths(path), *roots]


def local_paths(path: Path) -> list[Path]:
    """The plain paths on this machine that a path stands for: one for each folder that holds it."""
    if not isinstance(path, PooledPath):
        return [path]
    if path.within is None:
        return [path._plain]
    return [
        place.path(path.within)
        for place in path.pool.holders(path.within)
        if isinstance(place, DirectoryPlace) and place.covers(path.within)
    ]
