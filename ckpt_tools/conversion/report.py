"""The report of a conversion: the value that the library returns and the command line prints.

Owns its JSON form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Report:
    """A conversion.

    Attributes:
        checkpoint: directory that was read.
        output: directory that was written; the address of one that was uploaded.
        source: what the checkpoint is, for a person.
        step: optimizer step, where known.
        world_size: ranks that wrote the checkpoint, where known.
        framework: what wrote it.
        weights: ``master`` or ``model``: which copy was taken.
        dtypes: dtype name to number of elements in the output.
        tensors: number of tensors written.
        parameters: number of elements written.
        files: name to size in bytes of every output file.
        bytes_read: tensor bytes read from the checkpoint.
        bytes_written: bytes of all output files.
        checked: how many tensors' masters were compared with the 16-bit weights.
        seconds: ``read``, ``check``, ``plan`` and ``write``; of the last, ``move`` and ``sync``;
            and ``total``.
        checksums: source bytes that were compared with a checksum of their file (``checked``), that were not
            because only a part of their record was read (``partly``), or that have none (``without``).
        notes: what was decided or changed.
        warnings: what to look at.
        dry_run: nothing was written.
        complete: the output was complete before, by the same request; nothing was read or written.
        plan: of a dry run, each weight file with its bytes and tensors.
    """

    checkpoint: Path
    output: Path | str
    source: str
    step: int | None
    world_size: int | None
    framework: str | None
    weights: str
    dtypes: Mapping[str, int]
    tensors: int
    parameters: int
    files: Mapping[str, int]
    bytes_read: int
    bytes_written: int
    checked: int
    seconds: Mapping[str, float]
    checksums: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    dry_run: bool = False
    complete: bool = False
    plan: tuple[Mapping[str, Any], ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        data = asdict(self)
        data["checkpoint"], data["output"] = str(self.checkpoint), str(self.output)
        data["seconds"] = {key: round(value, 3) for key, value in self.seconds.items()}
        if not self.dry_run:
            del data["plan"]
        return data
