"""The library's front door: what the command line does, as functions.

Owns the arguments and what they mean; :mod:`ckpt_tools.pipeline` carries them out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from ckpt_tools import readers
from ckpt_tools.adapters import Adapter, read_adapter_directory
from ckpt_tools.assets import AssetOptions
from ckpt_tools.assets.adapter_config import AdapterConfig, with_given
from ckpt_tools.assets.sources import nearby
from ckpt_tools.assets.tokenizer import find_tokenizer
from ckpt_tools.checkpoint import Checkpoint, Copy
from ckpt_tools.errors import UsageError
from ckpt_tools.extraction import Extraction, run_extraction
from ckpt_tools.merging import merged_state
from ckpt_tools.pipeline import Clock, Progress, Request, Writing, run
from ckpt_tools.report import Report
from ckpt_tools.state import DTypeChoice, State, mean_state, only_state
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
    model: int | None
    format: str | None
    card: bool
    trust_remote_code: bool


def open_checkpoint(
    path: PathLike, *, tag: str | None = None, model: int | None = None, format: str | None = None
) -> Checkpoint:
    """Open a training checkpoint; reads metadata only.

    Args:
        path: what people have at hand: the directory with ``latest``, the ``global_stepN``
            directory, a Transformers ``checkpoint-N`` directory.
        tag: which of several checkpoints, by name.
        model: which of several models of one state, by number.
        format: name of the format, where the directory fits several.

    Returns:
        A read-only mapping from tensor name to a lazy tensor with ``dtype``, ``shape`` and
        ``load()``, and the facts of the checkpoint.

    Raises:
        CkptError: see :mod:`ckpt_tools.errors`.
    """
    return readers.read(readers.locate(Path(path), tag, model=model, format=format))


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
    model: int | None = None,
    format: str | None = None,
    card: bool = True,
    trust_remote_code: bool = False,
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
        model: which of several models of one state, by number.
        format: name of the format, where the directory fits several.
        card: write a model card, ``README.md``.
        trust_remote_code: run custom code that lies beside the config, in a process of its own, to
            learn the model's layout.

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
        model=model,
        format=format,
        card=card,
        trust_remote_code=trust_remote_code,
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
    return _convert(
        checkpoints,
        output,
        combine=partial(mean_state, coefficients=coefficients),
        title=f"mean of {len(checkpoints)} checkpoints",
        **options,
    )


def extract_lora(
    checkpoint: PathLike | Checkpoint,
    output: PathLike,
    *,
    adapter: str | None = None,
    adapter_config: PathLike | None = None,
    lora_alpha: float | None = None,
    base_model: str | None = None,
    tag: str | None = None,
    dtype: DTypeChoice = "auto",
    weights: Copy = "master",
    config: PathLike | None = None,
    tokenizer: PathLike | None = None,
    workers: int | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    check_all_masters: bool = False,
    progress: Progress | None = None,
    model: int | None = None,
    format: str | None = None,
) -> Report:
    """Write an adapter as PEFT's ``save_pretrained`` of the live model would have written it.

    Only its bytes are read.

    Args:
        checkpoint: a path, or an opened checkpoint.
        output: the directory to make.
        adapter: which adapter, where there are several; ``all`` writes ``default`` into the directory
            itself and each other into a folder of its name, as PEFT does.
        adapter_config: ``adapter_config.json``, or a directory with it; by default looked for near the
            checkpoint, and otherwise inferred from the tensors.
        lora_alpha: of the training run, where no config says it.
        base_model: what the base model is called, where no config says it.
        tag: which of several checkpoints, by name.
        dtype: as in :func:`consolidate`.
        weights: as in :func:`consolidate`.
        config: the base's ``config.json`` or its directory; by default looked for near the checkpoint.
            With it PEFT itself is asked what it writes.
        tokenizer: directory of a tokenizer; by default looked for near the checkpoint.
        workers: number of threads.
        dry_run: plan and check everything, write nothing.
        overwrite: replace an existing output once the new one is complete.
        check_all_masters: compare every element of masters and 16-bit weights, not a sample.
        progress: called with bytes done and bytes in all, from any thread.
        model: which of several models of one state, by number.
        format: name of the format, where the directory fits several.

    Returns:
        What was done.

    Raises:
        MissingAsset: alpha or the base model is not known.
        CkptError: see :mod:`ckpt_tools.errors`; nothing was written.
    """
    clock = Clock()
    source = _opened(checkpoint, tag, model, format)
    request = Extraction(
        target=Path(output),
        adapter=adapter,
        adapter_config=_path(adapter_config),
        lora_alpha=lora_alpha,
        base_model=base_model,
        assets=AssetOptions(_path(config), _path(tokenizer), search=source.location.near),
        dtype=dtype,
        copy=weights,
        check_all_masters=check_all_masters,
        writing=Writing(workers or default_workers(), dry_run, overwrite, progress),
    )
    return run_extraction(source, request, clock)


def merge_lora(
    checkpoint: PathLike | Checkpoint,
    output: PathLike,
    *,
    adapter: str | None = None,
    adapter_dir: PathLike | None = None,
    adapter_config: PathLike | None = None,
    lora_alpha: float | None = None,
    base: PathLike | None = None,
    tag: str | None = None,
    **options: Unpack[WritingOptions],
) -> Report:
    """Write the model that a LoRA adapter makes of its base: ``W + s B A`` in fp32, rounded once.

    Args:
        checkpoint: a path, or an opened checkpoint.
        output: the directory to make.
        adapter: which adapter, where there are several.
        adapter_dir: a directory that PEFT wrote, to take the adapter from.
        adapter_config: the adapter's config, or a directory with it; by default looked for near the
            checkpoint.
        lora_alpha: of the training run, where no config says it.
        base: a Hugging Face directory with what the checkpoint lacks of the base.
        tag: which of several checkpoints, by name.
        options: as those of :func:`consolidate`.

    Returns:
        What was done.

    Raises:
        DamagedCheckpoint: a LoRA pair is incomplete, or the base lacks its target.
        UsageError: a target would stay as it is.
        CkptError: see :mod:`ckpt_tools.errors`; nothing was written.
    """
    source = _opened(checkpoint, tag, options.get("model"), options.get("format"))
    sources = [source] if base is None else [source, open_checkpoint(base)]
    near = source.location.near
    adapter_state, config = None, None
    if adapter_dir is not None:
        adapter_state, config = read_adapter_directory(Path(adapter_dir), adapter or "default")

    def configure(chosen: Adapter) -> AdapterConfig:
        named = _path(adapter_config)
        found = config if config is not None and named is None else None
        found = found or chosen.configured(named, near, None, None)
        return with_given(found, lora_alpha=lora_alpha, base_model=None, for_file=False)

    combine = partial(
        merged_state,
        adapter_state=adapter_state,
        adapter=adapter,
        configure=configure,
        dtype=options.get("dtype", "auto"),
    )
    beside = tuple(filter(None, map(_path, (adapter_dir, adapter_config))))
    if base is not None and options.get("tokenizer") is None:
        # The run's own tokenizer, which may know more tokens, before that of the base.
        own = find_tokenizer(None, nearby(AssetOptions(search=near)))
        options["tokenizer"] = None if own is None else own.directory
    search = near if base is None else (*near, Path(base))
    return _convert(sources, output, combine=combine, beside=beside, search=search, **options)


def _convert(
    checkpoints: Sequence[PathLike | Checkpoint],
    output: PathLike,
    *,
    tag: str | None = None,
    attribute: str | None = None,
    combine: Callable[[Sequence[State]], State] = only_state,
    title: str | None = None,
    beside: tuple[Path, ...] = (),
    search: tuple[Path, ...] | None = None,
    **options: Unpack[WritingOptions],
) -> Report:
    clock = Clock()
    model, format = options.get("model"), options.get("format")
    sources = [_opened(checkpoint, tag, model, format) for checkpoint in checkpoints]
    request = Request(
        target=Path(output),
        attribute=attribute,
        combine=combine,
        title=title,
        beside=beside,
        dtype=options.get("dtype", "auto"),
        copy=options.get("weights", "master"),
        assets=AssetOptions(
            config=_path(options.get("config")),
            tokenizer=_path(options.get("tokenizer")),
            like=_path(options.get("like")),
            generation_config=options.get("generation_config", "auto"),
            search=sources[0].location.near if search is None else search,
        ),
        max_shard_size=options.get("max_shard_size", "5GB"),
        weights_only=options.get("weights_only", False),
        card=options.get("card", True),
        trust_remote_code=options.get("trust_remote_code", False),
        check_all_masters=options.get("check_all_masters", False),
        writing=Writing(
            workers=options.get("workers") or default_workers(),
            dry_run=options.get("dry_run", False),
            overwrite=options.get("overwrite", False),
            progress=options.get("progress"),
        ),
    )
    return run(sources, request, clock)


def _opened(
    checkpoint: PathLike | Checkpoint, tag: str | None, model: int | None, format: str | None
) -> Checkpoint:
    if isinstance(checkpoint, Checkpoint):
        return checkpoint
    return open_checkpoint(checkpoint, tag=tag, model=model, format=format)


def _path(value: PathLike | None) -> Path | None:
    return None if value is None else Path(value)
