"""Owns the list of readers: which formats there are, which one a path holds, and how it is read.

A reader is a module or package in this package with ``NAME``, ``find(path, tag)`` and ``read(location)``.
It needs no other registration. A reader whose directories hold another format (Accelerate, OLMo-core) builds
on the reader of that format.
"""

from __future__ import annotations

import pkgutil
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from ckpt_tools.errors import (
    AmbiguousCheckpoint,
    CkptError,
    DamagedCheckpoint,
    NoModel,
    NotACheckpoint,
    UsageError,
    listed,
)
from ckpt_tools.readers.containers.weight_files import ADAPTER_FILES
from ckpt_tools.readers.net import unexpected_is_damage
from ckpt_tools.readers.tree import look_below
from ckpt_tools.readers.unread import unread
from ckpt_tools.storage.absent import what_is_there
from ckpt_tools.storage.addresses import hint_of_address
from ckpt_tools.storage.folders import assets_near, entries_of, searched
from ckpt_tools.storage.replaced import how_to_restore
from ckpt_tools.storage.stamps import Stamp, changed_since, refusal_of, stamp_of, stamps_in
from ckpt_tools.tensors.checkpoint import FINISHED, LAST, Checkpoint, Location
from ckpt_tools.tensors.threads import garbage_kept

# Of so many checkpoints below a directory the metadata are read, for the list.
_MOST_READ = 20
# Files that can be read alone, and how many of them are tried for a hint.
_SINGLE = re.compile(
    r"(?!.*(?:optim|sched|scaler|rng|random|extra_state|training_args)).*\.(?:pt|pth|bin|ckpt)"
)
_MOST_TRIED = 3
_MODEL_NUMBER = re.compile(r"model(?:_fsdp)?(?:_(\d+))?$")


class Reader(Protocol):
    """The attributes that make a module of this package a reader."""

    NAME: str

    def find(self, path: Path, tag: str | None = None) -> list[Location]:
        """The checkpoints of this format to which ``path`` leads."""

    def read(self, location: Location) -> Checkpoint:
        """Read one checkpoint's metadata."""


@lru_cache(maxsize=1)
def readers() -> dict[str, Reader]:
    """Every reader of the package by name."""
    modules = [import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    return {m.NAME: cast("Reader", m) for m in modules if hasattr(m, "NAME")}


def locate(
    path: Path, tag: str | None = None, *, model: int | str | None = None, format: str | None = None
) -> Location:
    """The one checkpoint to which ``path`` leads.

    Args:
        path: a checkpoint's directory, a directory above or inside it, or one of its files.
        tag: the name of one of several checkpoints.
        model: the number or name of one of several models in a checkpoint.
        format: the only format to look for; by default all.

    Raises:
        NotACheckpoint: there is no checkpoint under the path.
        AmbiguousCheckpoint: there is more than one; the error lists them.
        UnsupportedLayout: it is of a format that is known and not read.
        UsageError: ``tag``, ``model`` or ``format`` does not exist.
        DamagedCheckpoint: the target of a pointer such as ``latest`` does not exist.
    """
    with garbage_kept(), _folders_named(path):
        location = _locate(path, tag, model, format)
    near = dict.fromkeys(local for place in location.near for local in assets_near(place))
    return replace(location, near=tuple(near))


def _locate(path: Path, tag: str | None, model: int | str | None, format: str | None) -> Location:
    if not path.exists():
        raise NotACheckpoint(
            "no such file or directory",
            path=path,
            hint=how_to_restore(path) or hint_of_address(path) or what_is_there(path),
        )
    found = _find(path, tag, format)
    if path.is_dir() and all(location.format in LAST for location in found):
        found = _below(path, tag, format) or found
    if not found and tag is not None and (others := _find(path, None, format)):
        raise UsageError(
            f"there is no checkpoint with the tag {tag!r}",
            path=path,
            hint=f"Pass --tag with one of: {', '.join(location.name for location in others)}.",
        )
    if not found and format is not None and (others := _find(path, tag, None)):
        named = sorted({location.format for location in others})
        raise UsageError(
            f"there is no checkpoint of the format {format!r}",
            path=path,
            hint=f"Leave out --source-format, or pass it with {' or '.join(named)}.",
        )
    if not found and (adapters := _adapters(path)):
        raise NotACheckpoint(
            "an adapter that PEFT saved, not a checkpoint of a model",
            path=adapters[0] if len(adapters) == 1 else path,
            hint="To merge it into its base model, run: "
            f"ckpt-tools merge-lora BASE OUT --adapter-dir {adapters[-1]}. "
            "To change its dtype or the name of its base, run: "
            f"ckpt-tools extract-lora {adapters[-1]} OUT. "
            "PEFT loads it without a conversion.",
        )
    if not found and (refusal := unread(path)) is not None:
        raise refusal
    if not found:
        raise NotACheckpoint(
            "no checkpoint of a known format was found",
            path=path,
            hint=f"The path holds: {_listing(path)}. {_what_to_pass(path)}"
            if path.is_dir()
            else "Pass a file that holds weights, or the directory of a checkpoint.",
        )
    if model is not None:
        found = _numbered(path, found, model)
    if len(found) > 1:
        names = [location.name for location in found]
        option = "--model" if any(one.format in LAST for one in found) else "--tag"
        raise _ambiguous(path, names, f"Pass {option} with one of them")
    return found[0]


def _below(path: Path, tag: str | None, format: str | None) -> list[Location]:
    """The one checkpoint in the tree below ``path``, or none.

    Raises:
        AmbiguousCheckpoint: there are several; the error lists them with format and step.
        CkptError: what looks like the only one cannot be found out.
    """

    def find(directory: Path) -> list[Location]:
        return [one for one in _find(directory, tag, format) if one.format not in LAST]

    found = look_below(path, find)
    listing: list[str] = []
    kept: list[Location] = []
    for number, location in enumerate(found.locations):
        try:
            about = _about(location) if number < _MOST_READ and len(found.locations) > 1 else ""
        except NoModel:
            continue
        kept.append(location)
        listing.append(f"{location.directory}{about}")
    if not kept and found.errors:
        raise found.errors[0]
    named = [*dict.fromkeys(str(location.directory) for location in kept)]
    if len(named) < 2:
        # Several models of one checkpoint are told apart by their names.
        notes = tuple(f"beside it, and not read: {error}" for error in found.errors)
        return [replace(one, remarks=(*one.remarks, *notes)) for one in kept]
    rest = "" if found.is_whole else " Directories further below were not looked at."
    raise AmbiguousCheckpoint(
        f"there are {len(named)} checkpoints here",
        choices=named,
        path=path,
        hint=f"Found: {listed([*dict.fromkeys(listing)], 20)}. Pass the path of one of them, for example: "
        f"ckpt-tools inspect {shlex.quote(named[-1])}.{rest}",
    )


def _about(location: Location) -> str:
    """Format and step of a checkpoint, for a list.

    Raises:
        NoModel: it holds no model.
    """
    try:
        checkpoint = read(location)
    except NoModel:
        raise
    except CkptError:
        return f" ({location.format}, cannot be read)"
    step = "" if checkpoint.step is None else f", step {checkpoint.step}"
    return f" ({checkpoint.title}{step})"


def _adapters(path: Path) -> list[Path]:
    """Directories of adapters at or below ``path``, such as the Trainer's ``checkpoint-N``, newest last."""
    places = [path.parent]
    if path.is_dir():
        places = [path, *sorted(path.iterdir(), key=lambda entry: (len(entry.name), entry.name))]
    return [place for place in places if any((place / name).is_file() for name in ADAPTER_FILES)]


def _numbered(path: Path, found: list[Location], model: int | str) -> list[Location]:
    """The locations of a model, by name or number: frameworks write ``model``, ``model_1`` and so on."""
    named = [location for location in found if location.name == str(model)]
    if named:
        return named
    numbers = [_MODEL_NUMBER.search(location.name) for location in found]
    chosen = [
        location
        for location, match in zip(found, numbers, strict=True)
        if ((match and match[1]) or "0") == str(model)
    ]
    if not chosen:
        raise UsageError(
            f"there is no model {model}",
            path=path,
            hint="There is one model. Leave out --model."
            if len(found) == 1
            else f"Pass --model with one of: {', '.join(location.name for location in found)}.",
        )
    return chosen


def _find(path: Path, tag: str | None, format: str | None) -> list[Location]:
    """The locations that the readers find; training states exclude finished weights beside them.

    Two readers may find one location: the reader of its format, and that of a directory of several formats.
    """
    found: dict[tuple[str, Path, str | None], Location] = {}
    for reader in _asked(format):
        with unexpected_is_damage(path, reader.NAME):
            for location in reader.find(path, tag):
                found[location.format, location.directory, location.part] = location
    states = [one for one in found.values() if one.format not in (*FINISHED, *LAST)]
    finished = [one for one in found.values() if one.format in FINISHED]
    return states or finished or list(found.values())


def _asked(format: str | None) -> list[Reader]:
    if format is None:
        return list(readers().values())
    if format not in readers():
        raise UsageError(
            f"unknown format {format!r}",
            hint=f"Pass --source-format with one of: {', '.join(sorted(readers()))}.",
        )
    return [readers()[format]]


def read(location: Location) -> Checkpoint:
    """Read the checkpoint at ``location`` from metadata alone.

    Raises:
        DamagedCheckpoint: it is damaged, or was written while it was read.
        CkptError: see :mod:`ckpt_tools.errors`.
    """
    try:
        reader = readers()[location.format]
    except KeyError:
        raise UsageError(f"there is no reader for the format {location.format!r}") from None
    before = stamps_in(location.directory)
    with garbage_kept(), _folders_named(location.directory):
        with (
            _changes_named(before, location.directory),
            unexpected_is_damage(location.directory, location.format),
        ):
            checkpoint = reader.read(location)
        checkpoint.stamps.update((path, stamp_of(path)) for path in checkpoint.files)
        changed = [p for p, stamp in checkpoint.stamps.items() if before.get(p, stamp) != stamp]
        if changed:
            raise refusal_of(changed, len(checkpoint.files))
    if checkpoint.lost is not None:
        _name_folders(checkpoint.lost, location.directory)
    return checkpoint


@contextmanager
def _changes_named(before: Mapping[Path, Stamp | None], directory: Path) -> Iterator[None]:
    """Turn an error about a file that changed meanwhile, or about all files, into one that says so."""
    try:
        yield
    except DamagedCheckpoint as error:
        changed = changed_since(before)
        if changed and error.path in (
            None,
            directory,
            str(directory),
            *changed,
            *map(str, changed),
        ):
            raise refusal_of(changed, len(before)) from error
        raise


@contextmanager
def _folders_named(path: Path) -> Iterator[None]:
    """Add the list of folders that are read as one to errors, except to errors about one file."""
    try:
        yield
    except (DamagedCheckpoint, NotACheckpoint) as error:
        _name_folders(error, path)
        raise


def _name_folders(error: CkptError, path: Path) -> None:
    folders = searched(path)
    if folders and not (error.path is not None and error.path.is_file()):
        note = f"Read as one checkpoint: {', '.join(folders)}."
        error.hint = f"{error.hint} {note}" if error.hint else note


def _ambiguous(path: Path, choices: list[str], advice: str) -> AmbiguousCheckpoint:
    return AmbiguousCheckpoint(
        f"there are {len(choices)} checkpoints here",
        choices=choices,
        path=path,
        hint=f"{advice}: {', '.join(choices)}.",
    )


def _what_to_pass(directory: Path) -> str:
    """The next step where a directory is no checkpoint: one of its files, or another directory."""
    named = [entry for entry in entries_of(directory) if _SINGLE.fullmatch(entry.name)]
    files = [entry for entry in named if entry.is_file()]
    for file in files[:_MOST_TRIED]:
        if len(files) > 1 and _find(file, None, None):
            return (
                "Nothing records how such files belong together. If one holds the whole model, pass it: "
                f"{file}."
            )
    return "Pass the directory with `latest`, the global_stepN directory or the checkpoint-N directory."


def _listing(path: Path) -> str:
    if not path.is_dir():
        return path.name
    return listed(sorted(entry.name for entry in path.iterdir()), 8) or "nothing"
