"""The pipeline: the only place where the order of things is decided.

    locate, read -> choose copy -> cast -> strip wrappers -> fit to the model -> plan
        -> check masters -> write, assets -> publish

Everything that can be wrong with the input is found before the partial directory is made. Knows no
format, no byte layout and no command line.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from ckpt_tools import readers
from ckpt_tools.assets import AssetFile, AssetOptions, Assets, collect, find_config
from ckpt_tools.catalogue import Catalogue, Tensor
from ckpt_tools.checkpoint import Checkpoint, Copy
from ckpt_tools.dtypes import BY_SHORT_NAME, DType
from ckpt_tools.errors import OutputFailed, UsageError
from ckpt_tools.fit import Fitted, fit_to_model
from ckpt_tools.lazy import cast
from ckpt_tools.masters import check_masters
from ckpt_tools.plan import Plan, plan
from ckpt_tools.publish import check_room, check_target, leftovers, partial_directory
from ckpt_tools.report import Report
from ckpt_tools.transforms.prefixes import strip_wrappers
from ckpt_tools.transforms.rename import rename
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
    started = time.monotonic()
    target, count = Path(output), workers or default_workers()
    source = (
        checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint, tag=tag)
    )
    model = None if like is None else open_checkpoint(like)
    options = AssetOptions(
        config=_path(config),
        tokenizer=_path(tokenizer),
        like=_path(like),
        generation_config=generation_config,
        search=source.location.near,
    )
    inputs = [
        source.location.directory,
        *filter(None, (options.config, options.tokenizer, options.like)),
    ]
    if not dry_run:
        check_target(target, inputs, overwrite=overwrite)

    notes, warnings = [], [*source.remarks, *map(_leftover, leftovers(target))]
    catalogue = _cast(source, weights, dtype)
    stripped = strip_wrappers([*catalogue, *catalogue.ties])
    catalogue = rename(catalogue, stripped.names)
    notes += [f"stripped {where} from {n} names" for where, n in stripped.removed.items()]
    if weights_only:
        fitted = Fitted.unchecked(catalogue)
        assets = Assets((), {}, (), ())
    else:
        extra = (
            None if model is None else _cast(model, "model", "keep" if dtype == "auto" else dtype)
        )
        found = find_config(options)
        fitted = fit_to_model(catalogue, found, extra, main_dtype(catalogue))
        assets = collect(
            options,
            found,
            {name: (tensor.dtype, tensor.shape) for name, tensor in fitted.catalogue.items()},
            dtype=main_dtype(fitted.catalogue),
            untied=bool(fitted.untied),
        )
    layout = plan(fitted.catalogue, max_shard_size=max_shard_size)
    asset_bytes = sum(file.nbytes for file in assets.files)
    if not dry_run:
        check_room(target, layout.nbytes + asset_bytes)
    prepared = time.monotonic()

    checked = 0
    if weights == "master":
        checked = check_masters(source, every_element=check_all_masters, workers=count)
    checks_done = time.monotonic()
    written = Written(0, 0, 0.0, 0.0)
    if not dry_run:
        total = layout.tensor_bytes
        written = _publish(target, layout, assets, count, overwrite, _summed(progress, total))
    ended = time.monotonic()
    return Report(
        checkpoint=source.location.directory,
        output=target,
        source=source.title,
        step=source.step,
        world_size=source.world_size,
        framework=source.framework,
        weights=weights,
        dtypes=_dtype_counts(layout.tensors),
        tensors=len(layout.tensors),
        parameters=sum(tensor.numel for tensor in layout.tensors.values()),
        files=_sizes(layout, assets),
        bytes_read=written.bytes_read,
        bytes_written=layout.nbytes + asset_bytes,
        checked=checked,
        seconds={
            "prepare": prepared - started,
            "check": checks_done - prepared,
            "move": written.move_seconds,
            "sync": written.sync_seconds,
            "total": ended - started,
        },
        notes=(*notes, *fitted.notes, *assets.notes),
        warnings=(*warnings, *fitted.warnings, *assets.warnings),
        dry_run=dry_run,
        plan=tuple(
            {
                "file": file.name,
                "bytes": file.size,
                "tensors": [
                    {"name": s.name, "dtype": str(s.tensor.dtype), "shape": list(s.tensor.shape)}
                    for s in file.slots
                ],
            }
            for file in layout.files
        )
        if dry_run
        else (),
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


def _sizes(layout: Plan, assets: Assets) -> dict[str, int]:
    sizes = {file.name: file.size for file in layout.files}
    if layout.index is not None:
        sizes[layout.index[0]] = len(layout.index[1])
    return sizes | {file.name: file.nbytes for file in assets.files}


def _summed(progress: Progress | None, total: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    import threading

    lock, done = threading.Lock(), 0

    def add(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            progress(done, total)

    return add


def _publish(
    target: Path,
    layout: Plan,
    assets: Assets,
    workers: int,
    overwrite: bool,
    progress: Callable[[int], None] | None,
) -> Written:
    with partial_directory(target, overwrite=overwrite) as partial:
        written = write(layout, partial, workers=workers, progress=progress)
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
