"""Owns the comparison of a directory with a checkpoint: the expected value of each tensor.

If the manifest has a recipe for a tensor, the recipe is followed. Otherwise the tensor of the same name is
expected, after wrappers, PEFT's names and the hub layout are resolved, rounded to the directory's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from ckpt_tools.errors import CkptError, listed, tensors
from ckpt_tools.model.matching import Side, alike, match, side_of
from ckpt_tools.readers.containers.weight_files import read_weight_files
from ckpt_tools.readers.opening import open_weights
from ckpt_tools.storage.naming import as_path
from ckpt_tools.tensors.catalogue import Catalogue, FlatRange, Fragment, Stored, Tensor
from ckpt_tools.tensors.checkpoint import Checkpoint
from ckpt_tools.tensors.derived import cast
from ckpt_tools.tensors.threads import default_workers
from ckpt_tools.verification.bitwise import Expected, Held, Progress, compare
from ckpt_tools.verification.container import Entry
from ckpt_tools.verification.directory import MANIFEST, Directory
from ckpt_tools.verification.model import written_ties
from ckpt_tools.verification.problem import Findings
from ckpt_tools.verification.replay import Record, read_record, replay
from ckpt_tools.verification.run import Run

ORDER = 80
_OTHER = "Check that the directory was made from this checkpoint."
_ANEW = (
    "Write the directory again from this checkpoint, or name the checkpoint that it was made from."
)


def check(run: Run) -> None:
    """Compare the directory with the checkpoint of the request, if there is one."""
    if run.checkpoint is not None:
        check_against(
            run.directory,
            run.checkpoint,
            run.findings,
            ties=written_ties(run.directory, run.reference),
            workers=run.request.workers,
            progress=run.request.progress,
        )


def check_against(
    directory: Directory,
    checkpoint: str | Path | Checkpoint,
    findings: Findings,
    *,
    ties: Mapping[str, str] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Compare a directory with a checkpoint of any format.

    Args:
        directory: the directory, its headers read.
        checkpoint: the source of the directory, or a checkpoint that should be equal.
        findings: takes the problems.
        ties: second names of tied tensors in the directory, each with its first name.
        workers: threads; by default one for each processor, up to 16.
        progress: called with bytes done and bytes in all, from any thread.

    Raises:
        CkptError: the checkpoint cannot be opened.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_weights(as_path(checkpoint))
    parts = [_Part("", "model", _held(directory, directory.tensors, findings), ties or {})]
    for folder, entries in directory.adapters.items():
        parts.append(_Part(folder, "adapter", _held(directory, entries, findings), {}))
    expected: list[Expected] = []
    for part in parts:
        if part.held:
            expected += _Question(directory, part, checkpoint, findings).expected()
    count = workers or default_workers()
    compare(directory, expected, findings, count, progress)
    if expected:
        findings.checked.append(
            f"{tensors(len(expected))} against {checkpoint.title} {checkpoint.location.directory}, "
            "bit for bit"
        )


# -- the expected tensors --------------------------------------------------------------------------


class _Part(NamedTuple):
    """One model or adapter of the directory."""

    folder: str
    kind: str
    held: Mapping[str, Held]
    ties: Mapping[str, str]

    @property
    def catalogue(self) -> Catalogue:
        """Its tensors."""
        return Catalogue({name: held.tensor for name, held in self.held.items()})


def _held(
    directory: Directory, entries: Mapping[str, Entry], findings: Findings
) -> dict[str, Held]:
    """The tensors whose bytes are complete. Other checks report the others."""
    pickled: dict[str, Mapping[str, Tensor]] = {}
    held: dict[str, Held] = {}
    unknown = []
    for name, entry in entries.items():
        if entry.file.endswith(".bin"):
            if entry.file not in pickled:
                pickled[entry.file] = _pickled(directory.path / entry.file)
            tensor = pickled[entry.file].get(name)
            if tensor is not None:
                held[name] = Held(entry, tensor)
        elif entry.dtype is None:
            unknown.append(name)
        elif math.prod(entry.shape) * entry.dtype.itemsize == entry.nbytes:
            numel = math.prod(entry.shape)
            run = Fragment(directory.path / entry.file, entry.start, FlatRange(0, numel))
            stored = Stored(entry.dtype, entry.shape, [run] if numel else [])
            held[name] = Held(entry, stored)
    if unknown:
        findings.skipped.append(f"tensors of a dtype that torch does not have: {listed(unknown)}")
    return held


def _pickled(path: Path) -> dict[str, Tensor]:
    try:
        found = read_weight_files(path)
    except (CkptError, OSError):
        return {}
    seconds = {alias: found.tensors[kept] for alias, kept in found.ties.items()}
    return {**found.tensors, **seconds}


@dataclass
class _Question:
    """The expected tensors of one part, from one checkpoint."""

    directory: Directory
    part: _Part
    checkpoint: Checkpoint
    findings: Findings

    @cached_property
    def record(self) -> Record | None:
        """The record of the manifest, if there is one."""
        return read_record(self.directory.path / self._file(MANIFEST))

    def _file(self, name: str) -> str:
        return f"{self.part.folder}/{name}" if self.part.folder else name

    def expected(self) -> list[Expected]:
        """The expected tensors. Tensors that cannot be compared are added to the findings."""
        if self.record is None:
            return list(self._by_name(self.part.held, {}))
        done = replay(self.record, self.checkpoint, self.part.held)
        for name, reason in done.broken.items():
            self._add("cannot-replay", f"its recipe cannot be followed: {reason}", name)
        for reason, names in done.absent.items():
            self.findings.add(
                "against-unchecked",
                f"{tensors(len(names))} could not be compared because another source is missing ({reason}): "
                f"{listed(names)}",
                file=self._file(MANIFEST),
                hint="Restore that source, and run verify again.",
            )
        found = [
            each
            for name, tensor in done.tensors.items()
            if (each := self._expected(name, tensor)) is not None
        ]
        # If the directory was changed later, the manifest may not list every tensor.
        left = {n: h for n, h in self.part.held.items() if n not in self.record.recipes}
        left |= {name: self.part.held[name] for name in done.elsewhere}
        return [*found, *self._by_name(left, done.elsewhere)]

    def _by_name(self, held: Mapping[str, Held], reasons: Mapping[str, str]) -> Iterator[Expected]:
        """The expected tensors by name. Tensors of one side only are added to the findings.

        Args:
            held: the tensors to find.
            reasons: for tensors with a recipe, why the recipe failed.
        """
        if not held:
            return
        here = self.directory.path / self.part.folder
        kind: str = self.part.kind
        side = Side("the directory", (self.part.catalogue,), here, kind)  # type: ignore[arg-type]
        side, other = alike(side, side_of(self.checkpoint, "the checkpoint", "master"))
        (there,) = other.copies
        matched = match(Catalogue({n: h.tensor for n, h in held.items()}), there)
        if not matched.pairs and not self.record:
            self._add(
                "checkpoint-other",
                f"no tensor name is in both: the directory has {next(iter(held))}, "
                f"the checkpoint {next(iter(there), 'nothing')}",
            )
            return
        found = {name: tensor for name, (_, tensor) in matched.pairs.items() if name in held}
        for name in matched.only_first:
            first = self.part.ties.get(name, "")
            if first in found:
                found[name] = found[first]
            elif name in reasons:
                self._add("cannot-replay", reasons[name], name)
            else:
                self._add("tensor-extra", "the checkpoint does not have this tensor", name)
        for name, tensor in found.items():
            if (each := self._expected(name, tensor)) is not None:
                yield each
        if not self.record:
            self._note_missing(there, matched.only_second)

    def _note_missing(self, there: Catalogue, names: Sequence[str]) -> None:
        kinds = {id(w.master or w.model): w.kind for w in self.checkpoint.weights.values()}
        for name in names:
            is_buffer = kinds.get(id(there[name])) == "buffer"
            self.findings.add(
                "tensor-missing",
                "the checkpoint has this tensor, the directory does not",
                tensor=name,
                hint=_OTHER,
                severity="warning" if is_buffer else None,
            )

    def _expected(self, name: str, tensor: Tensor) -> Expected | None:
        """The expected tensor; None, and a problem, if shape or dtype differ."""
        held = self.part.held[name]
        if tensor.shape != held.tensor.shape:
            detail = (
                f"its shape is {list(held.tensor.shape)}; the checkpoint gives {list(tensor.shape)}"
            )
            self._add("tensor-differs", detail, name)
            return None
        rounded = cast(tensor, held.tensor.dtype) if held.tensor.dtype.is_floating else tensor
        if rounded.dtype != held.tensor.dtype:
            detail = f"its dtype is {held.tensor.dtype}; the checkpoint has {tensor.dtype}"
            self._add("tensor-differs", detail, name)
            return None
        return Expected(held, rounded, tensor.dtype, self._hint())

    def _hint(self) -> str:
        """The likely reason, from the manifest."""
        record, step = self.record, self.checkpoint.step
        if record is not None and record.step is not None and step not in (None, record.step):
            return f"The directory was made from step {record.step:,}; the checkpoint is step {step:,}."
        return _ANEW

    def _add(self, kind: str, detail: str, name: str | None = None) -> None:
        held = None if name is None else self.part.held.get(name)
        file = None if held is None else held.entry.file
        self.findings.add(kind, detail, file=file, tensor=name, hint=_OTHER)
