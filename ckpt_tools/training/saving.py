"""The clean save of a model in training: what a conversion of its checkpoint would write, without one.

Owns the arguments of :func:`save` and the order of things. A live model becomes a checkpoint that lies in
the memory of all ranks, and the pipelines of conversion do the rest: the leader plans, every rank writes its
share of the bytes, and what lies in another rank's memory is asked for in bounded blocks. Nothing is
gathered. Knows no frameworks and no layouts.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_tools.conversion.extraction import Extraction, run_extraction
from ckpt_tools.conversion.pipeline import Clock, Request, run
from ckpt_tools.errors import UsageError
from ckpt_tools.hub import AssetOptions
from ckpt_tools.model.state import DTypeChoice, only_state
from ckpt_tools.ranks import Ranks, from_process_group
from ckpt_tools.training.beside import beside
from ckpt_tools.training.facts import engine_of, facts_of
from ckpt_tools.training.holding import Holding
from ckpt_tools.training.live import offered, part_of
from ckpt_tools.training.state_dict import holding_of
from ckpt_tools.training.wrappers import attribute_of, innermost, unwrapped
from ckpt_tools.transforms.prefixes import strip_wrappers
from ckpt_tools.writing.bytes import default_workers
from ckpt_tools.writing.delivery import follow
from ckpt_tools.writing.output import Writing

if TYPE_CHECKING:
    from ckpt_tools.conversion.options import PathLike
    from ckpt_tools.conversion.report import Report

TIMEOUT_SECONDS = 600.0


def save(
    model: Any,
    output_dir: PathLike,
    *,
    accelerator: Any = None,
    tokenizer: Any = None,
    attribute: str | None = None,
    adapter: str | None = None,
    generation_config: str | os.PathLike[str] = "auto",
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

    To be called on every rank, with the same arguments, between two steps. The directory is, byte for
    byte, the one that :func:`ckpt_tools.consolidate` (or ``extract_lora``) makes from the framework's own
    checkpoint of the same step; only the manifest says that it is from memory. It appears when it is
    complete. No rank gathers the model: each reads its own memory, and asks the others for what it writes of
    theirs, in buffers whose size does not depend on the model.

    Args:
        model: what training calls: the model itself, or wrapped by Accelerate, DistributedDataParallel,
            DeepSpeed (stages 0 to 3), FSDP1 or FSDP2; or a DeepSpeed engine.
        output_dir: the directory to make; the same for all ranks.
        accelerator: the accelerator that prepared the model, if one did.
        tokenizer: a tokenizer or processor, or the directory of one.
        attribute: dotted path of the part of a composite model to save, such as ``policy``.
        adapter: save this adapter alone, as PEFT does; ``all`` saves each.
        generation_config: ``auto``, ``olmo``, ``none``, or a file or directory.
        dtype: ``auto`` saves each tensor in the dtype that it trains in; ``keep`` and ``fp32`` save the
            optimizer's fp32 masters where it keeps any; ``bf16`` and ``fp16`` cast those.
        max_shard_size: bytes, or a number with a decimal unit.
        config: the model's config, its file or directory; by default the model's own.
        base_model: what an adapter's base is called, where its config does not say.
        weights_only: save weights alone: no config, no tokenizer, names as they are.
        card: write a model card, ``README.md``.
        overwrite: replace an existing output once the new one is complete.
        verify: verify every byte before the output appears.
        sha256: write ``SHA256SUMS``.
        step: optimizer steps taken, for the card; by default what a DeepSpeed engine counts.
        workers: number of threads of each rank; by default the machine's processors divided among its ranks.
        timeout: seconds that a rank may make no progress before the others give up on it.

    Returns:
        What was done, on every rank.

    Raises:
        UnsupportedLayout: tensors lie where or in a way that they are not read: on NVMe, cut by pipeline,
            tensor or expert parallelism of DeepSpeed, quantised slices.
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
        generation = os.fspath(generation_config)
        assets = AssetOptions(files.config, files.tokenizer, generation_config=generation)
        writing = Writing(
            threads,
            overwrite=overwrite,
            sha256=sha256,
            verify=verify,
            ranks=ranks,
            resumable=False,
        )
        target = Path(output_dir)
        if adapter is not None:
            extraction = Extraction(
                target=target,
                adapter=adapter,
                adapter_config=files.adapter_configs,
                lora_alpha=None,
                base_model=base_model,
                assets=assets,
                dtype=dtype,
                copy="master",
                check_all_masters=False,
                writing=writing,
                needs_base=False,
            )
            source = checkpoint if attribute is None else part_of(checkpoint, attribute)
            report = run_extraction(source, extraction, Clock())
        else:
            request = Request(
                target=target,
                attribute=attribute,
                combine=only_state,
                title=None,
                beside=(),
                dtype=dtype,
                copy="master",
                assets=assets,
                max_shard_size=max_shard_size,
                weights_only=weights_only,
                card=card,
                trust_remote_code=False,
                check_all_masters=False,
                writing=writing,
                command="consolidate" if attribute is None else "extract-attr",
                beside_tensors={},
            )
            report = run([checkpoint], request, Clock())
        if ranks is not None:
            ranks.put("report", report)
        return report


def _wanted(
    holding: Holding, attribute: str | None, *, trained_only: bool
) -> Collection[str] | None:
    """Names of what will be written, as far as can be told before planning; None for everything."""
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
    """Raise UsageError unless the adapter is there, and for a PEFT model without one to save."""
    known = dict(module.peft_config) if hasattr(module, "get_base_model") else {}
    if adapter is None:
        if known and not weights_only:
            raise UsageError(
                f"the model has adapters: {', '.join(known)}",
                hint=f"Pass adapter={next(iter(known))!r}: the adapter alone is saved, as PEFT does.",
            )
    elif not known or adapter not in {*known, "all"}:
        raise UsageError(
            f"the model has no adapter {adapter!r}",
            hint=f"It has: {', '.join(known) or 'none; it is no PEFT model'}.",
        )


def _share_of_processors(ranks: Ranks | None) -> int:
    """One thread a processor, divided among the ranks of the machine."""
    beside_me = 1 if ranks is None else ranks.machines.count(ranks.machines[ranks.rank])
    return max(min(len(os.sched_getaffinity(0)) // beside_me, default_workers()), 1)
