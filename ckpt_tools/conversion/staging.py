"""Owns the folder on this machine in which an output is made that is uploaded then.

Its name follows from the address, so that a later run with ``--resume`` finds what an earlier one left. So
two runs to one address have one folder, and a lock lets only one of them work in it: otherwise one would
upload what the other has half written.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from ckpt_tools.errors import OutputFailed, UsageError


@contextlib.contextmanager
def alone_in(home: Path) -> Iterator[None]:
    """Make a folder, be the only process that works in it, and remove it at the end if it is empty.

    Raises:
        UsageError: another run works in it, or it belongs to another user.
        OutputFailed: it cannot be made.
    """
    try:
        lock = _locked(home)
    except OSError as error:
        raise OutputFailed(
            f"the folder for an upload cannot be made ({error.strerror})",
            path=home,
            hint="Name another folder with --scratch.",
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            home.rmdir()
        os.close(lock)


def _locked(home: Path) -> int:
    """A descriptor of the folder that holds its lock."""
    while True:
        home.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            home.mkdir(mode=0o700)
        try:
            lock = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # A run that ended has removed it.
        try:
            _take(lock, home)
            # A run that ended may have removed it before it was locked here.
            if home.exists() and os.path.samestat(os.fstat(lock), home.stat()):
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _take(lock: int, home: Path) -> None:
    if os.fstat(lock).st_uid != os.geteuid():
        raise UsageError(
            "the folder for an upload belongs to another user",
            path=home,
            hint="Name another folder with --scratch.",
        )
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            "another run to this address works there",
            path=home,
            hint="Wait for that run, stop it, or name another folder with --scratch.",
        ) from error
    except OSError:
        pass  # A file system without locks.
