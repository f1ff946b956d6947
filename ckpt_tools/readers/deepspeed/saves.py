"""Owns the step from the parts of model-parallel ranks to one checkpoint.

All ranks of a save must be present and agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.readers.deepspeed.agreement import NODE_LOCAL, SAME_SAVE, check_agreement
from ckpt_tools.readers.deepspeed.names import SaveNames
from ckpt_tools.readers.deepspeed.shards import ShardSet, open_shards
from ckpt_tools.readers.deepspeed.sliced_shapes import ModelShapes, unrecorded
from ckpt_tools.readers.deepspeed.sub_groups import swap_files
from ckpt_tools.readers.deepspeed.tensor_parallel import INFO, SliceRecord
from ckpt_tools.readers.deepspeed.tensor_ranks import TensorRanks
from ckpt_tools.readers.deepspeed.weights import Part, integer, read_part, round_robin
from ckpt_tools.tensors.checkpoint import Checkpoint, Location


@dataclass(frozen=True)
class Save:
    """The shard sets of one save, one for each model-parallel rank that is read.

    Attributes:
        shards: in the order of the model-parallel ranks.
        layout: the name of the layout beside its ZeRO stage, such as ``pipeline-parallel``; may be empty.
        files: path to size in bytes of files that belong to no shard set.
    """

    shards: Sequence[ShardSet]
    layout: str = ""
    files: Mapping[Path, int] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """A title for users."""
        first = self.shards[0]
        name = f"ZeRO-{first.stage}" if first.stage else "without ZeRO"
        if first.is_bf16_optimizer:
            name = "BF16_Optimizer"
        return f"DeepSpeed {name}" + (f", {self.layout}" if self.layout else "")


def open_all(names: SaveNames) -> list[ShardSet]:
    """The shards of every model-parallel rank.

    Raises:
        DamagedCheckpoint: files of a rank are missing, or the ranks' files are of different saves.
    """
    found = names.model_ranks
    shards = [open_shards(names, found[0] if found else 0)]
    first = shards[0].first
    recorded = first.get("mp_world_size")
    stated = recorded if isinstance(recorded, int) else len(found)
    if stated < len(found):
        raise DamagedCheckpoint(
            f"there are files of the model-parallel ranks {found}, but the save had {stated} of them",
            path=names.directory,
            hint=SAME_SAVE,
        )
    shards += [open_shards(names, rank) for rank in found[1:]]
    if stated > len(found) and found == list(range(len(found))):
        example = first.path.name.replace("mp_rank_00", f"mp_rank_{len(found):02d}")
        raise DamagedCheckpoint(
            f"the files of {stated - len(found)} of {stated} model-parallel ranks are missing",
            path=names.directory,
            missing=[example],
            hint=f"Expected {example} and so on. {NODE_LOCAL}",
        )
    if found != list(range(len(found))):
        raise DamagedCheckpoint(
            f"there are files of the model-parallel ranks {found}, but none of the ranks between",
            path=names.directory,
            hint=SAME_SAVE,
        )
    check_agreement(names.directory, [one.first for one in shards], [])
    # Rank 0 alone records second names.
    shared = first.get("shared_params")
    return [shards[0], *(replace(one, shared=shared) for one in shards[1:])]


def read_ranks(shards: Sequence[ShardSet], location: Location) -> tuple[Save, Part]:
    """A save whose model-parallel ranks are tensor-parallel ranks; usually there is one."""
    bare = next((one.first for one in shards if one.first.content["module"] is None), None)
    if bare is not None:
        raise DamagedCheckpoint(
            "a pipeline without the files of its layers: its `module` is None",
            path=bare.path,
            missing=["layer_*-model_states.pt"],
            hint=NODE_LOCAL,
        )
    parts = [read_part(one) for one in shards]
    save = Save(shards, "tensor parallel" if len(shards) > 1 else "")
    return save, joined(shards, parts, location)


def joined(shards: Sequence[ShardSet], parts: Sequence[Part], location: Location) -> Part:
    """The joined parts of tensor-parallel ranks.

    Raises:
        UnsupportedLayout: neither a record nor the model's shapes say how slices are joined.
    """
    if len(parts) == 1:
        return parts[0]
    first = shards[0].first
    info, ranks = first.get(INFO), len(parts)
    if isinstance(info, Mapping):
        return TensorRanks(SliceRecord(info, first.path).pieces, ranks, first.path.parent).part(
            parts
        )
    shapes = location.model_shapes() if location.model_shapes is not None else None
    if shapes is None:
        raise unrecorded(ranks, first.path)
    rule = ModelShapes(shapes, ranks, first.path)
    part = TensorRanks(rule.pieces, ranks, first.path.parent).part(parts)
    doubt = "the shapes of the model alone say how slices are joined"
    return replace(part, remarks=[*part.remarks, rule.remark], doubts=[*part.doubts, doubt])


def checkpoint(location: Location, save: Save, part: Part) -> Checkpoint:
    """The checkpoint of a save."""
    first = save.shards[0]
    version = first.first.get("ds_version") or next((o.version for o in first.optims), None)
    return Checkpoint(
        location=location,
        title=save.title,
        weights=part.weights,
        ties=part.ties,
        files={path: n for one in save.shards for path, n in one.files.items()}
        | {path: n for one in save.shards for path, n in swap_files(one).items()}
        | {**save.files},
        step=integer(first.first.get("global_steps")),
        world_size=first.world_size * len(save.shards),
        framework=f"deepspeed {version}" if version else "deepspeed",
        details={
            "stage": first.stage,
            "flat_groups": len(first.optims[0].flat_groups) if first.optims else 0,
            "skipped_steps": integer(first.first.get("skipped_steps")),
            "round_robin_gradients": round_robin(first),
        },
        remarks=(*location.remarks, *part.remarks),
        doubts=tuple(part.doubts),
        lost=part.lost,
        replicas=tuple(part.replicas),
    )
