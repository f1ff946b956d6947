"""The spine of every conversion: the order of things from checkpoints to a published directory.

    check the target -> read states and ask about the model -> check masters -> plan -> deliver -> report

Two modules make what is planned: :mod:`ckpt_tools.conversion.models` and
:mod:`ckpt_tools.conversion.extraction`. Everything that can be wrong with the input is found before the
partial directory is made.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from ckpt_tools.conversion.completeness import digest_of, held_complete, refuse_marker
from ckpt_tools.conversion.masters import check_masters, check_replicas
from ckpt_tools.conversion.report import Report
from ckpt_tools.conversion.request import Request
from ckpt_tools.errors import UnsafePickle, VerificationFailed, listed
from ckpt_tools.hub.links import home_of, refuse_any_leaving, refuse_leaving
from ckpt_tools.readers.containers.suspicion import suspicious
from ckpt_tools.storage.folders import folders_of
from ckpt_tools.storage.reading import is_near
from ckpt_tools.storage.residence import Residence
from ckpt_tools.storage.stamps import stamps_in
from ckpt_tools.tensors.ahead import reading_ahead
from ckpt_tools.tensors.catalogue import Tensor
from ckpt_tools.tensors.checkpoint import Checkpoint
from ckpt_tools.tensors.deferred import settle
from ckpt_tools.tensors.freeing import give_back
from ckpt_tools.tensors.threads import load_torch, threads_for
from ckpt_tools.verification import verify
from ckpt_tools.writing.bytes import Written
from ckpt_tools.writing.delivery import Delivered, deliver
from ckpt_tools.writing.manifest import Provenance
from ckpt_tools.writing.output import Output, Writing
from ckpt_tools.writing.publish import check_target, leftovers
from ckpt_tools.writing.source import Stamps


@dataclass(frozen=True)
class Planned:
    """What will be written, and what a person should know of it.

    Attributes:
        outputs: the planned directories.
        provenance: what they are made of.
        title: what they are made of, for a person; None where the checkpoint says it.
        notes: what was decided.
        warnings: what to look at.
    """

    outputs: tuple[Output, ...]
    provenance: Provenance
    title: str | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class Pending(Protocol):
    """The states of the sources, with questions about them that may not be answered yet."""

    @property
    def tensors(self) -> Iterable[Tensor]:
        """Tensors of the sources that may be read."""

    def plan(self) -> Planned:
        """Wait for the answers, and plan.

        Raises:
            CkptError: see :mod:`ckpt_tools.errors`.
        """


Prepare = Callable[[Sequence[Checkpoint], Request], Pending]


class Clock:
    """Seconds of each step, and in all."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, step: str) -> None:
        """End the step that is running and call it ``step``."""
        now = time.monotonic()
        self.laps |= {step: now - self._last, "total": now - self._started}
        self._last = now


def _refuse_links(outputs: Sequence[Output], request: Request) -> None:
    """Refuse files that would be copied from outside of their directory; a file that was named is no such."""
    for output in outputs:
        for asset in output.files:
            if asset.source is not None and str(asset.source) != request.generation_config:
                source = Path(os.fspath(asset.source))  # of several places the one that has it
                refuse_leaving(source, home_of(source, asset.name))


def run(sources: Sequence[Checkpoint], request: Request, prepare: Prepare, clock: Clock) -> Report:
    """Carry out a request.

    Args:
        sources: the checkpoints, opened.
        request: what is asked of them.
        prepare: how the catalogues of the outputs are made.
        clock: started when the sources were opened.

    Raises:
        CkptError: see :mod:`ckpt_tools.errors`; nothing was written.
    """
    asked = digest_of(sources, request)
    if request.skip_complete and (found := held_complete(request.output, asked)) is not None:
        return _as_it_is(sources[0], request, found, clock)
    if not request.dry_run:
        folders = [f for source in sources for f in folders_of(source.location.directory)]
        inputs = [*folders, *request.named_inputs]
        check_target(request.output, inputs, overwrite=request.overwrite)
    checks = _Checks()
    for source in sources:
        checks.see(source.stamps)
    for path in filter(is_near, request.named_inputs):
        checks.see(stamps_in(path))
    checks.add(file for source in sources for file in source.files)
    checks.refuse_changed()
    pending = prepare(sources, request)
    held = (file for source in sources for file in source.files)
    settle(pending.tensors, max(request.workers, threads_for(held)))
    residence = Residence()
    reads = not request.dry_run and not request.resume
    with reading_ahead(pending.tensors, residence) if reads else nullcontext():
        give_back()
        # The import takes seconds, and the answer about the model takes seconds too.
        load_torch()
        suspicions = _suspicions(sources, request)
        clock.lap("read")
        checked = _check_copies(sources, request)
        clock.lap("check")
        planned = pending.plan()
        # Of a model of 100,000 tensors the states and their catalogues take tens of megabytes.
        del pending
    planned = replace(planned, provenance=replace(planned.provenance, request=asked))
    refuse_marker(request.marker, planned.outputs)
    if not request.follow_links:
        _refuse_links(planned.outputs, request)
        for directory, files in planned.provenance.files_beside().items():
            refuse_any_leaving(files, [directory])
    clock.lap("plan")
    checks.add(planned.provenance.files())
    delivered = deliver(
        request.output, planned.outputs, request, planned.provenance, checks, residence
    )
    clock.lap("write")
    planned = replace(planned, warnings=(*suspicions, *planned.warnings))
    return _report(sources[0], request, planned, delivered, checked, clock)


def _check_copies(sources: Sequence[Checkpoint], request: Request) -> int:
    """Compare what a checkpoint holds twice; the number of masters that were compared with 16-bit weights."""
    checked = 0
    if request.weights == "master":
        checked = sum(
            check_masters(
                source,
                check_all_masters=request.check_all_masters,
                workers=request.workers,
                progress=request.active,
            )
            for source in sources
        )
    for source in sources:
        check_replicas(
            source,
            copy=request.weights,
            check_all_masters=request.check_all_masters,
            workers=request.workers,
        )
    return checked


def _suspicions(sources: Sequence[Checkpoint], request: Request) -> list[str]:
    """Warnings about what was asked for in vain, and about functions that no known framework writes.

    Raises:
        UnsafePickle: there are such, and the request is strict.
    """
    warnings = []
    if request.node_local and request.ranks is None:
        warnings.append(
            "--node-local had no effect: no torchrun started this command, so it reads the files of this "
            "machine alone"
        )
    for source in sources:
        for file, names in suspicious(source.files, source.location.directory).items():
            fact = f"it names functions that no known framework writes: {listed(names)}"
            if request.strict:
                raise UnsafePickle(
                    fact,
                    path=file,
                    hint="Nothing of it was run. Find out who wrote the file. Without --strict it is read "
                    "as data.",
                )
            warnings.append(f"{file}: {fact}; nothing of it was run")
    return warnings


class _Checks(Stamps):
    """The last checks of sources and output; see ``Checks`` of :mod:`ckpt_tools.writing.finishing`."""

    def refuse_wrong(self, directory: Path, writing: Writing) -> None:
        """Verify every byte of a directory that is about to appear.

        Raises:
            VerificationFailed: it is wrong.
        """
        verdict = verify(
            directory, read_data=True, workers=writing.workers, progress=writing.active
        )
        errors = verdict.errors
        if errors:
            first = errors[0]
            more = f", and {len(errors) - 1} more problems" if len(errors) > 1 else ""
            raise VerificationFailed(
                f"verify found the output wrong: {first.kind}: {first.detail}{more}",
                path=first.file,
                tensor=first.tensor,
                hint="Nothing was published. Write it without --verify, then run ckpt-tools verify "
                "on it for the whole list.",
            )


def dtype_counts(tensors: Iterable[Tensor]) -> dict[str, int]:
    """Number of elements of each dtype, by its name."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[str(tensor.dtype)] += tensor.numel
    return dict(counts)


def _report(
    source: Checkpoint,
    request: Request,
    planned: Planned,
    delivered: Delivered | None,
    checked: int,
    clock: Clock,
) -> Report:
    """What was done, or would be done."""
    outputs = planned.outputs
    tensors = [tensor for output in outputs for tensor in output.layout.tensors.values()]
    sizes = {name: nbytes for output in outputs for name, nbytes in output.sizes.items()}
    files = sizes if delivered is None else delivered.files
    written = Written() if delivered is None else delivered.written
    title = planned.title
    return Report(
        checkpoint=source.location.directory,
        output=request.output,
        source=title or source.title,
        step=source.step if title is None else None,
        world_size=source.world_size,
        framework=source.framework,
        weights=request.weights,
        dtypes=dtype_counts(tensors),
        tensors=len(tensors),
        parameters=sum(tensor.numel for tensor in tensors),
        files=files,
        bytes_read=written.bytes_read,
        bytes_written=0 if delivered is None else sum(files.values()),
        checked=checked,
        seconds=clock.laps | {"move": written.move_seconds, "sync": written.sync_seconds},
        checksums={} if delivered is None else asdict(delivered.checked),
        notes=planned.notes if delivered is None else (*planned.notes, *delivered.notes),
        warnings=(*map(_leftover, leftovers(request.output)), *planned.warnings),
        dry_run=request.dry_run,
        plan=tuple(file for output in outputs for file in output.listing())
        if request.dry_run
        else (),
    )


def _as_it_is(
    source: Checkpoint, request: Request, found: Mapping[str, int], clock: Clock
) -> Report:
    """The report of an output that is complete already."""
    clock.lap("read")
    return Report(
        checkpoint=source.location.directory,
        output=request.output,
        source=source.title,
        step=source.step,
        world_size=source.world_size,
        framework=source.framework,
        weights=request.weights,
        dtypes={},
        tensors=0,
        parameters=0,
        files=found,
        bytes_read=0,
        bytes_written=0,
        checked=0,
        seconds=clock.laps,
        complete=True,
    )


def _leftover(path: Path) -> str:
    return f"{path} was left by a run that was killed. --resume goes on with it; it can also be deleted."
