"""The library's front door: what the command line does, as functions.

Owns the arguments and what they mean; :mod:`ckpt_tools.conversion.pipeline` carries them out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, overload

from ckpt_tools import readers
from ckpt_tools.conversion.extraction import Extraction, run_extraction
from ckpt_tools.conversion.options import (
    AdapterOptions,
    PathLike,
    ReadingOptions,
    WritingOptions,
    writing_of,
)
from ckpt_tools.conversion.pipeline import Clock, Request, run
from ckpt_tools.conversion.report import Report
from ckpt_tools.errors import UsageError
from ckpt_tools.hub import AssetOptions
from ckpt_tools.hub.adapter_config import AdapterConfig, with_given
from ckpt_tools.hub.sources import nearby
from ckpt_tools.hub.tokenizer import find_tokenizer
from ckpt_tools.model.adapter import Adapter, read_adapter_directory
from ckpt_tools.model.merging import merged_state
from ckpt_tools.model.state import State, mean_state, only_state
from ckpt_tools.ranks import pooled_machines
from ckpt_tools.storage.folders import places_of, read_as_one
from ckpt_tools.tensors.catalogue import Catalogue
from ckpt_tools.tensors.checkpoint import Checkpoint
from ckpt_tools.writing.delivery import follow

if TYPE_CHECKING:
    from typing_extensions import Unpack


def open_checkpoint(
    path: PathLike,
    *,
    tag: str | None = None,
    model: int | None = None,
    format: str | None = None,
    also: Sequence[PathLike] = (),
) -> Checkpoint:
    """Open a training checkpoint; reads metadata only.

    Args:
        path: what people have at hand: the directory with ``latest``, the ``global_stepN``
            directory, a Transformers ``checkpoint-N`` directory.
        tag: which of several checkpoints, by name.
        model: which of several models of one state, by number.
        format: name of the format, where the directory fits several.
        also: further directories with files of the same checkpoint: copies of what other machines hold.

    Returns:
        A read-only mapping from tensor name to a lazy tensor with ``dtype``, ``shape`` and
        ``load()``, and the facts of the checkpoint.

    Raises:
        CkptError: see :mod:`ckpt_tools.errors`.
    """
    place = read_as_one(_path(path), also)
    return readers.read(readers.locate(place, tag, model=model, format=format))


def consolidate(
    checkpoint: PathLike | Checkpoint,
    output: PathLike,
    *,
    attribute: str | None = None,
    **options: Unpack[WritingOptions],
) -> Report:
    """Write a checkpoint as a Hugging Face model directory.

    Args:
        checkpoint: a path, or an opened checkpoint.
        output: the directory to make.
        attribute: dotted path of the part of a composite model to write, such as ``policy``.
        options: see :class:`ckpt_tools.conversion.options.WritingOptions` and its bases.

    Returns:
        What was done.

    Raises:
        CkptError: see :mod:`ckpt_tools.errors`; nothing was written.
    """

    def work(found: Sequence[PathLike | Checkpoint]) -> Report:
        command = "consolidate" if attribute is None else "extract-attr"
        return _convert(command, found, output, attribute=attribute, **options)

    return _together(work, [checkpoint], options)


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
        options: see :class:`ckpt_tools.conversion.options.WritingOptions` and its bases.

    Returns:
        What was done.

    Raises:
        UsageError: names or shapes differ, or the coefficients do not fit.
        CkptError: see :mod:`ckpt_tools.errors`; nothing was written.
    """
    if len(checkpoints) < 2:
        raise UsageError("a mean takes two checkpoints or more", hint="Name more checkpoints.")
    if options.get("also"):
        raise UsageError(
            "of several checkpoints it cannot be told which one the further folders belong to",
            hint="Open each with open_checkpoint(path, also=...) and pass the opened ones.",
        )

    def work(found: Sequence[PathLike | Checkpoint]) -> Report:
        combine = partial(mean_state, coefficients=coefficients)
        title = f"mean of {len(checkpoints)} checkpoints"
        return _convert("average", found, output, combine=combine, title=title, **options)

    return _together(work, checkpoints, options)


def extract_lora(
    checkpoint: PathLike | Checkpoint,
    output: PathLike,
    *,
    adapter: str | None = None,
    adapter_config: PathLike | None = None,
    lora_alpha: float | None = None,
    base_model: str | None = None,
    **options: Unpack[AdapterOptions],
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
        options: see :class:`ckpt_tools.conversion.options.AdapterOptions` and its bases.

    Returns:
        What was done.

    Raises:
        MissingAsset: alpha or the base model is not known.
        CkptError: see :mod:`ckpt_tools.errors`; nothing was written.
    """

    def work(found: Sequence[PathLike | Checkpoint]) -> Report:
        clock = Clock()
        source = _opened(found[0], options)
        config, tokenizer = _path(options.get("config")), _path(options.get("tokenizer"))
        request = Extraction(
            target=Path(output),
            adapter=adapter,
            adapter_config=_path(adapter_config),
            lora_alpha=lora_alpha,
            base_model=base_model,
            assets=AssetOptions(config, tokenizer, search=source.location.near),
            dtype=options.get("dtype", "auto"),
            copy=options.get("weights", "master"),
            check_all_masters=options.get("check_all_masters", False),
            writing=writing_of(options),
        )
        return run_extraction(source, request, clock)

    return _together(work, [checkpoint], options)


def merge_lora(
    checkpoint: PathLike | Checkpoint,
    output: PathLike,
    *,
    adapter: str | None = None,
    adapter_dir: PathLike | None = None,
    adapter_config: PathLike | None = None,
    lora_alpha: float | None = None,
    base: PathLike | None = None,
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
        options: see :class:`ckpt_tools.conversion.options.WritingOptions` and its bases.

    Returns:
        What was done.

    Raises:
        DamagedCheckpoint: a LoRA pair is incomplete, or the base lacks its target.
        UsageError: a target would stay as it is.
        CkptError: see :mod:`ckpt_tools.errors`; nothing was written.
    """

    def work(found: Sequence[PathLike | Checkpoint]) -> Report:
        source = _opened(found[0], options)
        sources = [source] if base is None else [source, open_checkpoint(base)]
        near = source.location.near
        adapter_state, config = None, None
        beside_tensors = {}
        if adapter_dir is not None:
            adapter_state, config = read_adapter_directory(Path(adapter_dir), adapter or "default")
            beside_tensors[Path(adapter_dir)] = adapter_state.catalogue

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
        if base is not None and options.get("tokenizer") is None:
            # The run's own tokenizer, which may know more tokens, before that of the base.
            own = find_tokenizer(None, nearby(AssetOptions(search=near)))
            options["tokenizer"] = None if own is None else own.directory
        return _convert(
            "merge-lora",
            sources,
            output,
            combine=combine,
            beside=tuple(filter(None, map(_path, (adapter_dir, adapter_config)))),
            beside_tensors=beside_tensors,
            search=near if base is None else (*near, Path(base)),
            **options,
        )

    return _together(work, [checkpoint], options)


def _together(
    work: Callable[[Sequence[PathLike | Checkpoint]], Report],
    checkpoints: Sequence[PathLike | Checkpoint],
    options: AdapterOptions,
) -> Report:
    """Carry out a call; of several ranks the leader does, and the others help it to write."""
    ranks = options.get("ranks")
    if ranks is None:
        return work(checkpoints)
    node_local = options.get("node_local", False)
    with ExitStack() as stack:
        stack.enter_context(ranks.session("--node-local" if node_local else "no --node-local"))
        paths = [_path(each) for each in checkpoints if not isinstance(each, Checkpoint)]
        also = options.get("also", ())
        # Every rank, because the leader's plan names files by their pool.
        if node_local:
            pooled = pooled_machines(ranks, paths, partial(places_of, also=also))
            seen = iter(stack.enter_context(pooled))
        else:
            seen = iter([read_as_one(path, also) for path in paths])
        if ranks.leads:
            found = [each if isinstance(each, Checkpoint) else next(seen) for each in checkpoints]
            report = work(found)
            ranks.put("report", report)
            return report
        done: Report = follow(ranks, writing_of(options).workers)
        return done


def _convert(
    command: str,
    checkpoints: Sequence[PathLike | Checkpoint],
    output: PathLike,
    *,
    attribute: str | None = None,
    combine: Callable[[Sequence[State]], State] = only_state,
    title: str | None = None,
    beside: tuple[Path, ...] = (),
    beside_tensors: Mapping[Path, Catalogue] | None = None,
    search: tuple[Path, ...] | None = None,
    **options: Unpack[WritingOptions],
) -> Report:
    clock = Clock()
    sources = [_opened(checkpoint, options) for checkpoint in checkpoints]
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
        writing=writing_of(options),
        command=command,
        beside_tensors=beside_tensors or {},
    )
    return run(sources, request, clock)


def _opened(checkpoint: PathLike | Checkpoint, options: ReadingOptions) -> Checkpoint:
    if isinstance(checkpoint, Checkpoint):
        return checkpoint
    return open_checkpoint(
        checkpoint,
        tag=options.get("tag"),
        model=options.get("model"),
        format=options.get("format"),
        also=options.get("also", ()),
    )


@overload
def _path(value: PathLike) -> Path: ...
@overload
def _path(value: PathLike | None) -> Path | None: ...
def _path(value: PathLike | None) -> Path | None:
    # A path of a pool stays one.
    return value if value is None or isinstance(value, Path) else Path(value)
