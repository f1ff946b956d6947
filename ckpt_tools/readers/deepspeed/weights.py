"""Owns the kind of each tensor of a model-parallel rank: trained or frozen parameter, buffer, second name.

The tensors are those of one :class:`~ckpt_tools.readers.deepspeed.shards.ShardSet`;
:mod:`~ckpt_tools.readers.deepspeed.layout` located their bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckpt_tools.errors import CkptError, DamagedCheckpoint
from ckpt_tools.readers.containers.restricted_pickle import TensorRef
from ckpt_tools.readers.containers.torch_file import stored
from ckpt_tools.readers.deepspeed.layout import (
    group_shapes,
    partitioned_masters,
    sliced_frozen,
    sliced_masters,
    unpartitioned_masters,
)
from ckpt_tools.readers.deepspeed.module import matched_module
from ckpt_tools.readers.deepspeed.shards import ShardSet
from ckpt_tools.tensors.catalogue import Stored
from ckpt_tools.tensors.checkpoint import Replica, Weight
from ckpt_tools.tensors.dtypes import BFLOAT16, FLOAT16, FLOAT32, DType
from ckpt_tools.tensors.regions import Shape


@dataclass
class Part:
    """The tensors of one model-parallel rank, or of several ranks together.

    Attributes:
        weights: every tensor, in the order of the module.
        ties: for each second name, the name in ``weights``.
        remarks: facts for the report that do not prevent reading.
        doubts: reasons to compare the masters with the model copy in full.
        lost: the reason why the masters cannot be read, if any.
        replicas: pairs of copies that tensor-parallel ranks hold of the same elements.
    """

    weights: dict[str, Weight]
    ties: dict[str, str]
    remarks: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    lost: CkptError | None = None
    replicas: list[Replica] = field(default_factory=list)


def masters_of(shards: ShardSet) -> tuple[dict[str, Stored], list[str]]:
    """The masters by name, and the doubts about them."""
    if shards.lost is not None:
        return {}, []
    if shards.stage == 3:
        return sliced_masters(shards), []
    if shards.stage:
        return partitioned_masters(shards)
    return unpartitioned_masters(shards)


def read_part(shards: ShardSet) -> Part:
    """The tensors of one model-parallel rank."""
    masters, doubts = masters_of(shards)
    return sorted_part(shards, masters, doubts)


def sorted_part(
    shards: ShardSet,
    masters: Mapping[str, Stored],
    doubts: list[str],
    shapes: Mapping[str, Shape] | None = None,
    extra: Mapping[str, TensorRef] | None = None,
) -> Part:
    """The tensors of one model-parallel rank, each with its kind.

    Args:
        shards: the files of the rank.
        masters: the optimizer's copies.
        doubts: reasons to compare the masters in full.
        shapes: names and shapes of the trained parameters; by default all recorded ones.
        extra: tensors in training dtype from other files.
    """
    if shapes is None:
        shapes = trained_shapes(shards, masters)
    reading = _Reading(shards, masters, shapes, extra or {})
    weights = reading.weights()
    remarks = [*shards.remarks, *reading.remarks]
    # The mappings are wrong under round robin, and the order of the shapes is right.
    ordered = round_robin(shards) and shards.param_shapes is not None
    doubts = [] if ordered else [*doubts]
    doubts += reading.doubts
    if not masters:
        remarks, doubts = [*remarks, *doubts], []
    miscounted = _miscounted(shards)
    if miscounted:
        remarks, doubts = [*remarks, miscounted], [*doubts, miscounted]
    return Part(weights, reading.ties, remarks, doubts, shards.lost)


class _Reading:
    """Determines the kind of each tensor of one checkpoint."""

    def __init__(
        self,
        shards: ShardSet,
        masters: Mapping[str, Stored],
        shapes: Mapping[str, Shape],
        extra: Mapping[str, TensorRef],
    ) -> None:
        self._shards = shards
        frozen = sliced_frozen(shards) if shards.stage == 3 else self._frozen_whole()
        module = matched_module(
            shards.first,
            {name: shape for name, shape in shapes.items() if name not in extra},
            placeholders=shards.stage == 3,
            others=[*(shards.first.get("buffer_names") or ()), *frozen],
        )
        self._place = module.name
        self._trained = {module.name(name) for name in shapes}
        self._masters = {module.name(name): master for name, master in masters.items()}
        self._frozen = {module.name(name): value for name, value in frozen.items()}
        self._module = {**module.tensors, **extra}
        self._buffers = self._buffer_names()
        self.doubts = list(module.doubts)
        self.remarks: list[str] = []
        self.ties = self._saved_ties()
        self._unsaved = self._placeholders() if shards.stage == 3 else ()
        if self._unsaved:
            self.remarks.append(
                f"frozen or tied parameters without values in any file: {', '.join(self._unsaved)}"
            )

    def _buffer_names(self) -> set[str]:
        recorded = self._shards.first.get("buffer_names")
        names = [] if recorded is None else recorded
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DamagedCheckpoint("its buffer_names are malformed", path=self._shards.first.path)
        if recorded is not None:
            return {self._place(name) for name in names}
        # DeepSpeed 0.3 recorded none. In stages 1 and 2 its param_shapes list every parameter, frozen ones
        # too. In stage 3 its placeholders have one element.
        if self._shards.stage < 3:
            shapes = self._shards.param_shapes
            return (
                {n for n in self._module if n not in shapes} if isinstance(shapes, dict) else set()
            )
        rest = (name for name in self._module if name not in self._masters)
        return {name for name in rest if self._module[name].numel > 1}

    def _frozen_whole(self) -> dict[str, Stored]:
        fragments = self._shards.first.get("frozen_param_fragments") or {}
        shapes = self._shards.first.get("frozen_param_shapes") or {}
        return {
            name: stored(ref, tuple(shapes[name]) if name in shapes else None)
            for name, ref in fragments.items()
        }

    def _tied_names(self) -> dict[str, str]:
        """Second names: recorded ones, and names of tensors that share their bytes with a listed one."""
        known = {**dict.fromkeys(self._trained), **self._masters, **self._frozen}
        shared = self._shards.shared_params
        recorded = {self._place(alias): self._place(kept) for alias, kept in shared.items()}
        # All empty parameters have the same address, which DeepSpeed records as sharing.
        ties = {
            alias: kept
            for alias, kept in recorded.items()
            if alias not in known and self._shape(alias) == self._shape(kept)
        }
        places: dict[tuple[Any, ...], str] = {}
        for name in (*known, *self._module):
            ref = self._module.get(name)
            if ref is None or not ref.numel or name in ties:
                continue
            place = (ref.storage.path, ref.byte_offset, ref.shape, ref.stride)
            first = places.setdefault(place, name)
            if first != name and name not in known:
                ties[name] = first
        return ties

    def _saved_ties(self) -> dict[str, str]:
        """The tied names whose values are in the files; frozen parameters may not have been saved."""
        ties = self._tied_names()
        saved = {*self._masters, *self._frozen, *self._buffers}
        if self._shards.stage < 3:
            saved |= self._module.keys()
        lost = [alias for alias, kept in ties.items() if kept not in saved or kept in ties]
        unheld = [alias for alias in lost if alias not in self._module]
        if unheld:
            self.remarks.append(
                f"second names of parameters that were not saved: {', '.join(unheld)}"
            )
        return {alias: kept for alias, kept in ties.items() if alias not in lost}

    def _placeholders(self) -> tuple[str, ...]:
        """Names in the module of stage 3 without values in any file: old versions did not save them."""
        explained = {*self._masters, *self._frozen, *self._buffers, *self.ties}
        return tuple(n for n, ref in self._module.items() if ref.numel <= 1 and n not in explained)

    def _shape(self, name: str) -> tuple[int, ...] | None:
        ref = self._module.get(name)
        return None if ref is None else ref.shape

    def weights(self) -> dict[str, Weight]:
        """Every tensor, in the order of the module as far as it is recorded."""
        order = dict.fromkeys((*self._module, *self._masters, *self._frozen))
        weights = {}
        for name in order:
            if name not in self.ties and name not in self._unsaved:
                weights[name] = self._weight(name)
        return weights

    def _weight(self, name: str) -> Weight:
        ref = self._module.get(name)
        master = self._masters.get(name)
        if master is not None and ref is None:
            raise DamagedCheckpoint(
                "it has a master, but is missing in `module`",
                path=self._shards.first.path,
                tensor=name,
                hint="The model file belongs to another save than the optimizer files, or was changed.",
            )
        if self._shards.stage == 3 and name not in self._buffers:
            # The module holds empty placeholders, which have the training dtype.
            held = master or self._frozen.get(name)
            if held is None:
                raise self._unexplained(name)
            dtype = ref.dtype if ref is not None else default_dtype(self._shards, held)
            kind = "parameter" if master is not None else "frozen"
            model = None if master is not None else held
            return Weight(kind, held.shape, dtype, master, model)  # type: ignore[arg-type]
        model = stored(ref) if ref is not None else self._frozen.get(name)
        if master is not None:
            if model is not None and model.shape != master.shape:
                raise DamagedCheckpoint(
                    f"its shape is {model.shape} in `module` and {master.shape} in `param_shapes`",
                    path=self._shards.first.path,
                    tensor=name,
                )
            dtype = model.dtype if model is not None else default_dtype(self._shards, master)
            return Weight("parameter", master.shape, dtype, master, model)
        assert model is not None
        kind = "buffer" if name in self._buffers else "frozen"
        if name in self._trained or (not self._shards.stage and not self._masters):
            kind = "parameter" if kind == "frozen" else kind
        return Weight(kind, model.shape, model.dtype, None, model)  # type: ignore[arg-type]

    def _unexplained(self, name: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(
            "it is in `module`, but it is neither trained nor frozen nor a buffer",
            path=self._shards.first.path,
            tensor=name,
        )


def default_dtype(shards: ShardSet, stored: Stored) -> DType:
    """The training dtype in the run's settings, for a tensor without a copy in it."""
    config = shards.first.get("ds_config") or {}
    for key, dtype in (("bf16", BFLOAT16), ("bfloat16", BFLOAT16), ("fp16", FLOAT16)):
        section = config.get(key)
        if isinstance(section, dict) and section.get("enabled"):
            return dtype
    return stored.dtype if stored.dtype.is_floating else FLOAT32


def trained_shapes(shards: ShardSet, masters: Mapping[str, Stored]) -> dict[str, Shape]:
    """Names and shapes of the trained parameters, in the order of the files."""
    if masters or not shards.stage or shards.param_shapes is None:
        return {name: master.shape for name, master in masters.items()}
    groups = group_shapes(shards.param_shapes, shards.first.path)
    return {name: shape for group in groups for name, shape in group.items()}


def _miscounted(shards: ShardSet) -> str | None:
    """The doubt if optimizer and engine count different steps."""
    taken, skipped = (integer(shards.first.get(key)) for key in ("global_steps", "skipped_steps"))
    counted = shards.optims[0].step if shards.optims else None
    if not isinstance(counted, int | float) or taken is None or counted < 0:
        return None
    if 0 <= counted - (taken - (skipped or 0)) <= _steps_before_the_first(shards):
        return None
    return (
        f"the optimizer counts {counted:g} steps, the model file {taken} ({skipped or 0} of them skipped): "
        "the optimizer was not resumed with the model, or the files are of two saves"
    )


def _steps_before_the_first(shards: ShardSet) -> int:
    """Steps that DeepSpeed took to make the state of the optimizer: one before 0.10, then none."""
    version = re.match(r"(\d+)\.(\d+)", str(shards.first.get("ds_version")))
    return 0 if version and (int(version[1]), int(version[2])) >= (0, 10) else 1


def round_robin(shards: ShardSet) -> bool:
    """Whether the run partitioned gradients round robin."""
    config = shards.first.get("ds_config") or {}
    zero = config.get("zero_optimization")
    return bool(zero.get("round_robin_gradients")) if isinstance(zero, dict) else False


def integer(value: object) -> int | None:
    """The value if it is a whole number."""
    return value if isinstance(value, int) else None
