"""Owns the listing of a directory that all checks use, and the strict reading of a JSON file.

Git's folder is ignored. Links are followed, because download caches use them.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ckpt_tools.errors import UsageError, counted
from ckpt_tools.storage.naming import as_path
from ckpt_tools.storage.reading import is_near
from ckpt_tools.storage.regular import content_of
from ckpt_tools.storage.replaced import how_to_restore
from ckpt_tools.verification.container import Container, Entry, parse_json
from ckpt_tools.verification.problem import Findings

CONFIG = "config.json"
MANIFEST = "ckpt_tools_manifest.json"
SHA256SUMS = "SHA256SUMS"

_PASSED_OVER = {".git"}
# Names of files that savers, downloaders and this package leave if they are stopped.
_LEFTOVER = re.compile(
    r"(\.partial([-.].*)?|\.incomplete|\.tmp|\.part|\.aria2|\.crdownload|\.download)$"
)


@dataclass
class Directory:
    """The directory of a run.

    Attributes:
        path: its path.
        files: bytes of every file, by its relative path with forward slashes.
        containers: the safetensors files with a readable header.
        tensors: the model's tensors, from all its files; empty for an adapter.
        lost: tensors that an index names and no file holds. They are reported already.
        unread: weight files that cannot be read, so their tensors are unknown.
        config: the content of ``config.json``; None without a config of a model.
        adapters: for each folder that holds an adapter (``""`` for the directory itself), its
            tensors.
        trust_remote_code: whether custom code of the directory may run.
    """

    path: Path
    files: Mapping[str, int]
    containers: dict[str, Container] = field(default_factory=dict)
    tensors: dict[str, Entry] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    unread: list[str] = field(default_factory=list)
    config: Mapping[str, Any] | None = None
    adapters: dict[str, dict[str, Entry]] = field(default_factory=dict)
    trust_remote_code: bool = False

    @cached_property
    def root_files(self) -> list[str]:
        """The files of the directory itself, by name."""
        return [file for file in self.files if "/" not in file]

    @property
    def every_tensor(self) -> list[Entry]:
        """The model's tensors and those of every adapter."""
        return [
            *self.tensors.values(),
            *(e for held in self.adapters.values() for e in held.values()),
        ]


@dataclass(frozen=True)
class Manifest:
    """The record of one folder.

    Attributes:
        folder: its path, with a slash at the end; empty for the directory itself.
        unit_bytes: tensors are cut at multiples of this offset for their digests.
        tensors: for each tensor, its file and its digest.
        sizes: bytes of each file.
        digests: the digest of each file; for weight files that of the header.
        headers: the files whose digest covers the header alone.
    """

    folder: str
    unit_bytes: int
    tensors: Mapping[str, tuple[str, str]]
    sizes: Mapping[str, int]
    digests: Mapping[str, str]
    headers: frozenset[str]


def refuse_no_config(option: str, named: str | Path) -> None:
    """Raise UsageError if an option names no directory of a model, because a verdict would be without it."""
    if not (as_path(named) / CONFIG).is_file():
        raise UsageError(
            f"the directory of {option} has no config.json",
            path=as_path(named),
            hint="Name the directory of the model that the training run loaded, not its name on the Hub, "
            f"or leave out {option}.",
        )


def list_directory(path: Path, findings: Findings) -> Directory:
    """List a directory, and add a problem for each file that a finished directory does not have.

    Raises:
        UsageError: the directory does not exist, or it cannot be listed.
    """
    if not path.is_dir():
        if path.exists():
            hint = "Name the directory that holds config.json."
            raise UsageError("it is not a directory", path=path, hint=hint)
        raise UsageError(
            "the directory does not exist",
            path=path,
            hint=how_to_restore(path)
            or "Check the path. A conversion that failed or was stopped leaves no directory.",
        )
    files: dict[str, int] = {}
    try:
        for file in _below(path):
            try:
                found = (path / file).stat()
            except OSError as error:
                why = f"cannot be read ({error.strerror}); perhaps it is a broken link"
                findings.add("file-unreadable", why, file=file)
                continue
            if stat.S_ISREG(found.st_mode):
                files[file] = found.st_size
            else:
                # Opening a pipe would block.
                findings.add("file-unreadable", "it is not a regular file", file=file)
    except OSError as error:
        raise UsageError(f"it cannot be listed ({error.strerror})", path=path) from error
    for file in files:
        if any(_LEFTOVER.search(part) for part in file.split("/")):
            findings.add(
                "leftover",
                "a save, a download or a conversion that did not finish left it",
                file=file,
                hint="Repeat the interrupted step, or delete the file if it is not needed.",
            )
    findings.checked.append(f"{counted(len(files), 'file')} listed")
    return Directory(path, dict(sorted(files.items())))


def _below(path: Path) -> Iterator[str]:
    """The files below a directory, by their relative paths."""
    if not is_near(path):
        entries = (entry for entry in path.rglob("*") if entry.is_file())
        yield from sorted(entry.relative_to(path).as_posix() for entry in entries)
        return
    for folder, folders, names in os.walk(path, onerror=_refuse):
        folders[:] = sorted(set(folders) - _PASSED_OVER)
        for name in sorted(names):
            yield (Path(folder) / name).relative_to(path).as_posix()


def _refuse(error: OSError) -> None:
    raise error


def read_object(
    directory: Directory, file: str, kind: str, findings: Findings
) -> dict[str, Any] | None:
    """The object in a JSON file; None, and a problem of ``kind``, if there is none."""
    try:
        value, repeated = parse_json(content_of(directory.path / file).decode())
    except OSError as error:
        findings.add("file-unreadable", f"cannot be read ({error.strerror})", file=file)
        return None
    except (ValueError, RecursionError) as error:
        findings.add(kind, f"it is not JSON ({error})", file=file)
        return None
    if not isinstance(value, dict):
        findings.add(kind, f"it holds a JSON {type(value).__name__}, not an object", file=file)
        return None
    for key in repeated:
        findings.add("duplicate-key", f"it contains {key!r} twice", file=file)
    return value
