"""Saves a model in training: the directory that a conversion of its checkpoint writes, without a checkpoint.

Owns the arguments of :func:`save` and the order of its steps. A live model becomes a checkpoint whose
bytes are in the memory of all ranks. The pipeline of conversion does the rest: the leader plans, and
every rank writes its share. Bytes of other ranks arrive in bounded blocks; nothing is gathered.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_tools.conversion.extraction import prepare_adapters
from ckpt_tools.conversion.models import prepare_model
from ckpt_tools.conversion.pipeline import Clock, run
from ckpt_tools.conversion.request import Request
from ckpt_tools.errors import UsageError
from ckpt_tools.hub.sources import Compat
from ckpt_tools.model.state import DTypeChoice
from ckpt_tools.ranks import Ranks, from_process_group
from ckpt_tools.tensors.threads import default_workers
from ckpt_tools.training.beside import beside
from ckpt_tools.training.facts import engine_of, facts_of
from ckpt_tools.training.holding import Holding
from ckpt_tools.training.live import offered, part_of
from ckpt_tools.training.state_dict import holding_of
from ckpt_tools.training.wrappers import attribute_of, innermost, unwrapped
from ckpt_tools.transforms.prefixes import strip_wrappers
from ckpt_tools.writing.delivery import follow

if TYPE_CHECKING:
    from ckpt_tools.conversion.report import Report
    from ckpt_tools.storage.addresses import PathLike

TIMEOUT_SECONDS = 600.0


def save(
    model: Any,
    output_dir: PathLike,
    *,
    accelerator: Any = None,
    tokenizer: Any = None,
    chat_template: PathLike | None = None,
    attribute: str | None = None,
    adapter: str | None = None,
    generation_config: str | os.PathLike[str] = "auto",
    compat: Compat | None = None,
    dtype: DTypeChoice = "auto",
    max_shard_size: int | str = "5GB",
    config: Any = None,
    base_model: str | None = None,
    weights_only: bool = False,
    card: bool = True,
    overwrite: bool = False,
    verify: bool = False,
    sha256: bool = False,
    step: int | None = None,
    workers: int | None = None,
    timeout: float = TIMEOUT_SECONDS,
) -> Report:
    """Save a model in training as a Hugging Face directory.

    Call it on every rank, with the same arguments, between two steps. The directory equals, byte for
    byte, the one that :func:`ckpt_tools.consolidate` (or ``extract_lora``) makes from the framework's own
    checkpoint of the same step; only the manifest differs. It appears when it is complete. No rank
    gathers the model: each rank reads its own memory and asks the others for the bytes that it writes, in
    buffers whose size does not depend on the model.

    Args:
        model: the model that training calls: bare, or wrapped by Accelerate, DistributedDataParallel,
            DeepSpeed (stages 0 to 3), FSDP1 or FSDP2; or a DeepSpeed engine.
        output_dir: the directory to make; the same for all ranks.
        accelerator: the accelerator that prepared the model, if one did.
        tokenizer: a tokenizer or processor, or the directory of one.
        chat_template: a file with the chat template to save in the place of the tokenizer's own.
        attribute: dotted path of the part of a composite model to save, such as ``policy``.
        adapter: save this adapter alone, as PEFT does; ``all`` saves each.
        generation_config: ``auto``, ``olmo``, ``none``, or a file or directory.
        compat: ``transformers-4`` saves files beside the weights that transformers 4.57 reads as well as 5.
        dtype: ``auto`` saves each tensor in the dtype that it trains in; ``keep`` and ``fp32`` save the
            optimizer's fp32 masters where it keeps any; ``bf16`` and ``fp16`` cast those.
        max_shard_size: bytes, or a number with a decimal unit.
        config: the model's config, its file or directory; by default the model's own.
        base_model: name of an adapter's base, if its config does not state it.
        weights_only: save weights alone: no config, no tokenizer, names unchanged.
        card: write a model card, ``README.md``.
        overwrite: replace an existing output once the new one is complete.
        verify: verify every byte before the output appears.
        sha256: write ``SHA256SUMS``.
        step: optimizer steps taken, for the card; by default what a DeepSpeed engine counts.
        workers: number of threads of each rank; by default the machine's processors divided among its ranks.
        timeout: seconds without progress after which the other ranks give a rank up.

    Returns:
        What was done, on every rank.

    Raises:
        UnsupportedLayout: tensors that cannot be read: on NVMe, cut by pipeline, tensor or expert
            parallelism of DeepSpeed, quantised slices; or ``compat`` names a reader that lacks the model.
        MissingAsset: the model has no config, or OLMo's end tokens are not in the tokenizer.
        RankFailed: another rank failed, was lost, or made no progress; no output appears.
        CkptError: see :mod:`ckpt_tools.errors`; no output appears.
    """
    ranks = from_process_group(timeout)
    with ExitStack() as stack:
        if ranks is not None:
            what = f"save({str(output_dir)!r}, {attribute=}, {adapter=}, {dtype=})"
            stack.enter_context(ranks.session(what))
        found = unwrapped(model)
        found = replace(found, engine=engine_of(found, accelerator))
        facts = facts_of(found, step, 1 if ranks is None else ranks.size)
        holding = holding_of(found, masters=dtype != "auto")
        read_by_all = _wanted(holding, attribute, trained_only=adapter is not None)
        checkpoint = stack.enter_context(offered(ranks, holding, facts, read_by_all))
        threads = workers or _share_of_processors(ranks)
        if checkpoint is None:
            assert ranks is not None
            told: Report = follow(ranks, threads)
            return told
        module = innermost(found.module)
        if attribute is not None:
            module = attribute_of(module, attribute)
        _check_adapter(module, adapter, weights_only=weights_only)
        files = stack.enter_context(
            beside(
                module,
                config=config,
                tokenizer=tokenizer,
                is_adapter=adapter is not None,
                is_needed=adapter is None and not weights_only,
            )
        )
        # The model's own config is found, as a conversion finds the one that training saved, so it loses what
        # training set for itself. Only a config that was passed is a named one.
        own = files.config if config is None else None
        request = Request(
            command=_command(adapter, attribute),
            output=Path(output_dir),
            attribute=attribute,
            adapter=adapter,
            adapter_config=files.adapter_configs,
            base_model=base_model,
            names_base=False,
            config=None if own else files.config,
            search=() if own is None else (own.parent,),
            tokenizer=files.tokenizer,
            chat_template=None if chat_template is None else Path(chat_template),
            generation_config=os.fspath(generation_config),
            compat=compat,
            dtype=dtype,
            max_shard_size=max_shard_size,
            weights_only=weights_only,
            card=card,
            workers=threads,
            overwrite=overwrite,
            sha256=sha256,
            verify=verify,
            ranks=ranks,
            resumable=False,
            check_source=False,
        )
        if adapter is None:
            report = run([checkpoint], request, prepare_model, Clock())
        else:
            source = checkpoint if attribute is None else part_of(checkpoint, attribute)
            report = run([source], request, prepare_adapters, Clock())
        if ranks is not None:
            ranks.put("report", report)
        return report


def _command(adapter: str | None, attribute: str | None) -> str:
    """The command that makes the same directory of a checkpoint on disk."""
    if adapter is not None:
        return "extract-lora"
    return "consolidate" if attribute is None else "extract-attr"


def _wanted(
    holding: Holding, attribute: str | None, *, trained_only: bool
) -> Collection[str] | None:
    """Names of the tensors that will be written, as far as known before planning; None for all."""
    if attribute is None and not trained_only:
        return None
    names = strip_wrappers([*(held.name for held in holding.tensors), *holding.ties]).names
    inside = {
        holding.ties.get(name, name)
        for name, plain in names.items()
        if attribute is None or f"{plain}.".startswith(f"{attribute}.")
    }
    return {
        held.name
        for held in holding.tensors
        if held.name in inside and (held.kind == "parameter" or not trained_only)
    }


def _check_adapter(module: Any, adapter: str | None, *, weights_only: bool) -> None:
    """Raise UsageError for an adapter that the model lacks, and for a PEFT model if none is named."""
    known = dict(module.peft_config) if hasattr(module, "get_base_model") else {}
    if adapter is None:
        if known and not weights_only:
            raise UsageError(
                f"the model has adapters: {', '.join(known)}",
                hint=f"Pass adapter={next(iter(known))!r}: This saves the adapter alone, as PEFT does.",
            )
    elif not known or adapter not in {*known, "all"}:
        raise UsageError(
            f"the model has no adapter {adapter!r}",
            hint=f"It has: {', '.join(known) or 'none, because it is not a PEFT model'}.",
        )


def _share_of_processors(ranks: Ranks | None) -> int:
    """One thread a processor, divided among the ranks of the machine."""
    beside_me = 1 if ranks is None else ranks.machines.count(ranks.machines[ranks.rank])
    return max(min(len(os.sched_getaffinity(0)) // beside_me, default_workers()), 1)
