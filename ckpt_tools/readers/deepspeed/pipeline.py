"""Owns pipeline-parallel saves: numbered layers, with a file each, that are divided among stages.

The weights of layer ``N`` are in ``layer_NN-model_TT-model_states.pt``, one file for each tensor-parallel
rank, with names without the number. Masters are in the optimizer files of each stage and tensor-parallel
rank (``mp_rank_MM``: stages count first), with the names of the pipeline module: ``N.rest``. A module that
several layers share is ``tied_modules.KEY.rest`` there; its first use has a file, later ones may have none.

A tensor keeps its name in the pipeline module. A key map gives its name on the Hub.

Sources: ``deepspeed/runtime/pipe/module.py`` (``save_state_dict``, ``ckpt_layer_path``),
``runtime/pipe/topology.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.readers.containers.restricted_pickle import TensorRef
from ckpt_tools.readers.containers.torch_file import stored
from ckpt_tools.readers.deepspeed.agreement import NODE_LOCAL, SAME_SAVE
from ckpt_tools.readers.deepspeed.layout import (
    BY_MAPPING,
    group_shapes,
    mapped_masters,
    partitioned_masters,
)
from ckpt_tools.readers.deepspeed.names import LAYER_FILE, SaveNames, load_own
from ckpt_tools.readers.deepspeed.saves import Save, joined, open_all
from ckpt_tools.readers.deepspeed.shards import ShardSet
from ckpt_tools.readers.deepspeed.weights import Part, default_dtype
from ckpt_tools.tensors.catalogue import Stored
from ckpt_tools.tensors.checkpoint import Location, Weight

_TIED = "tied_modules."
_PARALLEL = "checkpoint_parallel_dimensions"

Layers = dict[int, dict[str, TensorRef]]


def read_pipeline(names: SaveNames, location: Location) -> tuple[Save, Part]:
    """A pipeline.

    Raises:
        DamagedCheckpoint: files of layers or ranks are missing.
    """
    shards = open_all(names)
    whole = next((one.first for one in shards if one.first.content["module"] is not None), None)
    if whole is not None:
        raise DamagedCheckpoint(
            f"files of a pipeline's layers, such as {names.layers[0]}, are beside a model file that has "
            "all weights",
            path=whole.path,
            hint=SAME_SAVE,
        )
    layers = _layers(names)
    width = len(layers)
    stages = len(shards) // width
    if stages * width != len(shards):
        raise DamagedCheckpoint(
            f"there are files of {len(shards)} model-parallel ranks, but layers of {width} "
            "tensor-parallel ranks",
            path=names.directory,
            hint=NODE_LOCAL,
        )
    parts = [
        _part([shards[stage * width + rank] for stage in range(stages)], layers[rank])
        for rank in range(width)
    ]
    sizes = {
        names.directory / name: (names.directory / name).stat().st_size for name in names.layers
    }
    layout = f"pipeline of {stages} stages" + (", tensor parallel" if width > 1 else "")
    return Save(shards, layout, sizes), joined(shards[:width], parts, location)


def _layers(names: SaveNames) -> list[Layers]:
    """The tensors of each layer, for each tensor-parallel rank.

    Raises:
        DamagedCheckpoint: the file of a rank is missing for a layer.
    """
    found: dict[int, Layers] = {}
    for name in names.layers:
        match = LAYER_FILE.fullmatch(name)
        assert match is not None
        content = load_own(names.directory / name)
        tensors = {key: ref for key, ref in content.items() if isinstance(ref, TensorRef)}
        found.setdefault(int(match["tp"] or 0), {})[int(match["layer"])] = tensors
    every = sorted({layer for layers in found.values() for layer in layers})
    for rank, layers in found.items():
        lacking = [layer for layer in every if layer not in layers]
        if lacking or sorted(found) != list(range(len(found))):
            raise DamagedCheckpoint(
                f"the layers {lacking} lack the file of tensor-parallel rank {rank}",
                path=names.directory,
                missing=[
                    f"layer_{layer:02d}-model_{rank:02d}-model_states.pt" for layer in lacking
                ],
                hint=NODE_LOCAL,
            )
    return [found[rank] for rank in sorted(found)]


def _part(stages: Sequence[ShardSet], layers: Layers) -> Part:
    """The tensors of all stages of one tensor-parallel rank."""
    masters: dict[str, Stored] = {}
    doubts: list[str] = []
    flat: set[str] = set()
    trained: dict[str, int | None] = {}
    for stage in stages:
        found, doubt = _masters(stage)
        trained |= _trained(stage, found)
        flat |= set(found) if stage.param_shapes is None else set()
        # A module that several stages share is equal on all of them.
        masters = {**found, **masters}
        doubts += doubt
    models = {
        f"{layer}.{key}": ref for layer, tensors in layers.items() for key, ref in tensors.items()
    }
    models = _tied_named(models, trained)
    lost = next((stage.lost for stage in stages if stage.lost is not None), None)
    buffers = {name for stage in stages for name in stage.first.get("buffer_names") or ()}
    if lost is not None:
        masters = {}
    weights = {}
    for name in dict.fromkeys((*models, *masters)):
        master = masters.get(name)
        model = stored(models[name]) if name in models else None
        if (
            master is not None
            and model is not None
            and name in flat
            and master.numel == model.numel
        ):
            master = replace(master, shape=model.shape)
        if master is not None and model is not None and master.shape != model.shape:
            raise DamagedCheckpoint(
                f"its shape is {model.shape} in the layer's file and {master.shape} in the optimizer files",
                path=model.fragments[0].file,
                tensor=name,
            )
        held = master or model
        assert held is not None
        kind = (
            "buffer"
            if name in buffers
            else "frozen"
            if trained and name not in trained
            else "parameter"
        )
        dtype = model.dtype if model is not None else default_dtype(stages[0], held)
        weights[name] = Weight(kind, held.shape, dtype, master, model)  # type: ignore[arg-type]
    remarks = [remark for stage in stages for remark in stage.remarks]
    lacking = [name for name in masters if name not in models]
    if lacking:
        raise DamagedCheckpoint(
            f"{len(lacking)} parameters have a master and no layer's file, such as {lacking[0]}",
            path=stages[0].directory,
            missing=[f"layer_{lacking[0].split('.')[0]:0>2}-model_00-model_states.pt"],
            hint=NODE_LOCAL,
        )
    return Part(weights, {}, remarks, doubts, lost)


def _tied_named(
    models: Mapping[str, TensorRef], trained: Mapping[str, int | None]
) -> dict[str, TensorRef]:
    """The layers' tensors by their names in the module; shared modules have no number.

    If a layer's tensor is not trained by its numbered name, it belongs to a shared module with the same rest
    of the name and the same size. The first use is taken for all.

    Args:
        models: the tensors by number and name in the layer.
        trained: the names of the trained parameters in the module, with their sizes where those are known.
    """
    named = dict(models)
    free = [name for name in models if name not in trained]
    for tied, numel in trained.items():
        if not tied.startswith(_TIED):
            continue
        rest = tied.removeprefix(_TIED).partition(".")[2]
        uses = [
            name
            for name in free
            if name.partition(".")[2] == rest and numel in (None, models[name].numel)
        ]
        for name in uses:
            named.pop(name, None)
        if uses:
            named = {tied: models[uses[0]], **named}
    return named


def _trained(stage: ShardSet, masters: Mapping[str, Stored]) -> dict[str, int | None]:
    """The names of a stage's trained parameters, with their sizes where those are known."""
    if masters:
        return {name: master.numel for name, master in masters.items()}
    if stage.param_shapes is not None:
        groups = group_shapes(stage.param_shapes, stage.first.path)
        return {name: math.prod(shape) for group in groups for name, shape in group.items()}
    # Without ZeRO the model file has the optimizer's state of its own rank.
    optimizer = stage.first.get("optimizer")
    mappings = optimizer.get("param_slice_mappings") if isinstance(optimizer, dict) else None
    return {name: None for group in mappings or () for name in group}


def _masters(shards: ShardSet) -> tuple[dict[str, Stored], list[str]]:
    """The masters of one stage, by the names in its files."""
    if shards.lost is not None or not shards.optims:
        return {}, []
    if shards.param_shapes is not None:
        return partitioned_masters(shards)
    masters: dict[str, Stored] = {}
    for index in range(len(shards.optims[0].flat_groups)):
        masters |= mapped_masters(shards, index)
    return masters, [BY_MAPPING]
