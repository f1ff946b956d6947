"""The library's front door: what the command line does, as functions.

Owns the arguments and what they mean; :mod:`ckpt_tools.pipeline` carries them out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from ckpt_tools import readers
from ckpt_tools.assets import AssetOptions
from ckpt_tools.checkpoint import Checkpoint, Copy
from ckpt_tools.errors import UsageError
from ckpt_tools.pipeline import Clock, Progress, Request, run
from ckpt_tools.report import Report
from ckpt_tools.state import DTypeChoice
from ckpt_tools.write import default_workers

if TYPE_CHECKING:
    from typing_extensions import Unpack

PathLike = str | os.PathLike[str]


class WritingOptions(TypedDict, total=False):
    """The options that every function that writes a model directory takes; see :func:`consolidate`."""

    dtype: DTypeChoice
    weights: Copy
    config: PathLike | None
    tokenizer: PathLike | None
    generation_config: str
    like: PathLike | None
    max_shard_size: int | str
    workers: int | None
    dry_run: bool
    overwrite: bool
    weights_only: bool
    check_all_masters: bool
    progress: Progress | None


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
    return _convert(
        [checkpoint],
        output,
        tag=tag,
        attribute=attribute,
        dtype=dtype,
        weights=weights,
        config=config,
        tokenizer=tokenizer,
        generation_config=generation_config,
        like=like,
        max_shard_size=max_shard_size,
        workers=workers,
        dry_run=dry_run,
        overwrite=overwrite,
        weights_only=weights_only,
        check_all_masters=check_all_masters,
        progress=progress,
    )


def average(
    checkpoints: Sequence[PathLike | Checkpoint],
    output: PathLike,
    *,
    coefficients: Sequence[float] | None = None,
    **options: Unpack[WritingOptions],
) -> Report:
    """Write the mean of several checkpoints of one architecture as a model directory.

    Computed in fp32 from the masters (or the 16-bit weights, with ``weights="model"``), cast once.
    Formats may be mixed. Config and tokenizer are looked for near the first checkpoint.

    Args:
        checkpoints: paths, or opened checkpoints; two or more.
        output: the directory to make.
        coefficients: one a checkpoint, adding up to 1; by default all are equal.
        options: as those of :func:`consolidate`.

    Returns:
        What was done.

    Raises:
        UsageError: names or shapes differ, or the coefficients do not fit.
        CkptError: see :mod:`ckpt_tools.errors`; nothing was written.
    """
    if len(checkpoints) < 2:
        raise UsageError("a mean takes two checkpoints or more", hint="Name more checkpoints.")
    return _convert(checkpoints, output, coefficients=coefficients, **options)


def _convert(
    checkpoints: Sequence[PathLike | Checkpoint],
    output: PathLike,
    *,
    tag: str | None = None,
    attribute: str | None = None,
    coefficients: Sequence[float] | None = None,
    **options: Unpack[WritingOptions],
) -> Report:
    clock = Clock()
    sources = [
        checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint, tag=tag)
        for checkpoint in checkpoints
    ]
    request = Request(
        target=Path(output),
        attribute=attribute,
        coefficients=coefficients,
        dtype=options.get("dtype", "auto"),
        copy=options.get("weights", "master"),
        assets=AssetOptions(
            config=_path(options.get("config")),
            tokenizer=_path(options.get("tokenizer")),
            like=_path(options.get("like")),
            generation_config=options.get("generation_config", "auto"),
            search=sources[0].location.near,
        ),
        max_shard_size=options.get("max_shard_size", "5GB"),
        workers=options.get("workers") or default_workers(),
        dry_run=options.get("dry_run", False),
        overwrite=options.get("overwrite", False),
        weights_only=options.get("weights_only", False),
        check_all_masters=options.get("check_all_masters", False),
        progress=options.get("progress"),
    )
    return run(sources, request, clock)


def _path(value: PathLike | None) -> Path | None:
    return None if value is None else Path(value)
