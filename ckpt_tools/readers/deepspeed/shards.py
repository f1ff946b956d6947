"""The shard files of a raw DeepSpeed checkpoint: which there are, and whether they belong together.

Owns file names and the pickled keys. That the files are of one save is proven by
:mod:`~ckpt_tools.readers.deepspeed.agreement`; what the flat groups mean is the business of
:mod:`~ckpt_tools.readers.deepspeed.layout`.

Sources: ``deepspeed/runtime/engine.py`` (``_get_ckpt_name``, ``_get_zero_ckpt_name``,
``_common_checkpoint_state``), ``runtime/zero/stage_1_and_2.py`` and ``stage3.py`` (``state_dict``),
``runtime/bf16_optimizer.py``, ``checkpoint/constants.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ckpt_tools.errors import DamagedCheckpoint, UnsupportedLayout
from ckpt_tools.readers.containers.restricted_pickle import Opaque, TensorRef
from ckpt_tools.readers.containers.torch_file import TorchFile, refuse_exchanged
from ckpt_tools.readers.deepspeed.agreement import (
    NODE_LOCAL,
    SAME_SAVE,
    ModelState,
    OptimState,
    check_agreement,
    check_ranks,
    mixed,
    stated_world_size,
)
from ckpt_tools.storage.pool import read_at
from ckpt_tools.tensors.threads import pool

MODEL_FILE = re.compile(r"(?:zero_pp_rank_(?P<dp>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt")
OPTIM_FILE = re.compile(
    r"(?P<prefix>bf16_|fp16_)?zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_?optim_states\.pt"
)
_FOREIGN = {
    "native mixture-of-experts": re.compile(
        r"(layer_\d+_)?expert_\d+_mp_rank_\d+_model_states\.pt"
    ),
    "pipeline-parallel": re.compile(r"layer_\d+-.*model_states\.pt"),
}


@dataclass(frozen=True)
class ShardSet:
    """All shards of one save, agreed with each other.

    Attributes:
        directory: where they lie.
        models: model files in rank order: one for stages 0 to 2, one a rank for stage 3.
        optims: optimizer files in rank order; none for stage 0.
        stage: ZeRO stage; BF16_Optimizer files count as stage 1.
        is_bf16_optimizer: written by ``BF16_Optimizer``, which records no stage.
        world_size: data-parallel world size.
        files: path to size in bytes of every shard.
    """

    directory: Path
    models: Sequence[ModelState]
    optims: Sequence[OptimState]
    stage: int
    is_bf16_optimizer: bool
    world_size: int
    files: dict[Path, int]

    @property
    def first(self) -> ModelState:
        """Global rank 0's model file, which alone holds what is the same on all ranks."""
        return self.models[0]

    @property
    def param_shapes(self) -> object:
        """Names and shapes of the trained parameters; up to DeepSpeed 0.5 in the optimizer files."""
        recorded = self.first.get("param_shapes")
        return recorded if recorded is not None or not self.optims else self.optims[0].param_shapes


# Of model files other than rank 0's; with a thousand ranks the rest is hundreds of megabytes.
_KEPT_OF_EVERY_RANK = (
    "global_steps",
    "global_samples",
    "skipped_steps",
    "dp_world_size",
    "ds_version",
    "ds_config",
    "frozen_param_fragments",
)


def is_shard_directory(path: Path) -> bool:
    """Whether the directory itself holds shards of a raw DeepSpeed checkpoint."""
    try:
        return any(MODEL_FILE.fullmatch(entry.name) for entry in path.iterdir())
    except OSError:
        return False


def open_shards(directory: Path) -> ShardSet:
    """Read the metadata of every shard and prove that they belong to one save.

    Raises:
        DamagedCheckpoint: files are missing, truncated, or of different saves.
        UnsupportedLayout: tensor- or pipeline-parallel shards, or native MoE.
    """
    names = sorted(entry.name for entry in directory.iterdir() if entry.is_file())
    for layout, pattern in _FOREIGN.items():
        found = [name for name in names if pattern.fullmatch(name)]
        if found:
            raise UnsupportedLayout(
                f"a {layout} checkpoint ({len(found)} files such as {found[0]})",
                path=directory,
                hint="This layout is not read yet; DeepSpeed's ds_to_universal.py may help.",
            )
    model_names = _by_rank(directory, names, MODEL_FILE)
    optim_names = _by_rank(directory, names, OPTIM_FILE)
    models = _in_parallel(_read_model, [directory / model_names[r] for r in sorted(model_names)])
    optims = _in_parallel(_read_optim, [directory / optim_names[r] for r in sorted(optim_names)])
    if not models:
        raise DamagedCheckpoint(
            "no *_model_states.pt file",
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
        stage = 1  # up to DeepSpeed 0.6 one class served both, and wrote the number of the second
    if not optims and config_stage and first.get("optimizer") is None:
        raise DamagedCheckpoint(
            f"a ZeRO-{config_stage} checkpoint without its optimizer files, which hold the weights",
            path=directory,
            missing=["zero_pp_rank_*_optim_states.pt"],
            hint=NODE_LOCAL,
        )
    world_size = stated_world_size(directory, first, optims, stage)
    paths = [*(model.path for model in models), *(optim.path for optim in optims)]
    sizes = {path: path.stat().st_size for path in paths}
    shards = ShardSet(
        directory,
        models,
        optims,
        stage,
        is_bf16_optimizer,
        world_size,
        sizes,
    )
    check_ranks(shards.stage, world_size, directory, models, optims)
    check_agreement(directory, models, optims)
    return shards


def _by_rank(directory: Path, names: Iterable[str], pattern: re.Pattern[str]) -> dict[int, str]:
    """File names by data-parallel rank; refuses two files for one rank and model parallelism."""
    found: dict[int, str] = {}
    for name in names:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        if int(match["mp"]) > 0:
            raise UnsupportedLayout(
                f"a tensor- or pipeline-parallel checkpoint ({name})",
                path=directory,
                hint="Only data-parallel ZeRO checkpoints are read so far.",
            )
        rank = int(match["dp"] or 0)
        if rank in found:
            raise DamagedCheckpoint(
                f"files of two saves lie in one directory: {found[rank]} and {name} are both rank {rank}",
                path=directory,
                hint=SAME_SAVE,
            )
        found[rank] = name
    return found


T = TypeVar("T")


def _in_parallel(read: Callable[[Path], T], paths: Sequence[Path]) -> list[T]:
    """Read many small pickles; on a shared file system the wait for each is what takes time."""
    if len(paths) < 4:
        return [read(path) for path in paths]
    with pool(16) as threads:
        return list(threads.map(read, paths))


def _read_model(path: Path) -> ModelState:
    match = MODEL_FILE.fullmatch(path.name)
    assert match is not None
    content = _load_own(path, MODEL_FILE)
    if not isinstance(content, dict) or "module" not in content:
        raise DamagedCheckpoint(
            "not a model file of DeepSpeed: it has no `module`", path=path, hint=SAME_SAVE
        )
    if content["module"] is None:
        raise UnsupportedLayout("a pipeline-parallel checkpoint (its `module` is None)", path=path)
    rank = int(match["dp"] or 0)
    if rank:
        content = {key: content.get(key) for key in _KEPT_OF_EVERY_RANK}
    return ModelState(path, rank, content)


def _load_own(path: Path, names: re.Pattern[str]) -> Any:
    """The content of a rank's file that was saved as the file of this rank."""

    def rank_of(name: str) -> tuple[int, int] | None:
        match = names.fullmatch(name)
        return None if match is None else (int(match["dp"] or 0), int(match["mp"]))

    file = TorchFile(path)
    content = file.load()
    refuse_exchanged(file, rank_of)
    return content


def _read_optim(path: Path) -> OptimState:
    match = OPTIM_FILE.fullmatch(path.name)
    assert match is not None
    content = _load_own(path, OPTIM_FILE)
    state = content.get("optimizer_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise DamagedCheckpoint("not an optimizer file of DeepSpeed", path=path, hint=SAME_SAVE)
    groups = state.get("fp32_flat_groups", state.get("single_partition_of_fp32_groups"))
    # Up to DeepSpeed 0.3, stage 1: a rank has a partition in each of several intervals of a group.
    intervals = state.get("local_sub_partitions_of_fp32_groups")
    if groups is None and isinstance(intervals, list) and all(map(_is_tensors, intervals)):
        groups = [partitions[0] for partitions in intervals if partitions]
    if not isinstance(groups, list) or not all(isinstance(g, TensorRef) for g in groups):
        raise DamagedCheckpoint(
            "its fp32 groups are missing or are not tensors",
            path=path,
            hint="If the optimizer was swapped to NVMe, its masters are not in this file.",
        )
    base = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
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


def _enum_value(value: Any, path: Path) -> int | None:
    """The stage: a number, or DeepSpeed's ``ZeroStageEnum`` kept as an inert name and argument."""
    if isinstance(value, Opaque) and len(value.args) == 1:
        value = value.args[0]
    if value is None or (isinstance(value, int) and 0 <= value <= 3):
        return value
    raise DamagedCheckpoint(f"its zero_stage is {value!r}, which is none", path=path)


def _optimizer_step(state: dict[str, Any], base: Any) -> object:
    """The optimizer's own step counter, wherever this optimizer keeps it; None if it counts none."""
    if "base_optimizer_state_step" in state:
        return state["base_optimizer_state_step"]
    groups = base if isinstance(base, list) else []
    if isinstance(base, dict):
        for group in base.get("param_groups") or []:
            if isinstance(group, dict) and isinstance(group.get("step"), int):
                return group["step"]
        groups = list((base.get("state") or {}).values())
    for entry in groups:
        step = entry.get("step") if isinstance(entry, dict) else None
        if isinstance(step, TensorRef) and step.numel == 1:
            return _scalar(step)
        if isinstance(step, int | float):
            return step
    return None


def _scalar(ref: TensorRef) -> float:
    import struct

    kinds = {"float32": "<f", "float64": "<d", "int64": "<q", "int32": "<i"}
    kind = kinds.get(ref.dtype.name)
    if kind is None:
        return -1.0
    data = read_at(ref.storage.path, ref.byte_offset, ref.dtype.itemsize)
    return float(struct.unpack(kind, data)[0])


def _hyperparameters(base: Any) -> object:
    """Learning rates and the like of every group: the same on all ranks of one save."""
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
