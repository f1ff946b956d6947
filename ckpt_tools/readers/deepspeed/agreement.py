"""Owns the proof that the shard files of a directory belong to one save of one run.

The proof compares what every file states about itself: rank, world size, step, version, settings. It finds
missing ranks and files of another step before the content of the files is used.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_tools.errors import CkptError, DamagedCheckpoint, listed, rank_ranges
from ckpt_tools.readers.containers.restricted_pickle import TensorRef
from ckpt_tools.readers.counts import counted

NODE_LOCAL = (
    "If the run saved to node-local storage, they are on the other machines: copy the folder of every "
    "machine here, or pass it with --also DIR."
)
SAME_SAVE = "Keep only the files of one save in this directory, and move the others away."


@dataclass(frozen=True)
class ModelState:
    """The used content of a ``*_model_states.pt`` file."""

    path: Path
    rank: int
    content: dict[str, Any]

    def get(self, key: str) -> Any:
        """A top-level entry, or None."""
        return self.content.get(key)


@dataclass(frozen=True)
class OptimState:
    """The used content of a ``*_optim_states.pt`` file."""

    path: Path
    rank: int
    stage: int | None
    flat_groups: Sequence[TensorRef]
    intervals: Sequence[Sequence[TensorRef]] | None
    content: dict[str, Any]
    config: dict[str, Any]
    version: str | None
    step: object
    hyperparameters: object
    param_shapes: object

    def get(self, key: str) -> Any:
        """An entry of ``optimizer_state_dict``, or None."""
        return self.content.get(key)


def stated_world_size(
    directory: Path, first: ModelState, optims: Sequence[OptimState], stage: int
) -> int:
    """The data-parallel world size that the files state."""
    counts: Counter[int] = Counter()
    for optim in optims:
        count = optim.get("partition_count")
        stated = max(count, default=0) if isinstance(count, list) else count or 0
        counts[counted(stated, "ranks", optim.path)] += 1
    if len(counts) > 1:
        raise mixed(
            directory, "world size", {o.path.name: o.get("partition_count") for o in optims}
        )
    stated = next(iter(counts), 0)
    dp = first.get("dp_world_size")
    if not stated:
        return counted(dp or max(len(optims), 1), "ranks", first.path)
    # MiCS saves one of the groups of ranks among which it partitions; the others hold the same.
    if stage == 3 and stated == _mics_group(first):
        return stated
    if stage and isinstance(dp, int) and dp != stated:
        raise DamagedCheckpoint(
            f"{first.path.name} states {dp} ranks, the optimizer files state {stated}",
            path=directory,
            hint=SAME_SAVE,
        )
    return stated


def _mics_group(first: ModelState) -> object:
    config = first.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    return zero.get("mics_shard_size") if isinstance(zero, dict) else None


def without_optimizer(directory: Path, stage: int) -> CkptError:
    """The error for a save without optimizer files."""
    name = f"ZeRO-{stage}" if stage else "BF16_Optimizer"
    return _lost(
        f"a {name} checkpoint without its optimizer files, which hold "
        + ("the weights" if stage == 3 else "the masters"),
        stage,
        directory,
        ["zero_pp_rank_*_optim_states.pt"],
        "",
    )


def missing_optims(
    world_size: int, directory: Path, optims: Sequence[OptimState]
) -> CkptError | None:
    """The error for a save without the optimizer files of some ranks; None if all are present."""
    present = {optim.rank for optim in optims}
    lacking = [rank for rank in range(world_size) if rank not in present]
    if not optims or not lacking:
        return None
    return _missing("optim", lacking, world_size, directory, optims)


def check_models(world_size: int, directory: Path, models: Sequence[ModelState]) -> tuple[str, ...]:
    """Check that every rank of stage 3 has its model file, or that no missing file is needed.

    Returns:
        A remark if files are missing.

    Raises:
        DamagedCheckpoint: the missing files hold frozen parameters, or buffers of rank 0.
    """
    present = {model.rank for model in models}
    lacking = [rank for rank in range(world_size) if rank not in present]
    if not lacking:
        return ()
    frozen = models[0].get("frozen_param_shapes")
    if frozen or (0 in lacking and models[0].get("buffer_names")):
        raise _missing("model", lacking, world_size, directory, models)
    ranks = rank_ranges(lacking)
    fact = f"{len(lacking)} of {world_size} model files are missing ({ranks})"
    return (f"{fact}; no parameter is frozen, so they hold no weights",)


def _missing(
    kind: str,
    lacking: Sequence[int],
    world_size: int,
    directory: Path,
    states: Sequence[ModelState] | Sequence[OptimState],
) -> CkptError:
    example, rank_text = states[0].path.name, re.compile(r"zero_pp_rank_\d+_")
    names = [rank_text.sub(f"zero_pp_rank_{rank}_", example) for rank in lacking]
    stage = states[0].stage if isinstance(states[0], OptimState) else 3
    return _lost(
        f"{len(lacking)} of {world_size} {kind}_states files are missing: {rank_ranges(lacking)}",
        1 if stage is None else stage,
        directory,
        names,
        f"Expected {names[0]}" + (" and so on. " if len(names) > 1 else ". "),
    )


def _lost(
    fact: str, stage: int, directory: Path, missing: Sequence[str], expected: str
) -> CkptError:
    whole = "" if stage == 3 else "The 16-bit weights are whole: --weights model takes them. "
    return DamagedCheckpoint(
        fact, path=directory, missing=missing, hint=whole + expected + NODE_LOCAL
    )


def check_extra(
    stage: int,
    world_size: int,
    directory: Path,
    models: Sequence[ModelState],
    optims: Sequence[OptimState],
) -> None:
    """No file is of a rank that did not exist."""
    kinds: list[tuple[str, Sequence[ModelState] | Sequence[OptimState]]] = [("optim", optims)]
    if stage == 3:
        kinds.append(("model", models))
    for kind, states in kinds:
        extra = sorted({state.rank for state in states} - set(range(world_size)))
        if extra:
            strays = [state.path for state in states if state.rank in extra]
            raise DamagedCheckpoint(
                f"there are {kind}_states files of {rank_ranges(extra)}, but the save had "
                f"{world_size} ranks",
                path=strays[0],
                hint=f"The files of ranks 0 to {world_size - 1} belong together. Move these away: "
                f"{listed([path.name for path in strays])}.",
            )
    if stage < 3 and len(models) > 1:
        raise DamagedCheckpoint(
            f"the model files are of ZeRO-3, the optimizer files of stage {stage}",
            path=directory,
            hint=SAME_SAVE,
        )


def check_agreement(
    directory: Path, models: Sequence[ModelState], optims: Sequence[OptimState]
) -> None:
    """Check that steps, versions and settings are equal in all files."""
    for key, meaning in (
        ("global_steps", "step"),
        ("dp_world_size", "world size"),
        ("ds_version", "DeepSpeed version"),
        ("global_samples", "number of samples"),
        ("skipped_steps", "number of skipped steps"),
    ):
        _agree(directory, meaning, {m.path.name: m.get(key) for m in models})
    named = {o.path.name: o for o in optims}
    _agree(directory, "optimizer step", {n: o.step for n, o in named.items()})
    _agree(directory, "optimizer settings", {n: o.hyperparameters for n, o in named.items()})
    _agree(
        directory,
        "number of flat groups",
        {n: len(o.flat_groups) for n, o in named.items()},
    )
    everything = {m.path.name: m.get("ds_version") for m in models}
    everything |= {n: o.version for n, o in named.items() if o.version is not None}
    _agree(directory, "DeepSpeed version", everything)
    settings = {m.path.name: _settings(m.get("ds_config")) for m in models}
    settings |= {n: _settings(o.config) for n, o in named.items()}
    _agree(directory, "training settings (ds_config)", settings)


def _settings(config: Any) -> object:
    """The part of ``ds_config`` that is equal on all ranks of a run; None if it was not recorded."""
    if not isinstance(config, dict) or not config:
        return None
    keys = ("optimizer", "bf16", "fp16", "train_batch_size", "gradient_accumulation_steps")
    zero = config.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    return repr([(key, config.get(key)) for key in keys] + [("stage", stage)])


def _agree(directory: Path, meaning: str, values: dict[str, Any]) -> None:
    known = {name: value for name, value in values.items() if value is not None}
    if any(value != next(iter(known.values())) for value in known.values()):
        raise mixed(directory, meaning, known)


def mixed(directory: Path, meaning: str, values: dict[str, Any]) -> DamagedCheckpoint:
    """The error for files of several saves; it names a file of the minority."""
    common, _ = Counter(map(repr, values.values())).most_common(1)[0]
    odd = {name: value for name, value in values.items() if repr(value) != common}
    # Values may differ and look the same, as NaN does.
    name, value = next(iter((odd or values).items()))
    more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
    shown = (
        (f" ({value!r} in {name}{more}, {common} in the others)")
        if len(common) < 40
        else (f" ({name}{more} differ from the others)")
    )
    return DamagedCheckpoint(
        f"the files belong to different saves: they differ in {meaning}{shown}",
        path=directory,
        hint=SAME_SAVE,
    )
