"""The public functions: what the command line does, for programs.

Owns their arguments; :mod:`ckpt_tools.conversion.pipeline` carries the requests out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_tools import readers
from ckpt_tools.conversion.bases import (
    is_adapter,
    lacks_base,
    named_base,
    weights_named_by,
    with_adapter_as_checkpoint,
)
from ckpt_tools.conversion.extraction import prepare_adapters
from ckpt_tools.conversion.model_shapes import ModelShapes
from ckpt_tools.conversion.models import prepare_model
from ckpt_tools.conversion.pipeline import Clock, Prepare, run
from ckpt_tools.conversion.report import Report
from ckpt_tools.conversion.request import (
    AdapterOptions,
    ModelOptions,
    Request,
    paths_of,
    requested,
)
from ckpt_tools.conversion.sending import sent
from ckpt_tools.conversion.signature import states_options
from ckpt_tools.errors import CkptError, NotACheckpoint, UsageError
from ckpt_tools.hub.links import refuse_any_leaving, refuse_leaving
from ckpt_tools.hub.sources import AssetOptions, nearby
from ckpt_tools.hub.tokenizer import find_tokenizer
from ckpt_tools.model.combining import Combination
from ckpt_tools.ranks import pooled_machines
from ckpt_tools.readers.opening import open_weights
from ckpt_tools.storage.addresses import PathLike, is_address
from ckpt_tools.storage.folders import places_of, read_as_one
from ckpt_tools.storage.naming import as_path
from ckpt_tools.storage.reading import is_near
from ckpt_tools.tensors.checkpoint import FINISHED, Checkpoint
from ckpt_tools.tensors.threads import begin_torch, garbage_kept
from ckpt_tools.writing.delivery import follow

if TYPE_CHECKING:
    from typing_extensions import Unpack


def open_checkpoint(
    path: PathLike,
    *,
    tag: str | None = None,
    model: int | str | None = None,
    source_format: str | None = None,
    also: Sequence[PathLike] = (),
) -> Checkpoint:
    """Open a training checkpoint; reads metadata only.

    Args:
        path: what people have at hand: the directory with ``latest``, the ``global_stepN``
            directory, a Transformers ``checkpoint-N`` directory.
        tag: which of several checkpoints, by name.
        model: which of several models of one state, by number or name.
        source_format: name of the format, where the directory fits several.
        also: further directories with files of the same checkpoint: copies of what other machines hold.

    Returns:
        A read-only mapping from tensor name to a lazy tensor with ``dtype``, ``shape`` and
        ``load()``, and the facts of the checkpoint.

    Raises:
        CkptError: see :mod:`ckpt_tools.errors`.
    """
    with garbage_kept():
        place = read_as_one(as_path(path), also)
        return readers.read(readers.locate(place, tag, model=model, format=source_format))


@states_options(ModelOptions)
def consolidate(
    checkpoint: PathLike | Checkpoint,
    output: PathLike,
    *,
    attribute: str | None = None,
    **options: Unpack[ModelOptions],
) -> Report:
    """Write a checkpoint as a Hugging Face model directory.

    Args:
        checkpoint: a path, or an opened checkpoint.
        output: the directory to make.
        attribute: dotted path of the part of a composite model to write, such as ``policy``.
        options: see :class:`ckpt_tools.conversion.request.Request`.

    Returns:
        What was done.

    Raises:
        TypeError: an option has an unknown name.
        CkptError: see :mod:`ckpt_tools.errors`; nothing was written.
    """
    command = "consolidate" if attribute is None else "extract-attr"
    request = requested(command, output, ModelOptions, options, attribute=attribute)
    return _together([checkpoint], request, prepare_model)


@states_options(ModelOptions)
def average(
    checkpoints: Sequence[PathLike | Checkpoint],
    output: PathLike,
    *,
    coefficients: Sequence[float] | None = None,
    **options: Unpack[ModelOptions],
) -> Report:
    """Write the mean of several checkpoints of one architecture as a model directory.

    Computed in fp64 from the masters (or the 16-bit weights, with ``weights="model"``), rounded to fp32
    and cast. Formats may be mixed. Config and tokenizer are looked for near the first checkpoint.

    Args:
        checkpoints: paths, or opened checkpoints; two or more.
        output: the directory to make.
        coefficients: one a checkpoint, adding up to 1; by default all are equal.
        options: see :class:`ckpt_tools.conversion.request.Request`.

    Returns:
        What was done.

    Raises:
        TypeError: an option has an unknown name.
        UsageError: names or shapes differ, or the coefficients do not fit.
        CkptError: see :mod:`ckpt_tools.errors`; nothing was written.
    """
    if len(checkpoints) < 2:
        raise UsageError(
            "a mean takes two checkpoints or more",
            hint="Name more checkpoints before OUT, which is the last path.",
        )
    if options.get("also"):
        raise UsageError(
            "also= does not say to which of several checkpoints its folders belong",
            hint="Open each with open_checkpoint(path, also=...) and pass the opened ones.",
        )
    request = requested("average", output, ModelOptions, options, coefficients=coefficients)
    return _together(checkpoints, request, prepare_model)


@states_options(AdapterOptions)
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
        options: see :class:`ckpt_tools.conversion.request.Request`.

    Returns:
        What was done.

    Raises:
        TypeError: an option has an unknown name.
        MissingAsset: alpha or the base model is not known.
        CkptError: see :mod:`ckpt_tools.errors`; nothing was written.
    """
    request = requested(
        "extract-lora",
        output,
        AdapterOptions,
        options,
        adapter=adapter,
        adapter_config=adapter_config,
        lora_alpha=lora_alpha,
        base_model=base_model,
    )
    return _together([checkpoint], request, prepare_adapters)


@states_options(ModelOptions)
def merge_lora(
    checkpoint: PathLike | Checkpoint,
    output: PathLike,
    *,
    adapter: str | None = None,
    combination: Combination = "cat",
    adapter_dir: PathLike | None = None,
    adapter_config: PathLike | None = None,
    lora_alpha: float | None = None,
    base: PathLike | None = None,
    **options: Unpack[ModelOptions],
) -> Report:
    """Write the model that a LoRA adapter makes of its base: ``W + s B A``, the same bits on every machine.

    Args:
        checkpoint: a path, or an opened checkpoint.
        output: the directory to make.
        adapter: which adapter, where there are several; or several with their weights, ``a=0.7,b=0.3``.
        combination: how several become one, as in PEFT's ``add_weighted_adapter``: ``cat`` adds their
            updates, ``linear`` their factors.
        adapter_dir: a directory that PEFT wrote, to take the adapter from.
        adapter_config: the adapter's config, or a directory with it; by default looked for near the
            checkpoint.
        lora_alpha: of the training run, where no config says it.
        base: a Hugging Face directory with what the checkpoint lacks of the base.
        options: see :class:`ckpt_tools.conversion.request.Request`.

    Returns:
        What was done.

    Raises:
        TypeError: an option has an unknown name.
        DamagedCheckpoint: a LoRA pair is incomplete, or the base lacks its target.
        UsageError: a target would stay as it is.
        CkptError: see :mod:`ckpt_tools.errors`; nothing was written.
    """
    request = requested(
        "merge-lora",
        output,
        ModelOptions,
        options,
        adapter=adapter,
        combination=combination,
        adapter_dir=adapter_dir,
        adapter_config=adapter_config,
        lora_alpha=lora_alpha,
        base=base,
    )
    return _together([checkpoint], request, prepare_model)


def _together(
    checkpoints: Sequence[PathLike | Checkpoint], request: Request, prepare: Prepare
) -> Report:
    """Carry out a request; of several ranks the leader does, and the others help it to write."""
    ranks = request.ranks
    if request.node_local and any(is_address(str(path)) for path in paths_of(checkpoints)):
        raise UsageError(
            "--node-local is for files that lie on each machine, and a store is the same for all",
            hint="Leave out --node-local.",
        )
    if ranks is None:
        return sent(checkpoints, request, lambda asked: _carried_out(checkpoints, asked, prepare))
    with ExitStack() as stack:
        stack.enter_context(
            ranks.session("--node-local" if request.node_local else "no --node-local")
        )
        paths = paths_of(checkpoints)
        # Every rank, because the leader's plan names files by their pool.
        if request.node_local:
            pooled = pooled_machines(ranks, paths, partial(places_of, also=request.also))
            seen = iter(stack.enter_context(pooled))
        else:
            seen = iter([read_as_one(path, request.also) for path in paths])
        if ranks.leads:
            found = [each if isinstance(each, Checkpoint) else next(seen) for each in checkpoints]
            report = sent(found, request, lambda asked: _carried_out(found, asked, prepare))
            ranks.put("report", report)
            return report
        done: Report = follow(ranks, request.workers)
        return done


def _carried_out(
    checkpoints: Sequence[PathLike | Checkpoint], request: Request, prepare: Prepare
) -> Report:
    clock = Clock()
    merges = request.command == "merge-lora"
    if merges:
        checkpoints, request = with_adapter_as_checkpoint(checkpoints, request)
    if not request.dry_run and not all(map(is_near, paths_of(checkpoints))):
        begin_torch()
    sources = [_opened(checkpoint, request) for checkpoint in checkpoints]
    near = sources[0].location.near
    if merges and request.adapter_dir is not None:
        # The adapter's own tokenizer, which may know more tokens, before that of the base.
        own = find_tokenizer(None, (request.adapter_dir,))
        tokenizer = request.tokenizer or (None if own is None else own.directory)
        request = replace(request, tokenizer=tokenizer)
    elif merges and request.base is None and lacks_base(sources[0], request.weights):
        request = replace(request, base=named_base(request, near))
    base = request.base
    if base is None:
        request = replace(request, search=near)
    else:
        # The run's own tokenizer, which may know more tokens, before that of the base.
        own = find_tokenizer(None, nearby(AssetOptions(search=near)))
        tokenizer = request.tokenizer or (None if own is None else own.directory)
        request = replace(request, search=(*near, base), tokenizer=tokenizer)
        plain = replace(request, tag=None, model=None, source_format=None, also=())
        with weights_named_by("--base", base):
            sources.append(_opened(base, plain))
    return run(sources, request, prepare, clock)


def _holds_training(path: Path) -> bool:
    """Whether a path holds checkpoints of a training run, and not a model that is finished."""
    try:
        return readers.locate(path).format not in FINISHED
    except NotACheckpoint:
        return False
    except CkptError:
        return True  # it holds several, or one that is damaged


def _opened(checkpoint: PathLike | Checkpoint, request: Request) -> Checkpoint:
    if isinstance(checkpoint, Checkpoint):
        return checkpoint
    if request.command == "extract-lora" and is_adapter(checkpoint):
        adapter = open_weights(as_path(checkpoint))
        if not request.follow_links:
            refuse_any_leaving(adapter.files, [as_path(checkpoint)])
        return adapter
    place = read_as_one(as_path(checkpoint), request.also)
    try:
        location = readers.locate(
            place, request.tag, model=request.model, format=request.source_format
        )
    except NotACheckpoint as error:
        if not place.exists() and _holds_training(request.output):
            error.hint = (
                f"The checkpoint is the first argument, and the output the second. {request.output} holds a "
                "checkpoint: exchange the two."
            )
        raise
    shapes = ModelShapes(request, location.near)
    opened = readers.read(replace(location, model_shapes=shapes))
    # By their names: a directory on another machine has no path on this one.
    root = Path(str(checkpoint) if isinstance(checkpoint, Path) else os.fspath(checkpoint))
    found = Path(str(opened.location.directory))
    if not request.follow_links and found != root and found.is_relative_to(root):
        refuse_leaving(found, root)
    if not request.follow_links:
        refuse_any_leaving(opened.files, [root, *map(Path, request.also)])
    return opened
