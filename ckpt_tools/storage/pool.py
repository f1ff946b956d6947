"""Owns where a file is read, of a directory tree whose files lie in several places.

A :class:`Pool` is the union of its places; a file is read from the first place that holds it. A
:class:`PooledPath` is a path in a pool, and works as a plain path where files are listed and opened.
"""

from __future__ import annotations

import errno
import io
import os
import secrets
import stat
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path, PosixPath, PurePath
from typing import IO, Any
from weakref import WeakValueDictionary

from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.storage.places import (
    Addressed,
    DirectoryPlace,
    FileFacts,
    Place,
    Readable,
    Region,
    Tree,
    is_of_a_save,
)

# A request to another machine costs about as much for this many bytes as for one.
_BUFFER = 64 << 10


class Pool:
    """Directories and other places, read as one tree.

    The places are listed when the pool is made. A file is read from the first place that holds it. If copies
    of a file with tensors differ in size, they belong to two saves; this is an error when the file is read.
    Copies of one size are not compared here: readers compare what the files state about themselves.

    Args:
        root: the name of the tree: the directory that the caller named. It need not exist.
        places: where the files lie; the places of this process first.
        key: an unpickled path finds the newest pool with this key in its process. The default is unique.

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
        _POOLS[self.key] = self

    def path(self, relative: str = "") -> PooledPath:
        """A path of the tree; by default its root."""
        return PooledPath(self.root, relative).put_in(self)

    def relative(self, path: PurePath) -> str | None:
        """The name of a path in the tree, empty for the root; None for a path outside."""
        parts = PurePath(os.path.abspath(path)).parts if ".." in path.parts else path.parts
        for stem in self._stems:
            if parts[: len(stem)] == stem and (stem or parts[:1] != ("/",)):
                return "/".join(parts[len(stem) :])
        return None

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
        """The places with a file, or with something below a directory, in order."""
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
        if len(held) > 1 and is_of_a_save(relative):
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
                    hint="One of the two files is of another save. Name folders of one save, or move the "
                    "file of the other save away.",
                )

    def facts(self, relative: str) -> FileFacts:
        """Size and time of a file; raises as :meth:`place_of` does."""
        self.place_of(relative)
        return self._listings[self._tree.files[relative][0]][relative]

    def open(self, relative: str) -> Readable:
        """Open a file; raises as :meth:`place_of` does, and OSError."""
        return self.place_of(relative).open(relative)

    @property
    def is_of_one_address(self) -> bool:
        """Whether it is the tree of a store, and of nothing else."""
        return False

    def shown(self, relative: str) -> str | None:
        """Where a file lies, for messages; None for anything but a file, unless it has an address."""
        first = self.places[0] if self.places else None
        if not self.is_file(relative):
            return first.address(relative) if isinstance(first, Addressed) else None
        place = self.holders(relative)[0]
        if isinstance(place, DirectoryPlace):
            return str(place.path(relative))
        if isinstance(place, Addressed):
            return place.address(relative)
        return f"{place.label}:{self.root / relative}"

    def reopening(self, relative: str) -> tuple[Callable[..., Path], tuple[Any, ...]]:
        """How another process makes a path of the pool that has the same key there."""
        return _pooled, (self.key, relative)


_POOLS: WeakValueDictionary[str, Pool] = WeakValueDictionary()


def _absent(path: PurePath) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


class PooledPath(PosixPath):
    """A path in the tree of a :class:`Pool`, made by :meth:`Pool.path`; a derived path keeps the pool.

    Outside the tree it behaves as a plain path. Inside, its name decides equality and order, and it equals no
    plain path. ``as_posix()`` gives its name. ``str`` gives the place of the file, for messages;
    ``os.fspath`` gives its place on this machine, and raises where there is none or more than one.
    """

    pool: Pool

    def put_in(self, pool: Pool) -> PooledPath:
        """Make it a path of a pool; called once, before any other use."""
        self.pool = pool
        return self

    def with_segments(self, *segments: str | os.PathLike[str]) -> PooledPath:
        """A path of the same pool. From Python 3.12 on, pathlib derives every path with this method."""
        return PooledPath(*segments).put_in(self.pool)

    # Up to Python 3.11, pathlib gives a derived path nothing but the class.
    def joinpath(self, *others: str | os.PathLike[str]) -> PooledPath:
        """See ``pathlib``, as for those that follow."""
        return super().joinpath(*others).put_in(self.pool)

    def __truediv__(self, other: str | os.PathLike[str]) -> PooledPath:
        return self.joinpath(other)

    def __rtruediv__(self, other: str | os.PathLike[str]) -> PooledPath:
        return (
            self.with_segments(other, self)
            if isinstance(other, (str, os.PathLike))
            else NotImplemented
        )

    @property
    def parent(self) -> PooledPath:
        """The directory that it is in."""
        return super().parent.put_in(self.pool)

    @property
    def parents(self) -> Sequence[PooledPath]:
        """The directories above it, the nearest first."""
        return [above.put_in(self.pool) for above in super().parents]

    def with_name(self, name: str) -> PooledPath:
        """Another name in the same directory."""
        return super().with_name(name).put_in(self.pool)

    def with_suffix(self, suffix: str) -> PooledPath:
        """The same with another suffix."""
        return super().with_suffix(suffix).put_in(self.pool)

    def absolute(self) -> PooledPath:
        """The same from the root of the file system on."""
        return super().absolute().put_in(self.pool)

    @cached_property
    def _plain(self) -> Path:
        return Path(PosixPath.__str__(self))

    @cached_property
    def within(self) -> str | None:
        """Its name in the tree; None outside."""
        return self.pool.relative(self._plain)

    @property
    def is_addressed(self) -> bool:
        """Whether what it names lies in a store."""
        held = self.pool.holders(self.within) if self.within is not None else ()
        return any(isinstance(place, Addressed) for place in held or self.pool.places[:1])

    def __str__(self) -> str:
        shown = self.pool.shown(self.within) if self.within is not None else None
        return PosixPath.__str__(self) if shown is None else shown

    def as_posix(self) -> str:
        """Its name."""
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
        if len(held) == 1 and isinstance(place, Addressed):
            return str(place.local(self.within or ""))
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
        return self.pool.reopening(self.within)

    def relative_to(self, *other: Any, **options: Any) -> Path:  # type: ignore[override]
        """The relative path from another path to this one, as a plain path."""
        named = [o._plain if isinstance(o, PooledPath) else o for o in other]
        return self._plain.relative_to(*named, **options)

    def is_relative_to(self, *other: Any) -> bool:
        """Whether its name is below another path."""
        named = [o._plain if isinstance(o, PooledPath) else o for o in other]
        return self._plain.is_relative_to(*named)

    def match(self, *pattern: Any, **options: Any) -> bool:
        """Whether its name fits a pattern."""
        return self._plain.match(*pattern, **options)

    def exists(self, **options: Any) -> bool:
        """Whether the tree has it. Outside the tree, this and the methods below do as ``pathlib`` does."""
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
            raise OSError(errno.EROFS, "a tree of several places is read-only", str(self))
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
            yield from map(self.with_segments, self._plain.iterdir())
            return
        if not self.is_dir():
            raise _absent(self)
        for name in self.pool.names(self.within):
            yield self / name

    def glob(self, pattern: str, **options: Any) -> Iterator[PooledPath]:  # type: ignore[override]
        """What fits a pattern; ``**`` is this directory and all below it."""
        if self.within is None:
            yield from map(self.with_segments, self._plain.glob(pattern, **options))
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
        """The same path, with the links above the tree resolved."""
        if self.within is None:
            return self.with_segments(self._plain.resolve(strict))
        if strict and not self.exists():
            raise _absent(self)
        return self.with_segments(self.pool.root.resolve(), self.within)


def _pooled(key: str, relative: str) -> PooledPath:
    pool = _POOLS.get(key)
    if pool is None:
        raise LookupError(f"this process has no pool {key!r}")
    return pool.path(relative)


def _stat_result(mode: int, facts: FileFacts) -> os.stat_result:
    seconds = facts.mtime_ns // 10**9
    precise = {f"st_{kind}time_ns": facts.mtime_ns for kind in "amc"}
    return os.stat_result((mode, 0, 0, 1, 0, 0, facts.size, *(seconds,) * 3), precise)
