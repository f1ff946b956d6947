"""Owns the names of a DeepSpeed checkpoint's shard files, and the keys of their pickled content.

:mod:`~ckpt_tools.readers.deepspeed.agreement` proves that the files belong to one save, and
:mod:`~ckpt_tools.readers.deepspeed.layout` locates the parameters in the flat groups.

Sources: ``deepspeed/runtime/engine.py`` (``_get_ckpt_name``, ``_get_zero_ckpt_name``,
``_common_checkpoint_state``), ``runtime/zero/stage_1_and_2.py`` and ``stage3.py`` (``state_dict``),
``runtime/bf16_optimizer.py``, ``checkpoint/constants.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ckpt_tools.errors import CkptError, DamagedCheckpoint, UnsupportedLayout
from ckpt_tools.readers.containers.restricted_pickle import Opaque, TensorRef
from ckpt_tools.readers.deepspeed.agreement import (
    NODE_LOCAL,
    SAME_SAVE,
    ModelState,
    OptimState,
    check_agreement,
    check_extra,
    check_models,
    missing_optims,
    mixed,
    stated_world_size,
    without_optimizer,
)
from ckpt_tools.readers.deepspeed.names import MODEL_FILE, OPTIM_FILE, SaveNames, load_own
from ckpt_tools.storage.reading import read_at
from ckpt_tools.tensors.threads import read_each


@dataclass(frozen=True)
class ShardSet:
    """All shards of one save, after the proof that they belong together.

    Attributes:
        directory: their directory.
        models: model files in rank order: one for stages 0 to 2, one a rank for stage 3.
        optims: optimizer files in rank order; none for stage 0.
        stage: ZeRO stage; BF16_Optimizer files count as stage 1.
        is_bf16_optimizer: written by ``BF16_Optimizer``, which records no stage.
        world_size: data-parallel world size.
        files: path to size in bytes of every shard.
        lost: the error if the run kept masters but their files are missing.
        remarks: remarks about the files for the report.
        shared: second names, if the file of another rank records them.
    """

    directory: Path
    models: Sequence[ModelState]
    optims: Sequence[OptimState]
    stage: int
    is_bf16_optimizer: bool
    world_size: int
    files: dict[Path, int]
    lost: CkptError | None = None
    remarks: tuple[str, ...] = ()
    shared: Mapping[str, str] | None = None

    @property
    def shared_params(self) -> Mapping[str, str]:
        """For each second name of a parameter, its first name."""
        return self.shared or self.first.get("shared_params") or {}

    @property
    def first(self) -> ModelState:
        """Global rank 0's model file; the values that are equal on all ranks are read from it."""
        return self.models[0]

    @property
    def param_shapes(self) -> object:
        """Names and shapes of the trained parameters; up to DeepSpeed 0.5 from the optimizer files."""
        recorded = self.first.get("param_shapes")
        return recorded if recorded is not None or not self.optims else self.optims[0].param_shapes


# Keys of all model files but rank 0's. With a thousand ranks, the other keys take hundreds of megabytes.
_KEPT_OF_EVERY_RANK = (
    "global_steps",
    "global_samples",
    "skipped_steps",
    "dp_world_size",
    "ds_version",
    "ds_config",
    "frozen_param_fragments",
)


def open_shards(
    names: SaveNames, model_rank: int = 0, *, masters_elsewhere: bool = False
) -> ShardSet:
    """Read the metadata of every shard of one model-parallel rank and prove that they belong to one save.

    Args:
        names: the files of the folder.
        model_rank: the model-parallel rank.
        masters_elsewhere: the masters are not in optimizer files (universal checkpoints).

    Raises:
        DamagedCheckpoint: files are missing, truncated, or of different saves.
    """
    directory = names.directory
    model_names, optim_names = names.models.get(model_rank, {}), names.optims.get(model_rank, {})
    model_ranks = sorted(model_names)
    models = [
        *(_read_model(directory / model_names[rank], whole=True) for rank in model_ranks[:1]),
        *read_each(_read_model, [directory / model_names[rank] for rank in model_ranks[1:]]),
    ]
    optims = read_each(_read_optim, [directory / optim_names[r] for r in sorted(optim_names)])
    if not models:
        raise DamagedCheckpoint(
            "a DeepSpeed checkpoint with no *_model_states.pt file, which has the names and shapes",
            path=directory,
            missing=["*_model_states.pt"],
            hint=NODE_LOCAL,
        )

    first = models[0]
    config_stage = _config_stage(first)
    stages = {optim.stage for optim in optims}
    is_bf16_optimizer = bool(optims) and stages == {None}
    if len(stages) > 1:
        raise mixed(directory, "ZeRO stage", {o.path.name: o.stage for o in optims})
    recorded = next(iter(stages), None)
    stage = recorded if recorded is not None else (1 if is_bf16_optimizer else 0)
    if stage == 2 and config_stage == 1:
        stage = 1  # up to DeepSpeed 0.6 one class implemented both stages, and wrote 2 for both
    lost: CkptError | None = None
    if masters_elsewhere:
        stage = config_stage
    elif not optims and _kept_masters(first, config_stage):
        stage, lost = max(config_stage, 1), without_optimizer(directory, config_stage)
    world_size = stated_world_size(directory, first, optims, stage)
    paths = [*(model.path for model in models), *(optim.path for optim in optims)]
    sizes = {path: path.stat().st_size for path in paths}
    check_extra(stage, world_size, directory, models, optims)
    check_agreement(directory, models, optims)
    lost = lost or missing_optims(world_size, directory, optims) or _selective(first, stage)
    if lost and stage == 3:
        raise lost
    remarks = check_models(world_size, directory, models) if stage == 3 else ()
    optims = [] if lost else optims
    return ShardSet(
        directory, models, optims, stage, is_bf16_optimizer, world_size, sizes, lost, remarks
    )


def _kept_masters(first: ModelState, config_stage: int) -> bool:
    """Whether the run wrote optimizer files, which hold the masters; so does ``BF16_Optimizer``."""
    optimizer = first.get("optimizer")
    if isinstance(optimizer, dict):
        return "single_partition_of_fp32_groups" in optimizer
    return bool(config_stage) or first.get("param_shapes") is not None


def _selective(first: ModelState, stage: int) -> CkptError | None:
    """The error for ZenFlow, which updates the columns of large gradients in the 16-bit weights alone."""
    config = first.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict) or not zero.get("zenflow"):
        return None
    advice = (
        "Save the weights with engine.save_16bit_model and stage3_gather_16bit_weights_on_model_save."
        if stage == 3
        else "--weights model takes the 16-bit weights, which are whole."
    )
    return UnsupportedLayout(
        f"a ZeRO-{stage} checkpoint of ZenFlow, whose masters lack the updates of the selected columns",
        path=first.path,
        hint=advice,
    )


T = TypeVar("T")


def _read_model(path: Path, *, whole: bool = False) -> ModelState:
    match = MODEL_FILE.fullmatch(path.name)
    assert match is not None
    content = load_own(path)
    if not isinstance(content, dict) or "module" not in content:
        raise DamagedCheckpoint(
            "not a model file of DeepSpeed: `module` is missing", path=path, hint=SAME_SAVE
        )
    rank = int(match["dp"] or 0)
    if not whole:
        content = {key: content.get(key) for key in _KEPT_OF_EVERY_RANK}
    return ModelState(path, rank, content)


def _read_optim(path: Path) -> OptimState:
    match = OPTIM_FILE.fullmatch(path.name)
    assert match is not None
    content = load_own(path)
    state = content.get("optimizer_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise DamagedCheckpoint("not an optimizer file of DeepSpeed", path=path, hint=SAME_SAVE)
    groups = state.get("fp32_flat_groups", state.get("single_partition_of_fp32_groups"))
    # In stage 1 of DeepSpeed up to 0.3, a rank has a partition in each of several intervals of a group.
    intervals = state.get("local_sub_partitions_of_fp32_groups")
    if groups is None and isinstance(intervals, list) and all(map(_is_tensors, intervals)):
        groups = [partitions[0] for partitions in intervals if partitions]
    if not isinstance(groups, list) or not all(isinstance(g, TensorRef) for g in groups):
        raise DamagedCheckpoint(
            "its fp32 groups are missing or are not tensors",
            path=path,
            hint="If the optimizer was offloaded to NVMe, its masters are not in this file.",
        )
    base = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
    for group in groups:
        # Kept by the group. Here many files are read at once; a store takes long for each of them.
        with suppress(CkptError):  # raised again where the masters are needed
            _ = group.byte_offset
    return OptimState(
        path=path,
        rank=int(match["dp"]),
        stage=_enum_value(state.get("zero_stage"), path),
        flat_groups=groups,
        intervals=intervals,
        content={k: v for k, v in state.items() if v is not base},
        config=content.get("ds_config") or {},
        version=content.get("ds_version") or state.get("ds_version"),
        step=_optimizer_step(state, base),
        hyperparameters=_hyperparameters(base),
        param_shapes=content.get("param_shapes"),
    )


def _is_tensors(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, TensorRef) for value in values)


# Members of ``ZeroStageEnum`` (``deepspeed/runtime/zero/config.py``).
_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}


def _enum_value(value: Any, path: Path) -> int | None:
    """The stage, from a number or from DeepSpeed's ``ZeroStageEnum``.

    Python pickles a member of an enum as a call with its value; up to 3.11.3, 3.11 pickled its name.
    """
    if isinstance(value, Opaque) and len(value.args) == 1:
        value = value.args[0]
    elif isinstance(value, type) and issubclass(value, Opaque):
        value = _STAGES.get(value.global_name.rpartition(".")[2], value)
    if value is None or (isinstance(value, int) and 0 <= value <= 3):
        return value
    raise DamagedCheckpoint(f"its zero_stage is {value!r}, which is not a ZeRO stage", path=path)


def _optimizer_step(state: dict[str, Any], base: Any) -> object:
    """The optimizer's own step counter, in any of its places; None if it has no counter."""
    if "base_optimizer_state_step" in state:
        return state["base_optimizer_state_step"]
    groups = base if isinstance(base, list) else []
    counters: list[object] = []
    if isinstance(base, dict):
        # Of a group last: Muon's group for Adam has a counter that it never advances.
        counters = [g.get("step") for g in base.get("param_groups") or [] if isinstance(g, dict)]
        groups = list((base.get("state") or {}).values())
    for entry in groups:
        step = entry.get("step") if isinstance(entry, dict) else None
        if isinstance(step, TensorRef) and step.numel == 1:
            return _scalar(step)
        if isinstance(step, int | float):
            return step
    return next((step for step in counters if isinstance(step, int) and step), None)


def _scalar(ref: TensorRef) -> float:
    import struct

    kinds = {"float32": "<f", "float64": "<d", "int64": "<q", "int32": "<i"}
    kind = kinds.get(ref.dtype.name)
    if kind is None:
        return -1.0
    data = read_at(ref.storage.path, ref.byte_offset, ref.dtype.itemsize)
    return float(struct.unpack(kind, data)[0])


def _hyperparameters(base: Any) -> object:
    """Learning rates and other settings of every group, which are equal on all ranks of one save."""
    if not isinstance(base, dict):
        return None
    plain = (int, float, str, bool, tuple, type(None))
    return [
        {k: v for k, v in group.items() if k != "params" and isinstance(v, plain)}
        for group in base.get("param_groups") or []
        if isinstance(group, dict)
    ]


def _config_stage(model: ModelState) -> int:
    config = model.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    return stage if isinstance(stage, int) else 0
