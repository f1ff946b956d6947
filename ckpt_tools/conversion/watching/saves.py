"""Owns one look at the directory of a run: the saves side by side in it, and what lies in each.

A save is a directory with files of weights. It is known by its name, and its number is the last one in the
name. Links are other names of saves. Directories that programs make while they save (``tmp-checkpoint-500``,
``step500-tmp``) are no saves yet.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import xxhash

LATEST = "latest"
TRAINER_STATE = "trainer_state.json"
COMPLETED = "COMPLETED"
# Deeper than any framework puts weights below the directory of a save.
_DEPTH = 5
_WEIGHTS = (".distcp", ".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# Files with the same endings that hold no weights; ranks write some of them after the weights.
_NO_WEIGHTS = re.compile(
    r"(rng_state|random_states|scheduler|scaler|sampler|dl_state_dict|training_args|optimizer\.)"
)
_TEMPORARY = re.compile(r"^(tmp[-_]|\.)|([-_.]tmp|\.partial-.*|\.replaced-.*|\.incomplete)$")
_LONGEST_POINTER = 4096


class Stamp(NamedTuple):
    """Size and time of a file."""

    nbytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Save:
    """The directory of one checkpoint at one moment.

    Attributes:
        path: the directory.
        files: size and time of each file, by its path in the directory.
        latest: the tag in its own ``latest`` file, as the Trainer and Accelerate keep it.
        has_state: whether ``trainer_state.json`` is whole.
        best: the checkpoint that the Trainer's state calls the best one.
    """

    path: Path
    files: Mapping[str, Stamp] = field(default_factory=dict)
    latest: str | None = None
    has_state: bool = False
    best: str | None = None

    @property
    def name(self) -> str:
        """Name of the directory."""
        return self.path.name

    @cached_property
    def number(self) -> int | None:
        """The last number in the name, usually the step."""
        return number_in(self.name)

    @property
    def order(self) -> tuple[bool, int, str]:
        """The order in which saves are converted: by number, then those without one."""
        return (self.number is None, self.number or 0, self.name)

    @cached_property
    def weights(self) -> dict[str, Stamp]:
        """The files that may hold weights."""
        return {name: stamp for name, stamp in self.files.items() if _is_weights(name)}

    @property
    def signature(self) -> str:
        """A digest of names, sizes and times of the files that may hold weights."""
        facts = [(name, *stamp) for name, stamp in sorted(self.weights.items())]
        return xxhash.xxh3_128_hexdigest(json.dumps(facts).encode())


@dataclass(frozen=True)
class Look:
    """The directory of a run at one moment.

    Attributes:
        run: the directory.
        saves: its saves, in their order.
        latest: the tag in ``latest``, which DeepSpeed resumes from.
        linked: names of saves that links in the directory lead to.
    """

    run: Path
    saves: tuple[Save, ...]
    latest: str | None = None
    linked: frozenset[str] = frozenset()


def number_in(name: str) -> int | None:
    """The last number in a name."""
    found = re.findall(r"\d+", name)
    return int(found[-1]) if found else None


def look_at(run: Path, out: Path) -> Look:
    """What lies in the directory of a run now; nothing if it does not exist yet.

    Args:
        run: the directory of the run.
        out: where outputs are made, which may lie in it.
    """
    saves: list[Save] = []
    linked: set[str] = set()
    for entry in _entries(run):
        if entry.is_symlink():
            linked.add(Path(os.path.realpath(entry.path)).name)
        elif _is_directory(entry) and not _TEMPORARY.search(entry.name):
            path = run / entry.name
            if path.resolve() == out.resolve():
                continue
            save = _save(path)
            if save.weights:
                saves.append(save)
    return Look(run, tuple(sorted(saves, key=lambda s: s.order)), _tag(run), frozenset(linked))


def _save(path: Path) -> Save:
    files = dict(_files(path, "", _DEPTH))
    state = _state(path) if TRAINER_STATE in files else None
    best = state.get("best_model_checkpoint") if state else None
    return Save(
        path,
        files,
        latest=_tag(path) if LATEST in files else None,
        has_state=state is not None,
        best=Path(best).name if isinstance(best, str) else None,
    )


def _files(directory: Path, prefix: str, depth: int) -> Iterator[tuple[str, Stamp]]:
    for entry in _entries(directory):
        try:
            if _is_directory(entry):
                if depth:
                    inner = directory / entry.name
                    yield from _files(inner, f"{prefix}{entry.name}/", depth - 1)
                continue
            found = entry.stat()
        except OSError:
            continue  # it was removed in this moment
        if stat.S_ISREG(found.st_mode):
            yield f"{prefix}{entry.name}", Stamp(found.st_size, found.st_mtime_ns)


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    """The entries by name; none if the directory is gone."""
    try:
        with os.scandir(directory) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return []


def _is_directory(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False)


def _is_weights(name: str) -> bool:
    last = PurePosixPath(name).name
    return last == ".metadata" or (last.endswith(_WEIGHTS) and not _NO_WEIGHTS.match(last))


def _tag(directory: Path) -> str | None:
    try:
        with (directory / LATEST).open("rb") as stream:
            text = stream.read(_LONGEST_POINTER).decode().strip()
    except (OSError, ValueError):
        return None
    return text or None


def _state(directory: Path) -> dict[str, object] | None:
    """The Trainer's state; None as long as the file is not whole."""
    try:
        data = json.loads((directory / TRAINER_STATE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None
