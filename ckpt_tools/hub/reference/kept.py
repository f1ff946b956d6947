"""Owns the cache on disk of what child processes answer, so that a second command does not ask again.

An entry is used only if nothing that made it changed: the question, the interpreter, the installed packages
with their versions, and the files of transformers, PEFT and this package that the child imported. A child
names these files where its answer may be kept; it names none where custom code ran or something failed.

An entry begins with a digest of the rest, and is put in place by one rename. So a damaged entry, or one that
another process is writing, is not used. The cache is never needed: where it cannot be read or written, the
child is asked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ckpt_tools._version import __version__
from ckpt_tools.hub.reference import process

VARIABLE = "CKPT_TOOLS_CACHE"
OFF = "off"
# The answer for a model of 100,000 tensors takes 10 MB.
LIMIT_BYTES = 64 << 20
_FOLDER = "answers"
_UNFINISHED = ".unfinished-"
_UNFINISHED_SECONDS = 3600
_INSTALLED = (".dist-info", ".egg-info", ".egg-link")


def ask(module: str, question: str, library: str = "transformers") -> dict[str, Any]:
    """The answer of :func:`ckpt_tools.hub.reference.process.ask`, kept on disk where the child allows it.

    Raises:
        CkptError: the child failed.
    """
    folder = _folder()
    if folder is None:
        return process.ask(module, question, library)
    key = _key(module, question)
    path = folder / f"{key}.json"
    answer = _read(path, key)
    if answer is None:
        answer = process.ask(module, question, library)
        if "files" in answer:
            _write(path, key, answer)
    return answer


@contextlib.contextmanager
def switched_off() -> Iterator[None]:
    """Neither read nor write the cache in this process."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = OFF
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def _folder() -> Path | None:
    """The directory of the entries; None if there is to be none, or if others may write into it."""
    named = os.environ.get(VARIABLE)
    if named is not None and named in ("", OFF):
        return None
    try:
        folder = (_default() if named is None else Path(named)) / _FOLDER
        if not folder.is_absolute() and named is None:
            return None  # without a home directory
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError, ValueError):
        return None
    is_private = found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if is_private else None


def _default() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("ckpt-tools")


def _key(module: str, question: str) -> str:
    """A digest of the question and of what decides which libraries answer it."""
    made_with = {
        "ckpt-tools": __version__,
        "module": module,
        "question": question,
        "python": [sys.executable, sys.version, os.environ.get("PYTHONPATH")],
        "installed": _installed(),
    }
    return hashlib.sha256(json.dumps(made_with).encode()).hexdigest()


def _installed() -> list[str]:
    """The installed distributions: the names of their records, which hold their versions."""
    found: set[str] = set()
    for place in sys.path:
        with contextlib.suppress(OSError):
            found.update(name for name in os.listdir(place or ".") if name.endswith(_INSTALLED))
    return sorted(found)


def _read(path: Path, key: str) -> dict[str, Any] | None:
    """The answer of an entry; None if there is none, if it is damaged, or if a file changed since."""
    try:
        digest, _, body = path.read_bytes().partition(b"\n")
        if digest != _digest(body):
            return None
        entry = json.loads(body)
        answer = entry["answer"]
        if entry["key"] != key or not all(_is_unchanged(*each) for each in answer["files"]):
            return None
        os.utime(path)  # what was used last is removed last
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return answer if isinstance(answer, dict) else None


def _is_unchanged(path: str, size: int, modified: int) -> bool:
    found = os.stat(path)
    return (found.st_size, found.st_mtime_ns) == (size, modified)


def _write(path: Path, key: str, answer: dict[str, Any]) -> None:
    body = json.dumps({"key": key, "answer": answer}).encode()
    content = _digest(body) + b"\n" + body
    if len(content) > LIMIT_BYTES:
        return
    with contextlib.suppress(OSError):
        # Made with mode 0600.
        fd, name = tempfile.mkstemp(prefix=_UNFINISHED, dir=path.parent)
        try:
            with os.fdopen(fd, "wb") as stream:
                stream.write(content)
            os.replace(name, path)
        except OSError:
            os.unlink(name)
            raise
        _make_room(path.parent)


def _make_room(folder: Path) -> None:
    """Remove the entries that were not used for the longest time, and what a killed process left."""
    entries = []
    for entry in os.scandir(folder):
        # Another process may remove it meanwhile.
        with contextlib.suppress(FileNotFoundError):
            found = entry.stat()
            entries.append((found.st_mtime, found.st_size, entry.path, entry.name))
    room = LIMIT_BYTES
    for modified, size, path, name in sorted(entries, reverse=True):
        is_left = name.startswith(_UNFINISHED)
        room -= size
        if time.time() - modified > _UNFINISHED_SECONDS if is_left else room < 0:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()
