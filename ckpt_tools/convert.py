"""The pipeline: the only place where the order of things is decided.

    locate, read -> choose copy -> cast -> strip wrappers -> check masters
        -> fit to the model -> assets -> plan -> write -> publish

Everything that can be wrong with the input is found before the partial directory is made. Knows no
format, no byte layout and no command line.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

from ckpt_tools import readers
from ckpt_tools.assets import AssetFile, AssetOptions, Assets, ConfigSource, collect, find_config
from ckpt_tools.assets.config import of_attribute
from ckpt_tools.catalogue import Catalogue, Tensor
from ckpt_tools.checkpoint import Checkpoint, Copy
from ckpt_tools.dtypes import BY_SHORT_NAME, DType
from ckpt_tools.errors import OutputFailed, UsageError
from ckpt_tools.fit import Fitted, anticipate, fit_to_model
from ckpt_tools.lazy import cast
from ckpt_tools.masters import check_masters
from ckpt_tools.plan import Plan, plan
from ckpt_tools.publish import check_room, check_target, leftovers, partial_directory
from ckpt_tools.report import Report
from ckpt_tools.transforms.prefixes import strip_wrappers
from ckpt_tools.transforms.rename import rename
from ckpt_tools.transforms.subset import take_attribute
from ckpt_tools.write import Written, default_workers, write

DTypeChoice = Literal["auto", "keep", "fp32", "bf16", "fp16"]
PathLike = str | os.PathLike[str]
Progress = Callable[[int, int], None]


def open_checkpoint(path: PathLike, *, tag: str | None = None) -> Checkpoint:
    """Open a training checkpoint; reads metadata only.

    Args:
        path: what people have at hand: the directory with ``latest``, the ``global_stepN``
            directory, a Transformers ``checkpoint-N`` directory.
        tag: which of several checkpoints, by name.

    Returns:
        A read-only mapping from tensor name to a lazy tensor with ``dtype``, ``shape`` and
        ``load()``, and the facts of the checkpoint.

    Raises:
        CkptError: see :mod:`ckpt_tools.errors`.
    """
    return readers.read(readers.locate(Path(path), tag))


def consolidate(
    checkpoint: PathLike | Checkpoint,
    output: PathLike,
    *,
    tag: str | None = None,
    attribute: str | None = None,
    dtype: DTypeChoice = "auto",
    weights: Copy = "master",
    config: PathLike | None = None,
    tokenizer: PathLike | None = None,
    generation_config: str = "auto",
    like: PathLike | None = None,
    max_shard_size: int | str = "5GB",
    workers: int | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    weights_only: bool = False,
    check_all_masters: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write a checkpoint as a Hugging Face model directory.

    Args:
        checkpoint: a path, or an opened checkpoint.
        output: the directory to make.
        tag: which of several checkpoints, by name.
        attribute: dotted path of the part of a composite model to write, such as ``policy``.
        dtype: ``auto`` gives each tensor its training dtype, ``keep`` leaves each as it lies,
            ``fp32``, ``bf16`` and ``fp16`` cast every floating tensor.
        weights: ``master`` takes the optimizer's copy where there is one, ``model`` the 16-bit copy.
        config: a model's ``config.json`` or its directory; by default looked for in ``like`` and
            near the checkpoint.
        tokenizer: directory of the tokenizer; by default looked for in the same places.
        generation_config: ``auto``, ``olmo``, ``none``, or a file or directory.
        like: a Hugging Face directory that the output is to be like; tensors that the checkpoint
            does not hold (frozen ones that were left out) are taken from it.
        max_shard_size: bytes, or a number with a decimal unit.
        workers: number of threads; by default one a processor. The output does not depend on it.
        dry_run: plan and check everything, write nothing.
        overwrite: replace an existing output once the new one is complete.
        weights_only: write weights alone: no config, no tokenizer, names as they are.
        check_all_masters: compare every element of masters and 16-bit weights, not a sample.
        progress: called with bytes done and bytes in all, from any thread.

    Returns:
        What was done.

    Raises:
        CkptError: see :mod:`ckpt_tools.errors`; nothing was written.
    """
    clock = _Clock()
    source = (
        checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint, tag=tag)
    )
    return _run(
        source,
        _Request(
            target=Path(output),
            attribute=attribute,
            dtype=dtype,
            copy=weights,
            assets=AssetOptions(
                config=_path(config),
                tokenizer=_path(tokenizer),
                like=_path(like),
                generation_config=generation_config,
                search=source.location.near,
            ),
            max_shard_size=max_shard_size,
            workers=workers or default_workers(),
            dry_run=dry_run,
            overwrite=overwrite,
            weights_only=weights_only,
            check_all_masters=check_all_masters,
            progress=progress,
        ),
        clock,
    )


@dataclass(frozen=True)
class _Request:
    """What is asked of one conversion; the arguments of :func:`consolidate`, made ready."""

    target: Path
    attribute: str | None
    dtype: DTypeChoice
    copy: Copy
    assets: AssetOptions
    max_shard_size: int | str
    workers: int
    dry_run: bool
    overwrite: bool
    weights_only: bool
    check_all_masters: bool
    progress: Progress | None


def _run(source: Checkpoint, request: _Request, clock: _Clock) -> Report:
    """The pipeline itself."""
    if not request.dry_run:
        check_target(request.target, _inputs(source, request.assets), overwrite=request.overwrite)
    catalogue = _cast(source, request.copy, request.dtype)
    catalogue, removed = _named_as_the_model(catalogue, request.attribute)
    config = None if request.weights_only else find_config(request.assets)
    if config is not None and request.attribute is not None:
        config = of_attribute(config, request.attribute)
    if config is not None:
        like = _like(request)
        anticipate(catalogue, config, like, main_dtype(catalogue))
        import_module("torch")  # needed later and slow to import: while the answer is awaited
    clock.lap("read")
    checked = 0
    if request.copy == "master":
        checked = check_masters(
            source, every_element=request.check_all_masters, workers=request.workers
        )
    clock.lap("check")
    fitted, assets = Fitted.unchecked(catalogue), Assets((), {}, (), ())
    if config is not None:
        fitted = fit_to_model(catalogue, config, like, main_dtype(catalogue))
        assets = _collect(request.assets, config, fitted)
    layout = plan(fitted.catalogue, max_shard_size=request.max_shard_size)
    needed = layout.nbytes + sum(file.nbytes for file in assets.files)
    if not request.dry_run:
        check_room(request.target, needed)
    clock.lap("plan")
    written = None if request.dry_run else _publish(layout, assets, request)
    clock.lap("write")
    return Report(
        checkpoint=source.location.directory,
        output=request.target,
        source=source.title,
        step=source.step,
        world_size=source.world_size,
        framework=source.framework,
        weights=request.copy,
        dtypes=_dtype_counts(layout.tensors),
        tensors=len(layout.tensors),
        parameters=sum(tensor.numel for tensor in layout.tensors.values()),
        files=layout.sizes | {file.name: file.nbytes for file in assets.files},
        bytes_read=written.bytes_read if written else 0,
        bytes_written=needed if written else 0,
        checked=checked,
        seconds=clock.laps
        | {
            "move": written.move_seconds if written else 0.0,
            "sync": written.sync_seconds if written else 0.0,
        },
        notes=(
            *(f"stripped {where} from {n} names" for where, n in removed.items()),
            *fitted.notes,
            *assets.notes,
        ),
        warnings=(
            *source.remarks,
            *map(_leftover, leftovers(request.target)),
            *fitted.warnings,
            *assets.warnings,
        ),
        dry_run=request.dry_run,
        plan=layout.listing() if request.dry_run else (),
    )


def _named_as_the_model(
    catalogue: Catalogue, attribute: str | None
) -> tuple[Catalogue, dict[str, int]]:
    """The tensors of the model or of one attribute under its own names, and the wrappers taken off."""
    removed: dict[str, int] = {}

    def unwrapped(catalogue: Catalogue) -> Catalogue:
        stripped = strip_wrappers([*catalogue, *catalogue.ties])
        removed.update(stripped.removed)
        return rename(catalogue, stripped.names)

    if attribute is None:
        return unwrapped(catalogue), removed
    # A path may be spelt with the wrappers that stand in the names, or without them.
    as_spelt = any(name.startswith(f"{attribute}.") for name in catalogue)
    part = take_attribute(catalogue if as_spelt else unwrapped(catalogue), attribute)
    return unwrapped(part), removed


class _Clock:
    """Seconds of each step, and in all."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, step: str) -> None:
        now = time.monotonic()
        self.laps |= {step: now - self._last, "total": now - self._started}
        self._last = now


def _inputs(source: Checkpoint, assets: AssetOptions) -> list[Path]:
    """Directories and files that are read, and so must not be replaced."""
    named = (assets.config, assets.tokenizer, assets.like)
    return [source.location.directory, *filter(None, named)]


def _like(request: _Request) -> Catalogue | None:
    """The tensors of ``--like``, in the dtypes of the output."""
    if request.assets.like is None:
        return None
    dtype = "keep" if request.dtype == "auto" else request.dtype
    return _cast(open_checkpoint(request.assets.like), "model", dtype)


def _collect(options: AssetOptions, config: ConfigSource, fitted: Fitted) -> Assets:
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in fitted.catalogue.items()}
    return collect(
        options, config, shapes, dtype=main_dtype(fitted.catalogue), untied=bool(fitted.untied)
    )


def _path(value: PathLike | None) -> Path | None:
    return None if value is None else Path(value)


def _leftover(path: Path) -> str:
    return f"{path} was left by a run that was killed; it can be deleted"


def _cast(checkpoint: Checkpoint, copy: Copy, choice: DTypeChoice) -> Catalogue:
    """The tensors of one copy in the dtypes of the output."""
    catalogue = checkpoint.catalogue(copy)
    if choice == "keep":
        return catalogue
    if choice != "auto" and choice not in BY_SHORT_NAME:
        raise UsageError(f"{choice!r} is no dtype", hint="Choose auto, keep, fp32, bf16 or fp16.")

    def wanted(name: str) -> DType:
        return checkpoint.weights[name].dtype if choice == "auto" else BY_SHORT_NAME[choice]

    tensors = {name: cast(tensor, wanted(name)) for name, tensor in catalogue.items()}
    return Catalogue(tensors, catalogue.ties)


def main_dtype(tensors: Mapping[str, Tensor]) -> DType:
    """The dtype of most floating elements: what ``config.json`` calls the model's dtype.

    Raises:
        UsageError: no tensor is floating.
    """
    counts: Counter[DType] = Counter()
    for tensor in tensors.values():
        if tensor.dtype.is_floating:
            counts[tensor.dtype] += max(tensor.numel, 1)
    if not counts:
        raise UsageError(
            "the checkpoint holds no floating-point tensor", hint="Pass --weights-only."
        )
    return counts.most_common(1)[0][0]


def _dtype_counts(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[str(tensor.dtype)] += tensor.numel
    return dict(counts)


def _summed(progress: Progress | None, total: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    lock, done = threading.Lock(), 0

    def add(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            progress(done, total)

    return add


def _publish(layout: Plan, assets: Assets, request: _Request) -> Written:
    progress = _summed(request.progress, layout.tensor_bytes)
    with partial_directory(request.target, overwrite=request.overwrite) as partial:
        written = write(layout, partial, workers=request.workers, progress=progress)
        for asset in assets.files:
            _write_asset(partial, asset)
    return written


def _write_asset(directory: Path, asset: AssetFile) -> None:
    path = directory / asset.name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if asset.content is not None:
            path.write_bytes(asset.content)
        elif asset.source is not None:
            shutil.copyfile(asset.source, path)
    except OSError as error:
        raise OutputFailed(f"cannot be written ({error.strerror})", path=path) from error
