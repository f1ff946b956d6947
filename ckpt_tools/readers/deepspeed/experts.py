"""Owns mixtures of experts whose experts are divided among ranks: DeepSpeed's own MoE layers, and AutoEP.

The weights of each expert are in a file with its global number (``layer_L_expert_E_...``). The masters are
in the optimizer files, in flat groups that are partitioned among the ranks with the same experts; the names
there have local numbers. In stage 3 (AutoEP alone) there are no files of experts.

AutoEP keeps the experts of a layer of a Hugging Face model as three tensors ``w1``, ``w2`` and ``w3``. Here
they get the names and the form of the model: ``gate_up_proj`` and ``down_proj``.

Sources: ``deepspeed/runtime/engine.py`` (``_save_moe_checkpoint``), ``utils/groups.py``
(``_create_expert_and_data_parallel``), ``module_inject/auto_ep_layer.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckpt_tools.errors import DamagedCheckpoint, UnsupportedLayout
from ckpt_tools.readers.containers.restricted_pickle import TensorRef
from ckpt_tools.readers.containers.torch_file import stored
from ckpt_tools.readers.counts import counted, counted_all
from ckpt_tools.readers.deepspeed.agreement import NODE_LOCAL, SAME_SAVE, OptimState
from ckpt_tools.readers.deepspeed.joining import Piece, joined, shifted, whole
from ckpt_tools.readers.deepspeed.layout import (
    BY_MAPPING,
    group_masters,
    group_shapes,
    mapped_masters,
    sliced_masters,
)
from ckpt_tools.readers.deepspeed.names import EXPERT_FILE, SaveNames, load_own
from ckpt_tools.readers.deepspeed.saves import Save
from ckpt_tools.readers.deepspeed.shards import ShardSet
from ckpt_tools.readers.deepspeed.weights import Part, default_dtype, masters_of, sorted_part
from ckpt_tools.tensors.catalogue import Shape, Stored
from ckpt_tools.tensors.checkpoint import Weight

_LOCAL = re.compile(
    r"(?P<head>.*\.deepspeed_moe\.experts\.deepspeed_experts\.)(?P<number>\d+)(?P<tail>\..*)"
)
_AUTOEP = "ds_autoep_layers"
_FUSED = re.compile(r"(?P<head>.*\.experts)\.(?P<leaf>w[123])(?:\.(?P<number>\d+))?")


def holds_experts(shards: ShardSet) -> bool:
    """Whether the save has experts that are divided among ranks."""
    return bool(shards.first.get(_AUTOEP) or shards.first.get("num_experts"))


def read_experts(names: SaveNames, shards: Sequence[ShardSet]) -> tuple[Save, Part]:
    """A save whose experts are divided among ranks.

    Raises:
        DamagedCheckpoint: an expert's file is missing.
        UnsupportedLayout: experts and tensor parallelism together.
    """
    first = alone(shards)
    held = _expert_files(names, first)
    dense, experts, doubts = _masters(first)
    if first.param_shapes is None:
        # Up to DeepSpeed 0.18 the model files of mixtures recorded no shapes, but the weights have them.
        dense, experts = _shaped(dense, first.first.content["module"]), _shaped(experts, held)
    part = with_experts(first, {**dense, **experts}, held, doubts)
    files = (*names.experts, *names.expert_optims)
    sizes = {names.directory / name: (names.directory / name).stat().st_size for name in files}
    return Save([first], "AutoEP" if _placed(first) else "native MoE", sizes), part


def alone(shards: Sequence[ShardSet]) -> ShardSet:
    """The one model-parallel rank of a save with experts.

    Raises:
        UnsupportedLayout: there are several.
    """
    if len(shards) > 1:
        raise UnsupportedLayout(
            f"experts and model parallelism together ({len(shards)} model-parallel ranks)",
            path=shards[0].directory,
            hint="Gather model.state_dict() in the training script, and save that with torch.save.",
        )
    return shards[0]


def with_experts(
    shards: ShardSet,
    masters: Mapping[str, Stored],
    held: Mapping[str, TensorRef],
    doubts: list[str],
) -> Part:
    """All tensors of a save, experts under the names of the model.

    Args:
        shards: the files of all but the experts.
        masters: of all tensors; of experts, by global names.
        held: tensors of the files of experts, by name.
        doubts: reasons to compare the masters in full.
    """
    placed = _placed(shards)
    experts = {name: master for name, master in masters.items() if _is_expert(name)}
    dense = {name: master for name, master in masters.items() if name not in experts}
    shapes = {
        name: shape
        for group in _groups(shards)
        for name, shape in group.items()
        if not _is_expert(name)
    }
    routers = _routers(shards, placed)
    part = sorted_part(_without_second_routers(shards, routers), dense, doubts, shapes or None)
    weights = {routers.get(name, name): weight for name, weight in part.weights.items()}
    weights |= _weights(shards, experts, held, placed)
    return replace(part, weights=weights)


def _placed(shards: ShardSet) -> dict[str, Any]:
    """AutoEP's record of each of its layers by the layer's name; nothing for native MoE."""
    return {entry["module_path"]: entry for entry in shards.first.get(_AUTOEP) or ()}


def _groups(shards: ShardSet) -> list[dict[str, Shape]]:
    recorded = shards.param_shapes
    return [] if recorded is None else group_shapes(recorded, shards.first.path)


def _shaped(masters: Mapping[str, Stored], held: Mapping[str, Any]) -> dict[str, Stored]:
    """Flat masters in the shapes of the weights of the same names."""
    shaped = {}
    for name, master in masters.items():
        ref = held.get(name)
        if isinstance(ref, TensorRef) and ref.numel == master.numel:
            master = replace(master, shape=ref.shape)
        shaped[name] = master
    return shaped


def _is_expert(name: str) -> bool:
    return bool(_LOCAL.fullmatch(name) or _FUSED.fullmatch(name))


# The weights in training dtype.


def _expert_files(names: SaveNames, shards: ShardSet) -> dict[str, TensorRef]:
    """The tensors of all files of experts, by name."""
    held: dict[str, TensorRef] = {}
    found: dict[int, set[int]] = {}
    for name in names.experts:
        match = EXPERT_FILE.fullmatch(name)
        assert match is not None
        found.setdefault(int(match["layer"] or 0), set()).add(int(match["expert"]))
        content = load_own(names.directory / name)
        tensors = {key: ref for key, ref in content.items() if isinstance(ref, TensorRef)}
        if not tensors:
            raise DamagedCheckpoint(
                "not a file of an expert: it has no named tensors",
                path=names.directory / name,
                hint=SAME_SAVE,
            )
        held |= tensors
    counts = shards.first.get("num_experts")
    if shards.stage < 3 and isinstance(counts, list):
        lacking = [
            f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt"
            for layer, count in enumerate(counted_all(counts, "experts", shards.first.path))
            for expert in range(count)
            if expert not in found.get(layer, ())
        ]
        if lacking and names.experts and EXPERT_FILE.fullmatch(names.experts[0])["layer"]:  # type: ignore[index]
            raise DamagedCheckpoint(
                f"files of experts are missing ({len(lacking)})",
                path=names.directory,
                missing=lacking,
                hint=f"Expected {lacking[0]}. {NODE_LOCAL}",
            )
    return held


def _weights(
    shards: ShardSet,
    experts: Mapping[str, Stored],
    held: Mapping[str, TensorRef],
    placed: Mapping[str, Any],
) -> Iterator[tuple[str, Weight]]:
    """The weights of all experts, each with its master and its copy in a file, if present."""
    models = _stacked(held) if placed else {name: stored(ref) for name, ref in held.items()}
    masters = dict(experts)
    if placed:
        models, masters = _fused(models), _fused(masters)
    for name in dict.fromkeys((*models, *masters)):
        master, model = masters.get(name), models.get(name)
        either = master or model
        assert either is not None
        if master is not None and model is not None and master.shape != model.shape:
            raise DamagedCheckpoint(
                f"its shape is {model.shape} in the expert's file and {master.shape} in the optimizer files",
                path=shards.directory,
                tensor=name,
            )
        dtype = model.dtype if model is not None else default_dtype(shards, either)
        kind = "parameter" if master is not None or shards.lost or not shards.stage else "frozen"
        yield name, Weight(kind, either.shape, dtype, master, model)  # type: ignore[arg-type]


# The masters.


@dataclass(frozen=True)
class _Holders:
    """The ranks with the same experts, in the order of the partitions of their flat groups."""

    number: int
    optims: Sequence[OptimState]


def _masters(shards: ShardSet) -> tuple[dict[str, Stored], dict[str, Stored], list[str]]:
    """Masters of all other tensors, masters of experts by their global names, and doubts."""
    dense: dict[str, Stored] = {}
    experts: dict[str, Stored] = {}
    if not shards.optims:
        dense, doubts = masters_of(shards)
        return dense, experts, doubts
    doubts = []
    groups: Sequence[Mapping[str, Shape] | None] = _groups(shards)
    if shards.param_shapes is None:
        groups = [None] * len(shards.optims[0].flat_groups)
        doubts.append(BY_MAPPING)
    for index, shapes in enumerate(groups):
        holders = _holders(shards, index)
        if len(holders) == 1:
            found, doubt = _group(shards, holders[0], index, shapes)
            doubts += doubt
            # Each rank may have all experts (expert parallelism of one rank).
            every = {name: master for name, master in found.items() if _is_expert(name)}
            dense |= {name: master for name, master in found.items() if name not in every}
            experts |= _renumbered(shards, [every])
            continue
        slices = []
        for holder in holders:
            found, doubt = _group(shards, holder, index, shapes)
            slices.append(found)
            doubts += doubt
        experts |= _renumbered(shards, slices)
    if experts and shards.stage < 3:
        doubts.append("which ranks hold which experts is inferred from their number")
    return dense, experts, doubts


def _group(
    shards: ShardSet, holders: _Holders, index: int, shapes: Mapping[str, Shape] | None
) -> tuple[dict[str, Stored], list[str]]:
    count = len(holders.optims)
    among = replace(shards, optims=holders.optims, world_size=count)
    if shapes is None:
        return mapped_masters(among, index), []
    if shards.stage < 3:
        return group_masters(among, index, shapes)
    one = [replace(optim, flat_groups=[optim.flat_groups[index]]) for optim in holders.optims]
    return sliced_masters(replace(shards, optims=one, world_size=count), [shapes]), []


def _holders(shards: ShardSet, index: int) -> list[_Holders]:
    """The ranks among which a group is partitioned, for each set of experts."""
    if shards.stage == 3:
        recorded: dict[tuple[int, ...], list[OptimState]] = {}
        for optim in shards.optims:
            groups = optim.get("ds_zero_partition_groups") or []
            ranks = groups[index]["partition_ranks"] if index < len(groups) else ()
            recorded.setdefault(tuple(ranks), []).append(optim)
        for ranks, optims in recorded.items():
            if ranks and [optim.rank for optim in optims] != list(ranks):
                raise DamagedCheckpoint(
                    f"sub-group {index} is recorded for ranks {list(ranks)}, its files are of other ranks",
                    path=optims[0].path,
                )
        return [_Holders(number, optims) for number, optims in enumerate(recorded.values())]
    counts = shards.optims[0].get("partition_count")
    count = int(counts[index]) if isinstance(counts, list) else shards.world_size
    parallel = shards.world_size // count
    config = shards.first.get("ds_config") or {}
    data_first = bool(config.get("use_data_before_expert_parallelism"))
    return [
        _Holders(
            number,
            [
                optim
                for optim in shards.optims
                if (optim.rank // count if data_first else optim.rank % parallel) == number
            ],
        )
        for number in range(parallel)
    ]


def _renumbered(shards: ShardSet, slices: Sequence[Mapping[str, Stored]]) -> dict[str, Stored]:
    """Masters of experts by global names; AutoEP's are in one tensor for all experts."""
    masters: dict[str, Stored] = {}
    local: dict[str, set[str]] = {}
    for name in slices[0]:
        match = _LOCAL.fullmatch(name)
        if match is not None:
            local.setdefault(match["head"], set()).add(match["number"])
            continue
        parts = [found[name] for found in slices]
        experts = _placement(shards, name, [part.shape[0] for part in parts])
        rest = parts[0].shape[1:]
        pieces = [
            Piece(rank, _row(part.shape, at), shifted(part.shape, 0, expert))
            for rank, part in enumerate(parts)
            for at, expert in enumerate(experts[rank])
        ]
        masters[name] = joined(parts, pieces, (sum(map(len, experts)), *rest))
    for number, found in enumerate(slices):
        for name, tensor in found.items():
            match = _LOCAL.fullmatch(name)
            if match is not None:
                expert = int(match["number"]) + number * len(local[match["head"]])
                masters[f"{match['head']}{expert}{match['tail']}"] = tensor
    return masters


def _placement(shards: ShardSet, name: str, counts: Sequence[int]) -> list[list[int]]:
    """The global numbers of the experts that each set of ranks holds."""
    for entry in shards.first.get(_AUTOEP) or ():
        ranks = (entry.get("expert_placement") or {}).get("ranks")
        if ranks and name.startswith(f"{entry['expert_key_prefix']}."):
            return [
                list(map(int, rank["experts"])) for rank in sorted(ranks, key=lambda r: r["rank"])
            ]
    counted(sum(counts), "experts", shards.directory)
    starts = [sum(counts[:index]) for index in range(len(counts))]
    return [list(range(start, start + n)) for start, n in zip(starts, counts, strict=True)]


# AutoEP.


def _row(shape: Shape, index: int) -> Any:
    box = whole(shape)
    return replace(box, offsets=(index, *box.offsets[1:]), sizes=(1, *box.sizes[1:]))


def _stacked(held: Mapping[str, TensorRef]) -> dict[str, Stored]:
    """For each layer one tensor ``w1`` (``w2``, ``w3``) with all experts."""
    numbered: dict[str, dict[int, Stored]] = {}
    for name, ref in held.items():
        match = _FUSED.fullmatch(name)
        if match is not None and match["number"] is not None:
            one = stored(ref, (1, *ref.shape))
            numbered.setdefault(f"{match['head']}.{match['leaf']}", {})[int(match["number"])] = one
    whole_tensors = {}
    for name, experts in numbered.items():
        parts = [experts[number] for number in sorted(experts)]
        pieces = [
            Piece(at, whole(part.shape), shifted(part.shape, 0, at))
            for at, part in enumerate(parts)
        ]
        whole_tensors[name] = joined(parts, pieces, (len(parts), *parts[0].shape[1:]))
    return whole_tensors


def _fused(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors with the names and the form of the Hugging Face model: gate and up in one tensor."""
    made: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        match = _FUSED.fullmatch(name)
        if match is None:
            made[name] = tensor
        elif match["leaf"] == "w2":
            made[f"{match['head']}.down_proj"] = tensor
        elif match["leaf"] == "w1":
            up = tensors[f"{match['head']}.w3"]
            experts, size, *rest = tensor.shape
            first = Piece(0, whole(tensor.shape), (0,) * len(tensor.shape))
            pieces = [first, Piece(1, whole(up.shape), shifted(up.shape, 1, size))]
            shape = (experts, size + up.shape[1], *rest)
            made[f"{match['head']}.gate_up_proj"] = joined([tensor, up], pieces, shape)
    return made


def _routers(shards: ShardSet, paths: Iterable[str]) -> dict[str, str]:
    """The model's name of each router; AutoEP's module also has the name ``router`` for it."""
    called = {}
    for path in paths:
        pattern = re.compile(re.escape(path) + r"\.(?P<attribute>\w+)\.gate\.(?P<leaf>\w+)")
        for match in filter(None, map(pattern.fullmatch, shards.first.content["module"])):
            if match["attribute"] != "router":
                router = f"{path}.router.gate.{match['leaf']}"
                called[router] = f"{path}.{match['attribute']}.{match['leaf']}"
    return called


def _without_second_routers(shards: ShardSet, called: Mapping[str, str]) -> ShardSet:
    """The shards without the second name that AutoEP's module has for each router."""
    second = {f"{p}.gate.{leaf}" for p, _, leaf in (n.rpartition(".") for n in called.values())}
    first = shards.first
    module = {name: value for name, value in first.content["module"].items() if name not in second}
    models = [replace(first, content={**first.content, "module": module}), *shards.models[1:]]
    return replace(shards, models=models)
