"""Owns the listing of a directory, and the meaning of ``--also DIR``: folders of several machines as one.

A folder of ``--also`` is a copy of some directory of the checkpoint's tree, and this module finds which.
People name what they copied: the run, with its ``latest``, or the directory of one save in it. The names show
which it is. Where they do not, two folders are of the same level if both hold data files or neither does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ckpt_tools.errors import UsageError, listed
from ckpt_tools.storage.naming import as_path
from ckpt_tools.storage.parts import Folder, StoreFolder, folder_of
from ckpt_tools.storage.places import DirectoryPlace
from ckpt_tools.storage.pool import Pool, PooledPath
from ckpt_tools.storage.regular import content_of

# A checkpoint's directory is at most this many levels below the directory that people name.
_LEVELS = 3
_DATA = re.compile(r".*\.(pt|bin|pth|safetensors|distcp|metadata)")
# Names of the directory of one save.
_SAVE = re.compile(r"(?:step[-_]?|checkpoint[-_]|epoch[-_]?|iter(?:ation)?[-_]?)(\d+)")


def entries_of(directory: Path) -> list[Path]:
    """What is in a directory, in the order of :func:`by_number`; nothing if it cannot be read."""
    try:
        return sorted(directory.iterdir(), key=by_number)
    except OSError:
        return []


def by_number(path: Path) -> tuple[int, str]:
    """Sorts paths by the digits in their names, so that ``step9`` comes before ``step10``."""
    return int("".join(c for c in path.name if c.isdigit()) or 0), path.name


def searched(path: Path) -> list[str]:
    """Labels of all places that are searched for what is under a path; none for a plain path."""
    if is_joined(path) and isinstance(path, PooledPath) and path.within is not None:
        return [place.label for place in path.pool.places]
    return []


def folders_of(path: Path) -> list[Path]:
    """The plain directories of this machine that are searched for what is under a path."""
    if not isinstance(path, PooledPath) or path.within is None:
        return local_paths(path)
    roots = (place.root for place in path.pool.places if isinstance(place, DirectoryPlace))
    return [*local_paths(path), *roots]


def assets_near(path: Path) -> list[Path]:
    """The folders in which files beside a checkpoint's directory may lie: of this machine, or of a store."""
    if not isinstance(path, PooledPath) or path.within is None:
        return local_paths(path)
    if not is_joined(path) and path.is_addressed:
        return [path]
    held = path.pool.holders(path.within)
    distant = [
        p.path(path.within) for p in held if isinstance(p, StoreFolder) and p.covers(path.within)
    ]
    return [*local_paths(path), *distant]


def is_joined(path: Path) -> bool:
    """Whether a path is in a tree of several places, or of another machine: not that of one address."""
    return isinstance(path, PooledPath) and not path.pool.is_of_one_address


def shown(path: Path) -> Path:
    """A path for reports: plain where it is on this machine, and with its address in a store."""
    return path if isinstance(path, PooledPath) and path.is_addressed else Path(str(path))


def local_paths(path: Path) -> list[Path]:
    """The plain paths on this machine that a path stands for: one for each folder that holds it."""
    if not isinstance(path, PooledPath):
        return [path]
    if path.within is None:
        return [Path(path.as_posix())]
    return [
        place.path(path.within)
        for place in path.pool.holders(path.within)
        if isinstance(place, DirectoryPlace) and place.covers(path.within)
    ]


def read_as_one(path: Path, also: Sequence[str | os.PathLike[str]]) -> Path:
    """The path of a checkpoint that has files in further folders.

    Args:
        path: a path that readers accept.
        also: directories with further files of the checkpoint. Each is a copy of the same directory, of one
            above it or of one in it.

    Returns:
        ``path`` in a ``Pool``; ``path`` itself if ``also`` is empty or ``path`` is in a pool already.
        Processes that name the same folders get pools with the same key.

    Raises:
        UsageError: one of ``also`` is not a directory, cannot be read, or is not such a copy.
    """
    if not also or is_joined(path) or not path.exists():
        return path
    root = path.parent if path.is_file() else path
    places = [folder_of(root), *places_of(root, also)]
    key = "\0".join(f"{place.root.absolute()}\0{place.under}" for place in places)
    with _refused_if_unreadable(root):
        pool = Pool(root, places, key=key)
    return pool.path(path.name) if path.is_file() else pool.path()


def places_of(root: Path, also: Sequence[str | os.PathLike[str]]) -> list[Folder]:
    """Further folders of a checkpoint's directory, each with its path in the tree.

    Raises:
        UsageError: as :func:`read_as_one` raises it.
    """
    known = [folder_of(root)]
    for folder in map(as_path, also):
        if not folder.is_dir():
            raise UsageError(
                "not a directory" if folder.exists() else "no such directory",
                path=folder,
                hint="--also takes a folder of this machine with further files of the checkpoint.",
            )
        with _refused_if_unreadable(folder):
            known.append(_aligned(root, folder, known))
    return known[1:]


@contextmanager
def _refused_if_unreadable(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = error.filename or directory
        raise UsageError(f"cannot be read ({error.strerror})", path=where) from error


def _aligned(root: Path, folder: Path, known: Sequence[Folder]) -> Folder:
    """The folder with its path in the tree.

    Raises:
        UsageError: the folder is not a copy of any directory of the checkpoint.
    """
    if _name(folder) == _name(root):
        return folder_of(folder)
    inside = [*_inside(root, folder), *_below(root, folder, known)]
    likely = [place for place in inside if _alike(place, known)]
    same = folder_of(folder)
    if likely or (inside and not _alike(same, known)):
        return (likely or inside)[0]
    saves = [_SAVE.findall(_name(directory))[-1:] for directory in (root, folder)]
    if all(saves) and saves[0] != saves[1]:
        raise UsageError(
            f"its name is that of another save than {root}",
            path=folder,
            hint="Name folders of one save.",
        )
    if not _alike(same, known) and _holds_data(folder) != _holds_data(root):
        raise _not_alike(root, folder)
    return same


def _name(directory: Path) -> str:
    return directory.resolve().name


def _inside(root: Path, folder: Path) -> Iterator[Folder]:
    """The copies of ``root`` in a folder that is a copy of a directory above ``root``."""
    parts = root.resolve().parts[1:]
    for count in range(1, min(_LEVELS, len(parts)) + 1):
        candidate = folder.joinpath(*parts[-count:])
        if candidate.is_dir():
            yield folder_of(candidate)


def _below(root: Path, folder: Path, known: Sequence[Folder]) -> Iterator[Folder]:
    """The folder as a copy of a directory in ``root``; a copy of ``root``, or ``latest``, has its name."""
    parts = folder.resolve().parts[1:]
    for count in range(1, min(_LEVELS, len(parts)) + 1):
        under = "/".join(parts[-count:])
        beside = [place.root / under for place in known if not place.under]
        if any(other.is_dir() and not _same(other, folder) for other in beside):
            yield folder_of(folder, under)
    if _latest(root) == parts[-1]:
        yield folder_of(folder, parts[-1])


def _same(a: Path, b: Path) -> bool:
    plain = not isinstance(a, PooledPath) and not isinstance(b, PooledPath)
    return a.samefile(b) if plain else a == b


def _latest(root: Path) -> str | None:
    try:
        return content_of(root / "latest").decode().strip()
    except (OSError, ValueError):
        return None


def _alike(place: Folder, known: Sequence[Folder]) -> bool:
    """Whether a folder shares a name with a known copy of the same directory, apart from numbers."""
    beside = [other.root / place.under for other in known if not other.under]
    beside += [other.root for other in known if other.under and other.under == place.under]
    return any(_kinds(place.root) & _kinds(other) for other in beside)


def _kinds(directory: Path) -> set[str]:
    try:
        return {re.sub(r"\d+", "0", entry.name) for entry in directory.iterdir()}
    except OSError:
        return set()


def _holds_data(directory: Path) -> bool:
    return any(_DATA.fullmatch(name) for name in _kinds(directory))


def _not_alike(root: Path, folder: Path) -> UsageError:
    if _holds_data(root):
        hint = f"Name a folder with further files of {_name(root)}; {folder / _name(root)} does not exist."
    else:
        names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        hint = (
            f"Name a copy of {_name(root)}, or of a directory in it with the same name "
            f"({listed(names, 8) or 'it has none'})."
        )
    return UsageError(f"not a copy of {root}, nor of a directory in it", path=folder, hint=hint)
