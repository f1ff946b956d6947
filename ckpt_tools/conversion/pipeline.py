"""The pipeline: the only place where the order of things is decided.

    state -> find config -> ask for its model -> check masters -> fit to the model -> assets
        -> plan -> write -> publish

Everything that can be wrong with the input is found before the partial directory is made. Knows no
format, no byte layout and no command line.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from ckpt_tools import __version__, readers
from ckpt_tools.conversion.masters import check_masters
from ckpt_tools.conversion.report import Report
from ckpt_tools.hub import AssetFile, AssetOptions, Assets, ConfigSource, collect, find_config
from ckpt_tools.hub.card import CardFacts, model_card
from ckpt_tools.hub.config import of_attribute
from ckpt_tools.model.fit import Fitted, anticipate, fit_to_model
from ckpt_tools.model.state import DTypeChoice, State, cast_state, main_dtype, model_state
from ckpt_tools.storage.pool import folders_of
from ckpt_tools.tensors.catalogue import Catalogue, Tensor
from ckpt_tools.tensors.checkpoint import Checkpoint, Copy
from ckpt_tools.tensors.deferred import settle
from ckpt_tools.writing.bytes import Written
from ckpt_tools.writing.delivery import Delivered, deliver
from ckpt_tools.writing.layout import Plan, plan
from ckpt_tools.writing.manifest import NAME as MANIFEST
from ckpt_tools.writing.manifest import Provenance
from ckpt_tools.writing.output import Output, Writing
from ckpt_tools.writing.publish import check_target, leftovers


@dataclass(frozen=True)
class Request:
    """What is asked of one conversion; the arguments of the public functions, made ready.

    Attributes:
        attribute: the part of each source, and of the config, that is meant.
        combine: makes the one state that is written of the states of all sources.
        title: what the output is made of, for a person; that of the source where there is one.
        beside: further directories that are read, and so must not be replaced.
        command: the command, as it is typed.
        beside_tensors: those of them whose tensors are written too.
    """

    target: Path
    attribute: str | None
    combine: Callable[[Sequence[State]], State]
    title: str | None
    beside: tuple[Path, ...]
    dtype: DTypeChoice
    copy: Copy
    assets: AssetOptions
    max_shard_size: int | str
    weights_only: bool
    card: bool
    trust_remote_code: bool
    check_all_masters: bool
    writing: Writing
    command: str
    beside_tensors: Mapping[Path, Catalogue]


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


def run(sources: Sequence[Checkpoint], request: Request, clock: Clock) -> Report:
    """Carry out a conversion of one checkpoint, or of several that become one model.

    Raises:
        CkptError: see :mod:`ckpt_tools.errors`; nothing was written.
    """
    if not request.writing.dry_run:
        check_target(request.target, _inputs(sources, request), overwrite=request.writing.overwrite)
    states = [model_state(source, request.copy, request.attribute) for source in sources]
    state = request.combine(states)
    catalogue = cast_state(state, request.dtype)
    config = _config(request)
    finished = _like(request)
    like = None if finished is None else _like_catalogue(finished, request)
    if config is not None:
        anticipate(catalogue, config, like, main_dtype(catalogue), trust=request.trust_remote_code)
        import_module("torch")  # needed later and slow to import: while the answer is awaited
    for each in states:
        settle(each.catalogue.values(), request.writing.workers)
    clock.lap("read")
    checked = 0
    if request.copy == "master":
        checked = sum(
            check_masters(
                s,
                every_element=request.check_all_masters,
                workers=request.writing.workers,
                progress=request.writing.active,
            )
            for s in sources
        )
    clock.lap("check")
    fitted, assets = Fitted.unchecked(catalogue), Assets((), {}, (), ())
    if config is not None:
        trust = request.trust_remote_code
        fitted = fit_to_model(catalogue, config, like, main_dtype(catalogue), trust=trust)
        assets = _collect(request.assets, config, fitted)
    layout = plan(fitted.catalogue, max_shard_size=request.max_shard_size)
    files = assets.files
    if request.card and config is not None:
        files += (_card(sources, request, layout, fitted, assets),)
    output = Output("", layout, files)
    clock.lap("plan")
    delivered = deliver(
        request.target, [output], request.writing, _provenance(sources, request, finished)
    )
    clock.lap("write")
    return report(
        sources[0],
        [output],
        delivered,
        request.writing,
        clock,
        target=request.target,
        title=request.title,
        copy=request.copy,
        checked=checked,
        notes=(*state.notes, *fitted.notes, *assets.notes),
        warnings=(
            *(remark for source in sources for remark in source.remarks),
            *_unused(request),
            *state.warnings,
            *fitted.warnings,
            *assets.warnings,
        ),
    )


def report(
    source: Checkpoint,
    outputs: Sequence[Output],
    delivered: Delivered | None,
    writing: Writing,
    clock: Clock,
    *,
    target: Path,
    title: str | None,
    copy: Copy,
    checked: int,
    notes: tuple[str, ...],
    warnings: tuple[str, ...],
) -> Report:
    """What was done, or would be."""
    tensors = [tensor for output in outputs for tensor in output.layout.tensors.values()]
    planned = {name: nbytes for output in outputs for name, nbytes in output.sizes.items()}
    files = planned if delivered is None else delivered.files
    written = Written() if delivered is None else delivered.written
    return Report(
        checkpoint=source.location.directory,
        output=target,
        source=title or source.title,
        step=source.step if title is None else None,
        world_size=source.world_size,
        framework=source.framework,
        weights=copy,
        dtypes=_dtype_counts(tensors),
        tensors=len(tensors),
        parameters=sum(tensor.numel for tensor in tensors),
        files=files,
        bytes_read=written.bytes_read,
        bytes_written=0 if delivered is None else sum(files.values()),
        checked=checked,
        seconds=clock.laps | {"move": written.move_seconds, "sync": written.sync_seconds},
        notes=notes if delivered is None else (*notes, *delivered.notes),
        warnings=(*map(_leftover, leftovers(target)), *warnings),
        dry_run=writing.dry_run,
        plan=tuple(file for output in outputs for file in output.listing())
        if writing.dry_run
        else (),
    )


def _inputs(sources: Sequence[Checkpoint], request: Request) -> list[Path]:
    """Directories and files that are read, and so must not be replaced."""
    assets = request.assets
    named = (assets.config, assets.tokenizer, assets.like, *request.beside)
    folders = (folder for s in sources for folder in folders_of(s.location.directory))
    return [*folders, *filter(None, named)]


def _config(request: Request) -> ConfigSource | None:
    """The config of the model that is written; None where weights alone are."""
    if request.weights_only:
        return None
    config = find_config(request.assets)
    return config if request.attribute is None else of_attribute(config, request.attribute)


def _like(request: Request) -> Checkpoint | None:
    """The directory of ``--like``."""
    path = request.assets.like
    return None if path is None else readers.read(readers.locate(path))


def _like_catalogue(finished: Checkpoint, request: Request) -> Catalogue:
    """Its tensors, in the dtypes of the output."""
    dtype = "keep" if request.dtype == "auto" else request.dtype
    return cast_state(model_state(finished, "model"), dtype)


def _provenance(
    sources: Sequence[Checkpoint], request: Request, like: Checkpoint | None
) -> Provenance:
    options = {"weights": request.copy, "dtype": request.dtype, "attribute": request.attribute}
    every = (*sources, *([] if like is None else [like]))
    return Provenance(request.command, every, options, request.beside_tensors)


def _collect(options: AssetOptions, config: ConfigSource, fitted: Fitted) -> Assets:
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in fitted.catalogue.items()}
    return collect(
        options, config, shapes, dtype=main_dtype(fitted.catalogue), untied=bool(fitted.untied)
    )


def _card(
    sources: Sequence[Checkpoint], request: Request, layout: Plan, fitted: Fitted, assets: Assets
) -> AssetFile:
    names = ", ".join(f"`{source.location.name}`" for source in sources)
    tensors = layout.tensors.values()
    return model_card(
        CardFacts(
            made_of=request.title and f"{request.title}: {names}",
            step=sources[0].step if request.title is None else None,
            weights=request.copy,
            parameters=sum(tensor.numel for tensor in tensors),
            nbytes=layout.tensor_bytes,
            dtypes=_dtype_counts(tensors),
            attribute=request.attribute,
            notes=fitted.notes,
            version=__version__,
            manifest=MANIFEST,
        ),
        assets.config,
    )


def _unused(request: Request) -> Iterator[str]:
    """What was named and is not used, because weights alone are written."""
    assets = request.assets
    named = {"--config": assets.config, "--tokenizer": assets.tokenizer, "--like": assets.like}
    unused = [option for option, path in named.items() if path is not None]
    if request.weights_only and unused:
        yield (
            f"{', '.join(unused)} had no use: --weights-only writes the tensors that the checkpoint "
            "holds, under the names that it has them by"
        )


def _leftover(path: Path) -> str:
    return (
        f"{path} was left by a run that was killed; --resume goes on with it, or it can be deleted"
    )


def _dtype_counts(tensors: Iterable[Tensor]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[str(tensor.dtype)] += tensor.numel
    return dict(counts)
