"""Owns what is known of the outputs of a run: which saves were converted, told by the files in OUT alone.

Each output has its manifest, which names the checkpoint it was made of. When the command of ``--exec`` has
ended, a record ``NAME.done`` is written beside the output: programs may wait for it. It stays when the output
is removed, so no save is converted twice. One process at a time works in OUT.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ckpt_tools.conversion.completeness import read_manifest
from ckpt_tools.conversion.watching.saves import Save
from ckpt_tools.errors import OutputFailed, UsageError
from ckpt_tools.writing.manifest import NAME as MANIFEST
from ckpt_tools.writing.publish import leftovers

_SUFFIX = ".done"
_LOCK = ".watch.lock"
_REMOVED = ".removed-"


@dataclass(frozen=True)
class Record:
    """What was done with one save.

    Attributes:
        checkpoint: the save.
        output: the directory that was made of it, by name.
        step: the step that the checkpoint states.
        saved: the signature of the save's files, as they were converted.
        status: exit status of the command that was run after it; None without a command.
    """

    checkpoint: str
    output: str
    step: int | None
    saved: str
    status: int | None


class Records:
    """The outputs of a run and the records beside them.

    Args:
        out: the directory that holds them.
    """

    def __init__(self, out: Path) -> None:
        self.out = out

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only process that works in OUT.

        Raises:
            UsageError: another process does.
            OutputFailed: OUT cannot be made.
        """
        path = self.out / _LOCK
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OutputFailed(f"cannot be made ({error.strerror})", path=path) from error
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(
                    "another ckpt-tools watch works in it",
                    path=self.out,
                    hint="Wait for that process, stop it, or name another output.",
                ) from error
            except OSError:
                pass  # a file system without locks
            self._clear_removed()
            yield
        finally:
            os.close(fd)

    def target(self, save: Save) -> Path:
        """The output of a save."""
        return self.out / save.name

    def of(self, save: Save) -> Record | None:
        """The record of a save; None if it was not written, or cannot be read."""
        try:
            return Record(**json.loads((self.out / f"{save.name}{_SUFFIX}").read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def is_written(self, save: Save) -> bool:
        """Whether the output of a save is there, by the manifest that it has."""
        target = self.target(save)
        manifests = [*target.glob(MANIFEST), *target.glob(f"*/{MANIFEST}")]
        return bool(manifests) and all(_is_of(read_manifest(path), save) for path in manifests)

    def write(self, record: Record) -> None:
        """Write a record; it appears whole.

        Raises:
            OutputFailed: the disk refused.
        """
        path = self.out / f"{record.output}{_SUFFIX}"
        new = self.out / f".{path.name}-{secrets.token_hex(4)}"
        try:
            new.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
            new.replace(path)
        except OSError as error:
            raise OutputFailed(f"cannot be written ({error.strerror})", path=path) from error

    def surplus(self, saves: Sequence[Save], keep: int) -> list[Save]:
        """The saves whose outputs are there beyond the newest ``keep``, oldest first.

        Only an output counts that has a record and the manifest of its save.
        """
        there = [s for s in saves if self.of(s) is not None and self.target(s).is_dir()]
        return [s for s in there[: max(len(there) - keep, 0)] if self.is_written(s)]

    def names(self) -> list[str]:
        """The saves that have a record."""
        return [path.name.removesuffix(_SUFFIX) for path in sorted(self.out.glob(f"*{_SUFFIX}"))]

    def forget_parts(self, save: Save) -> None:
        """Remove what stopped conversions of a save have left."""
        for part in leftovers(self.target(save)):
            shutil.rmtree(part, ignore_errors=True)

    def _clear_removed(self) -> None:
        for path in self.out.glob(f".*{_REMOVED}*"):
            shutil.rmtree(path, ignore_errors=True)


def remove_whole(path: Path) -> None:
    """Rename a directory to a hidden name beside it, then remove it.

    Raises:
        OutputFailed: the system refused.
    """
    hidden = path.with_name(f".{path.name}{_REMOVED}{secrets.token_hex(4)}")
    try:
        path.rename(hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        raise OutputFailed(
            f"cannot be removed ({error.strerror})",
            path=path,
            hint="Check the permissions, and remove it by hand.",
        ) from error


def _is_of(content: object, save: Save) -> bool:
    """Whether a manifest says that the output was made of a save; the run may have moved since."""
    try:
        path = content["sources"][0]["path"]  # type: ignore[index]
    except (TypeError, KeyError, IndexError):
        return False
    return isinstance(path, str) and save.name in Path(path).parts
