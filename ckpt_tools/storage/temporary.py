"""Owns temporary folders: each is removed at the end of its use, or by a later run if its process was killed.

A process holds a lock on each of its folders. The system releases the lock when the process ends in any way,
so a folder that can be locked belongs to nobody.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import weakref
from pathlib import Path
from types import TracebackType

PREFIX = "ckpt-tools-temp-"


class TemporaryFolder:
    """A new private folder. It is removed with this object, at exit, or by :func:`remove_all`.

    Attributes:
        path: where it is.
    """

    def __init__(self) -> None:
        import tempfile

        _remove_abandoned(Path(tempfile.gettempdir()))
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
            lock = _locked(self.path, wait=True)
            # Another process may have removed it before it was locked.
            if self.path.exists():
                break
            _release(lock)
        # A forked process has this object too, and must not remove the folder.
        self._remove = weakref.finalize(self, _remove, self.path, lock, os.getpid())
        _folders.add(self)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the folder and all files in it. A second call does nothing."""
        self._remove()


_folders: weakref.WeakSet[TemporaryFolder] = weakref.WeakSet()


def remove_all() -> None:
    """Remove the folders of this process, before it ends without the cleanup of the interpreter."""
    for folder in list(_folders):
        folder.remove()


def _remove(path: Path, lock: int | None, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)
        _release(lock)


def _remove_abandoned(home: Path) -> None:
    """Remove the folders of processes of this user that were killed."""
    for path in home.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
            lock = _locked(path, wait=False)
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                _release(lock)


def _locked(path: Path, *, wait: bool) -> int | None:
    """A descriptor that holds the lock of a folder.

    None if another process holds it, the folder is gone, or its file system has no locks. On such a file
    system no folder can be locked, so none is taken for an abandoned one.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _release(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)
