"""All or nothing: an output directory appears complete, or not at all.

Owns the partial directory beside the output, the syncing of what is not tensor data, and the one rename
that publishes. An existing output is exchanged with the new one in a single step where the file system
can do that, and only then removed. A partial directory that holds proven work outlives a failure, so
that another run can go on with it. Knows nothing of what the files are.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ckpt_tools.errors import CkptError, OutputExists, OutputFailed, UsageError

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def check_target(target: Path, sources: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse an output that would destroy something.

    Raises:
        OutputExists: it exists, is not an empty directory, and ``overwrite`` was not given.
        UsageError: it holds one of ``sources``, or is no directory.
    """
    resolved = target.resolve()
    for source in sources:
        if source.resolve().is_relative_to(resolved) and target.exists():
            raise UsageError(
                f"replacing it would delete the input {source}",
                path=target,
                hint="Name another output; inputs are never changed or deleted.",
            )
    if target.is_symlink() and not target.exists():
        raise UsageError("it is a link that leads nowhere", path=target)
    if target.exists() and not target.is_dir():
        raise OutputExists("it exists and is not a directory", path=target)
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise OutputExists(
            "the output exists already",
            path=target,
            hint="Name another one, or pass --overwrite: it is replaced once the new one is complete.",
        )


def leftovers(target: Path) -> list[Path]:
    """Partial directories that runs to the same output left when they were killed."""
    final = _final(target)
    if not final.parent.is_dir():
        return []
    return sorted(final.parent.glob(f"{_escaped(final.name)}.partial-*"))


def check_room(target: Path, nbytes: int) -> None:
    """Raise OutputFailed if the disk of ``target`` has less than ``nbytes`` left."""
    parent = _final(target).parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise OutputFailed(
            f"the output needs {nbytes / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB left",
            path=target,
            hint="Free some room, or name an output on another disk.",
        )


@dataclass
class Partial:
    """A directory on its way to its final name.

    Attributes:
        home: a directory beside the final one, which holds it and whatever else the run needs.
        path: the directory itself, within.
        keep: whether it stays when the run fails, for another run to go on with.
    """

    home: Path
    keep: bool = False

    @property
    def path(self) -> Path:
        """The directory that will be published."""
        return self.home / "output"


@contextmanager
def partial_directory(
    target: Path, *, overwrite: bool, resume: Path | None = None
) -> Iterator[Partial]:
    """A directory that becomes ``target`` when the block ends without an error.

    When it ends with one, what was made is removed, and nothing else; or it is kept, where the block
    asked for it, and the error's hint says how to go on. Everything in the directory, and the directory,
    is on disk before the rename.

    Args:
        target: the directory to make.
        overwrite: whether an existing one is replaced.
        resume: the home of an earlier run's directory, to go on with.

    Raises:
        OutputFailed: it cannot be made, synced or renamed.
        OutputExists: ``target`` appeared in the meantime and ``overwrite`` was not given.
    """
    final = _final(target)
    home = resume or final.with_name(f"{final.name}.partial-{secrets.token_hex(4)}")
    partial = Partial(home, keep=resume is not None)
    missing = [path for path in (final.parent, *final.parent.parents) if not path.exists()]
    try:
        # Within, so that nothing is left by a signal that comes as soon as it is made.
        if resume is None:
            _make(partial)
        yield partial
        try:
            _sync_tree(partial.path)
            _publish(partial.path, final, overwrite=overwrite)
            sync_directory(final.parent)
        except OSError as error:
            raise OutputFailed(f"cannot be put in place ({error.strerror})", path=target) from error
        shutil.rmtree(home, ignore_errors=True)
    except BaseException as error:
        if partial.keep and partial.path.exists():
            if isinstance(error, CkptError):
                error.hint = " ".join(filter(None, (error.hint, how_to_go_on(home))))
            raise
        shutil.rmtree(home, ignore_errors=True)
        _remove_empty(missing)
        raise


def how_to_go_on(partial: Path) -> str:
    """What to do about a partial directory that was kept, for a person."""
    return f"What was done is kept: the same command with --resume goes on; or delete {partial}."


def _final(target: Path) -> Path:
    """Where the directory is to be: behind links, so that a link stays one."""
    return target.resolve()


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _make(partial: Partial) -> None:
    try:
        partial.home.parent.mkdir(parents=True, exist_ok=True)
        partial.home.mkdir()
        partial.path.mkdir()
    except OSError as error:
        raise OutputFailed(
            f"cannot be made ({error.strerror})", path=partial.home, hint="Check the permissions."
        ) from error


def _remove_empty(directories: Sequence[Path]) -> None:
    for directory in directories:
        try:
            directory.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            return


def _publish(partial: Path, final: Path, *, overwrite: bool) -> None:
    try:
        os.rename(partial, final)  # also takes the place of an empty directory
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if not overwrite:
        raise OutputExists("it appeared while the output was written", path=final)
    # Under another name: what an exchange brings back must never be taken for this run's work.
    complete = partial.with_name(f"complete-{secrets.token_hex(4)}")
    os.rename(partial, complete)
    try:
        old = _replace(complete, final)
    except OSError:
        os.rename(complete, partial)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _replace(complete: Path, final: Path) -> Path:
    """Put a directory in the place of another; gives where the other is now."""
    if _exchange(complete, final):
        return complete
    # Without an exchange there is a moment with no output; the old one keeps its bytes.
    old = final.with_name(f"{final.name}.replaced-{secrets.token_hex(4)}")
    os.rename(final, old)
    try:
        os.rename(complete, final)
    except OSError:
        os.rename(old, final)
        raise
    return old


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directories in one step; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    arguments = (_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    if renameat2(*arguments) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _sync_tree(directory: Path) -> None:
    for root, _, names in os.walk(directory):
        for name in names:
            _sync_file(Path(root, name))
        sync_directory(Path(root))


def _sync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on disk; raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
