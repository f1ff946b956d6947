"""Owns the tensors and files of a finished directory, as a page lists them.

Reads headers and the manifest with the code of :mod:`ckpt_tools.verification`, which goes on after damage.
Values are read for statistics alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt_tools.analysis.statistics import Statistics, statistics_of
from ckpt_tools.cli.page.numbers import counts, numbers, shares, sizes, texts
from ckpt_tools.cli.page.parts import Column, Notice, Picture, Table
from ckpt_tools.cli.page.pictures import Size, of_dtypes, of_kinds, of_layers, of_norms
from ckpt_tools.errors import CkptError
from ckpt_tools.readers.opening import open_weights
from ckpt_tools.tensors.catalogue import Tensor
from ckpt_tools.verification.container import Entry
from ckpt_tools.verification.directory import Directory, Manifest, list_directory
from ckpt_tools.verification.layout import read_weights
from ckpt_tools.verification.manifest import read_manifests
from ckpt_tools.verification.problem import Findings

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Weights:
    """What a page shows of a finished directory.

    Attributes:
        directory: its listing.
        manifests: its manifests.
        statistics: of each tensor by file and name; None if no values were read.
        notices: why there are no statistics.
    """

    directory: Directory
    manifests: Sequence[Manifest]
    statistics: Mapping[tuple[str, str], Statistics] | None
    notices: Sequence[Notice]

    @property
    def entries(self) -> list[Entry]:
        """Every tensor."""
        return self.directory.every_tensor

    def pictures(self) -> list[Picture]:
        """What takes space, and the norms."""
        held = [
            # A damaged header may give a tensor less than no bytes.
            Size(self._called(e.file, e.name), dtype_text(e), max(e.nbytes, 0))
            for e in self.entries
        ]
        if not held:
            return []
        found = [of_dtypes(held), of_layers(held), of_kinds(held)]
        if self.statistics is not None:
            named = {self._called(*key): each for key, each in self.statistics.items()}
            found.append(of_norms(named))
        return [picture for picture in found if picture is not None]

    @staticmethod
    def _called(file: str, name: str) -> str:
        """A name that is unique among several adapters, each of which has a folder."""
        folder = file.rpartition("/")[0]
        return f"{folder}/{name}" if folder else name

    def tables(self) -> list[Table]:
        """The tensors, and the files."""
        tables = [self._tensors()] if self.entries else []
        return [*tables, self._files()] if self.directory.files else tables

    def _tensors(self) -> Table:
        entries = self.entries
        digests = {
            (file, name): digest
            for manifest in self.manifests
            for name, (file, digest) in manifest.tensors.items()
        }
        columns = [
            texts("tensor", [entry.name for entry in entries]),
            texts("dtype", [dtype_text(entry) for entry in entries]),
            Column(
                "shape",
                [shape_text(entry.shape) for entry in entries],
                [float(len(entry.shape)) for entry in entries],
            ),
            counts("values", [math.prod(entry.shape) for entry in entries]),
            sizes("size", [entry.nbytes for entry in entries]),
            *self._measured(entries),
            texts("file", [entry.file for entry in entries]),
        ]
        note = ""
        if digests:
            found = [digests.get((entry.file, entry.name), "") for entry in entries]
            columns.append(texts("XXH3-128", found))
            note = "Digests are those of the manifest; verify --read-data compares them with the bytes."
        return Table("Tensors", columns, note)

    def _measured(self, entries: Sequence[Entry]) -> list[Column]:
        if self.statistics is None:
            return []
        none = Statistics()
        held = [self.statistics.get((entry.file, entry.name), none) for entry in entries]
        return [
            numbers("min", [each.low for each in held]),
            numbers("max", [each.high for each in held]),
            numbers("norm", [each.norm if each.count else None for each in held]),
            counts("NaN", [each.nan for each in held]),
            *([counts("infinite", inf)] if any(inf := [each.inf for each in held]) else []),
            shares("zeros", [each.share_of_zeros for each in held]),
        ]

    def _files(self) -> Table:
        files = self.directory.files
        digests = {f: d for m in self.manifests for f, d in m.digests.items()}
        headers = {file for manifest in self.manifests for file in manifest.headers}
        columns = [texts("file", list(files)), sizes("size", files.values())]
        note = ""
        if digests:
            columns.append(texts("XXH3-128", [digests.get(file, "") for file in files]))
            if headers:
                note = "Of a file of weights, the digest covers the header. Each tensor has its own digest."
        return Table("Files", columns, note)


def read_directory(
    path: Path,
    *,
    statistics: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Weights:
    """Read headers and manifests, and every value for ``statistics``.

    Raises:
        UsageError: the directory cannot be listed.
    """
    ignored = Findings()  # verify reports them
    directory = list_directory(path, ignored)
    read_weights(directory, ignored)
    manifests = read_manifests(directory, ignored)
    if not statistics:
        return Weights(directory, manifests, None, ())
    try:
        tensors = _tensors_of(directory)
        found = statistics_of(tensors, workers=workers, progress=progress)
    except CkptError as error:
        why = Notice(
            "warning", "no statistics", error.fact, str(error.path or ""), error.hint or ""
        )
        return Weights(directory, manifests, None, (why,))
    return Weights(directory, manifests, found, _odd(found))


def _tensors_of(directory: Directory) -> dict[tuple[str, str], Tensor]:
    """The lazy tensors of the model and of every adapter, by file and name."""
    tensors: dict[tuple[str, str], Tensor] = {}
    parts = [("", directory.tensors)] if directory.tensors else []
    for folder, held in [*parts, *directory.adapters.items()]:
        if held:
            opened = open_weights(directory.path / folder)
            tensors |= {(e.file, e.name): opened[e.name] for e in held.values() if e.name in opened}
    return tensors


def _odd(found: Mapping[tuple[str, str], Statistics]) -> tuple[Notice, ...]:
    """A notice for tensors with NaN or infinity."""
    odd = [(key, each) for key, each in found.items() if each.nan or each.inf]
    if not odd:
        return ()
    (file, name), first = odd[0]
    more = f"; {len(odd) - 1:,} more tensors hold such values" if len(odd) > 1 else ""
    text = f"{first.nan:,} NaN and {first.inf:,} infinite of {first.count:,} values{more}"
    return (Notice("error", "NaN or infinity", text, f"{file}: {name}"),)


def dtype_text(entry: Entry) -> str:
    """The dtype's name in torch, or in safetensors where torch has none."""
    return str(entry.dtype) if entry.dtype is not None else entry.code


def shape_text(shape: Sequence[int]) -> str:
    """A shape: ``4,096 × 1,024``."""
    return " × ".join(f"{size:,}" for size in shape) or "scalar"
