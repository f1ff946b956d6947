"""Owns the description of an output: one planned directory, and the options of its delivery.

:mod:`ckpt_tools.writing.delivery` carries them out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ckpt_tools.hub.files import AssetFile
from ckpt_tools.ranks import Ranks
from ckpt_tools.writing.layout import Plan

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Writing:
    """The options of a write.

    Attributes:
        workers: number of threads of each rank. The output does not depend on it.
        dry_run: plan and check everything, but write nothing.
        overwrite: replace an existing output once the new one is complete.
        progress: called with bytes done and bytes in all, from any thread.
        resume: continue an earlier run of the same request.
        sha256: write ``SHA256SUMS``, which ``sha256sum -c`` accepts.
        verify: verify every byte before the output is published.
        check_source: compare the bytes that are read with the checksums of their files.
        ranks: the ranks that carry out the same call together. Each of them must make the call.
        resumable: whether another run can continue after a failure.
        marker: name of a further file of each output, for programs that wait for one.
    """

    workers: int
    dry_run: bool = False
    overwrite: bool = False
    progress: Progress | None = None
    resume: bool = False
    sha256: bool = False
    verify: bool = False
    check_source: bool = True
    ranks: Ranks | None = None
    resumable: bool = True
    marker: str | None = None

    def active(self, *_: object) -> None:
        """Tell the waiting ranks that this one makes progress."""
        if self.ranks is not None:
            self.ranks.active()


@dataclass(frozen=True)
class Output:
    """One directory that is written.

    Attributes:
        folder: its path in the output; empty for the output itself.
        layout: its weights.
        files: its other files.
    """

    folder: str
    layout: Plan
    files: tuple[AssetFile, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by its path in the output."""
        sizes = self.layout.sizes | {file.name: file.nbytes for file in self.files}
        return {str(Path(self.folder, name)): nbytes for name, nbytes in sizes.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes.values())

    def listing(self) -> list[dict[str, object]]:
        """Its weight files and their tensors, for ``--dry-run``."""
        return [
            file | {"file": str(Path(self.folder, str(file["file"])))}
            for file in self.layout.listing()
        ]
