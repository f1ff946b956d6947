"""Owns the publication of an output directory: it appears complete, or not at all.

The output is written to a partial directory beside the target, synced, and renamed once. An existing output
is exchanged with the new one in a single step, if the file system supports that, and then removed. A
partial directory with proven work is kept after a failure, so that another run can resume it.
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
from ckpt_tools.storage.replaced import NEW, OLD, PARTIAL, how_to_restore
from ckpt_tools.text import nbytes_text

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_ANOTHER = "Name another output."


def check_target(target: Path, sources: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse an output that would destroy something.

    Raises:
        OutputExists: it exists, is not an empty directory, and ``overwrite`` was not given; or a run was
            killed while it replaced it.
        UsageError: it holds one of ``sources``, or is a broken link.
        OutputFailed: it would lie below a file.
    """
    resolved = target.resolve()
    for source in sources:
        if source.resolve().is_relative_to(resolved) and target.exists():
            raise UsageError(
                f"replacing it would delete the input {source}",
                path=target,
                hint=f"{_ANOTHER} Inputs are never changed or deleted.",
            )
    restore = how_to_restore(target)
    if restore is not None:
        raise OutputExists(
            "the output is absent, and a run that was stopped has left it under another name",
            path=target,
            hint=restore,
        )
    if target.is_symlink() and not target.exists():
        raise UsageError("it is a broken link", path=target, hint=_ANOTHER)
    if target.exists() and not target.is_dir():
        raise OutputExists("it exists and is not a directory", path=target, hint=_ANOTHER)
    for above in resolved.parents:
        if above.exists():
            if not above.is_dir():
                raise OutputFailed("a folder of the output is a file", path=above, hint=_ANOTHER)
            break
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise OutputExists(
            "the output exists already",
            path=target,
            hint="Name another output, or pass --overwrite. It is replaced once the new output is complete.",
        )


def leftovers(target: Path) -> list[Path]:
    """Partial directories of earlier runs to the same output that were killed."""
    final = _final(target)
    if not final.parent.is_dir():
        return []
    return sorted(final.parent.glob(f"{_escaped(final.name)}{PARTIAL}*"))


def check_room(target: Path, nbytes: int) -> None:
    """Raise OutputFailed if the disk of ``target`` has less than ``nbytes`` left."""
    parent = _final(target).parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise OutputFailed(
            f"the output needs {nbytes_text(nbytes)} and its disk has {nbytes_text(free)} left",
            path=target,
            hint="Free some space, or name an output on another disk.",
        )


@dataclass
class Partial:
    """A directory before its final rename.

    Attributes:
        home: a directory beside the final one, with the output and the journal.
        path: the output directory in it.
        keep: whether it is kept after a failure, so that another run can resume it.
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

    If the block ends with an error, everything that was made is removed. If the block set ``keep``, it is
    kept and the error's hint says how to resume. The directory and its content are on disk before the rename.

    Args:
        target: the directory to make.
        overwrite: whether an existing directory is replaced.
        resume: the home of an earlier run's directory, to resume.

    Raises:
        OutputFailed: it cannot be made, synced or renamed.
        OutputExists: ``target`` appeared in the meantime and ``overwrite`` was not given.
    """
    final = _final(target)
    home = resume or final.with_name(f"{final.name}{PARTIAL}{secrets.token_hex(4)}")
    partial = Partial(home, keep=resume is not None)
    missing = [path for path in (final.parent, *final.parent.parents) if not path.exists()]
    try:
        # Inside the try block, so that a signal right after this call leaves nothing.
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
    """The hint about a partial directory that was kept."""
    return f"The finished part is kept. Run the same command with --resume, or delete {partial}."


def _final(target: Path) -> Path:
    """The final path, with links resolved, so that a link stays a link."""
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
            f"cannot be made ({error.strerror})",
            path=partial.home,
            hint="Check the permissions, or name an output on another disk.",
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
    # Another name, so that the old output is never taken for this run's output after an exchange.
    complete = partial.with_name(f"{NEW}{secrets.token_hex(4)}")
    os.rename(partial, complete)
    try:
        old = _replace(complete, final)
    except OSError:
        os.rename(complete, partial)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _replace(complete: Path, final: Path) -> Path:
    """Replace a directory with another. Returns the new path of the old one."""
    if _exchange(complete, final):
        return complete
    # Without an exchange, the output is absent for a moment. The old one keeps its bytes.
    old = final.with_name(f"{final.name}{OLD}{secrets.token_hex(4)}")
    try:
        os.rename(final, old)
        os.rename(complete, final)
    except BaseException:
        if not final.exists():
            os.rename(old, final)
        raise
    return old


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directories in one step; False if the system cannot."""
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
