"""Owns the search for DeepSpeed checkpoints, and the kind of each of their tensors.

A tensor is a trained parameter, a frozen one, a buffer or a second name. The formats are ZeRO stages 0 to 3
and ``BF16_Optimizer``. Only metadata is read, without DeepSpeed and without code from the files.
:mod:`~ckpt_tools.readers.deepspeed.layout` locates the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt_tools.errors import DamagedCheckpoint, UsageError
from ckpt_tools.readers.containers.torch_file import stored
from ckpt_tools.readers.deepspeed.layout import (
    partitioned_masters,
    sliced_frozen,
    sliced_masters,
    unpartitioned_masters,
)
from ckpt_tools.readers.deepspeed.module import module_tensors
from ckpt_tools.readers.deepspeed.shards import (
    MODEL_FILE,
    OPTIM_FILE,
    ShardSet,
    is_shard_directory,
    open_shards,
)
from ckpt_tools.storage.folders import by_number, entries_of
from ckpt_tools.tensors.catalogue import Stored
from ckpt_tools.tensors.checkpoint import Checkpoint, Location, Weight
from ckpt_tools.tensors.dtypes import BFLOAT16, FLOAT16, FLOAT32, DType

NAME = "deepspeed"


def find(path: Path, tag: str | None = None) -> list[Location]:
    """The checkpoints of this format to which ``path`` leads.

    Args:
        path: a directory with ``latest``, a tag's directory, a directory with one or more tags, or
            one of a checkpoint's files.
        tag: the name of one of several checkpoints.

    Returns:
        One location, several to choose from, or none if there is no checkpoint of this format.

    Raises:
        UsageError: ``tag`` does not exist.
        DamagedCheckpoint: the directory in ``latest`` is missing, outside, or not a checkpoint.
    """
    if path.is_file():
        if not (
            path.name == "latest"
            or MODEL_FILE.fullmatch(path.name)
            or OPTIM_FILE.fullmatch(path.name)
        ):
            return []
        path = path.parent
    if is_shard_directory(path) or any(OPTIM_FILE.fullmatch(e.name) for e in entries_of(path)):
        if tag is not None and tag != path.name:
            raise UsageError(
                f"this directory holds the shards of {path.name!r}, not of {tag!r}",
                path=path,
                hint="Omit --tag, or pass the directory above.",
            )
        return [_location(path, path.parent)]
    tags = [entry for entry in entries_of(path) if entry.is_dir() and is_shard_directory(entry)]
    names = [entry.name for entry in tags]
    latest = path / "latest"
    if tag is not None:
        if tag in names:
            return [_location(path / tag, path)]
        if not tags and not latest.is_file():
            return []
        raise UsageError(
            f"there is no checkpoint with the tag {tag!r}",
            path=path,
            hint=f"Found: {', '.join(names) or 'none'}.",
        )
    if latest.is_file():
        return [_follow_latest(path, latest, names)]
    return [_location(entry, path) for entry in tags]


def _location(directory: Path, root: Path, remarks: tuple[str, ...] = ()) -> Location:
    near = (directory, root, root.parent)
    return Location(NAME, directory, directory.name, near, remarks)


def _follow_latest(root: Path, latest: Path, names: list[str]) -> Location:
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    hint = (
        f"Pass --tag with one of: {', '.join(names)}."
        if names
        else "There is no checkpoint beside it. The directory may have been moved or deleted."
    )
    if not tag or Path(tag).is_absolute() or ".." in Path(tag).parts:
        raise DamagedCheckpoint(
            f"its content is {tag!r}, which is not a directory beside it", path=latest, hint=hint
        )
    if not _is_directory(root / tag):
        raise DamagedCheckpoint(
            f"its content is {tag!r}, but this directory does not exist", path=latest, hint=hint
        )
    if not any(
        MODEL_FILE.fullmatch(e.name) or OPTIM_FILE.fullmatch(e.name) for e in entries_of(root / tag)
    ):
        raise DamagedCheckpoint(
            f"its content is {tag!r}, but this directory holds no DeepSpeed shards",
            path=latest,
            hint=hint,
        )
    newer = [name for name in names if by_number(root / name) > by_number(root / tag)]
    remarks = (f"newer than the checkpoint in `latest`: {', '.join(newer)}",) if newer else ()
    return _location(root / tag, root, remarks)


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # the name is too long: `latest` may have any content
        return False


def read(location: Location) -> Checkpoint:
    """Read a checkpoint's metadata.

    Raises:
        DamagedCheckpoint: files are missing, truncated or of different saves.
        UnsupportedLayout: the layout is not supported.
    """
    shards = open_shards(location.directory)
    masters, doubts = _masters(shards)
    reading = _Reading(shards, masters)
    weights = reading.weights()
    remarks = [*location.remarks, *reading.remarks]
    doubts = [] if _round_robin(shards) else doubts
    if not masters:
        remarks, doubts = [*remarks, *doubts], []
    miscounted = _miscounted(shards)
    if miscounted:
        remarks, doubts = [*remarks, miscounted], [*doubts, miscounted]
    first = shards.first
    version = first.get("ds_version")
    name = f"ZeRO-{shards.stage}" if shards.stage else "without ZeRO"
    if shards.is_bf16_optimizer:
        name = "BF16_Optimizer"
    return Checkpoint(
        location=location,
        title=f"DeepSpeed {name}",
        weights=weights,
        ties=reading.ties,
        files=shards.files,
        step=_int(first.get("global_steps")),
        world_size=shards.world_size,
        framework=f"deepspeed {version}" if version else "deepspeed",
        details={
            "stage": shards.stage,
            "flat_groups": len(shards.optims[0].flat_groups) if shards.optims else 0,
            "skipped_steps": _int(first.get("skipped_steps")),
            "round_robin_gradients": _round_robin(shards),
        },
        remarks=tuple(remarks),
        doubts=tuple(doubts),
    )


def _masters(shards: ShardSet) -> tuple[dict[str, Stored], list[str]]:
    if shards.stage == 3:
        return sliced_masters(shards), []
    if shards.stage:
        return partitioned_masters(shards)
    return unpartitioned_masters(shards)


class _Reading:
    """Determines the kind of each tensor of one checkpoint."""

    def __init__(self, shards: ShardSet, masters: Mapping[str, Stored]) -> None:
        self._shards = shards
        self._masters = masters
        self._module = module_tensors(shards.first, masters)
        self._buffers = self._buffer_names()
        self._frozen = sliced_frozen(shards) if shards.stage == 3 else self._frozen_whole()
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
            return set(names)
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
        known = {**self._masters, **self._frozen}
        recorded = self._shards.first.get("shared_params") or {}
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
            dtype = ref.dtype if ref is not None else self._default_dtype(held)
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
            dtype = model.dtype if model is not None else self._default_dtype(master)
            return Weight("parameter", master.shape, dtype, master, model)
        assert model is not None
        kind = "buffer" if name in self._buffers else "frozen"
        if not self._shards.stage and not self._masters and kind == "frozen":
            kind = "parameter"
        return Weight(kind, model.shape, model.dtype, None, model)  # type: ignore[arg-type]

    def _unexplained(self, name: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(
            "it is in `module`, but it is neither trained nor frozen nor a buffer",
            path=self._shards.first.path,
            tensor=name,
        )

    def _default_dtype(self, stored: Stored) -> DType:
        config = self._shards.first.get("ds_config") or {}
        for key, dtype in (("bf16", BFLOAT16), ("bfloat16", BFLOAT16), ("fp16", FLOAT16)):
            section = config.get(key)
            if isinstance(section, dict) and section.get("enabled"):
                return dtype
        return stored.dtype if stored.dtype.is_floating else FLOAT32


def _miscounted(shards: ShardSet) -> str | None:
    """The doubt if optimizer and engine count different steps; before DeepSpeed 0.10 they differ by one."""
    taken, skipped = (_int(shards.first.get(key)) for key in ("global_steps", "skipped_steps"))
    counted = shards.optims[0].step if shards.optims else None
    if not isinstance(counted, int | float) or taken is None or counted < 0:
        return None
    if 0 <= counted - (taken - (skipped or 0)) <= 1:
        return None
    return (
        f"the optimizer counts {counted:g} steps, the model file {taken} ({skipped or 0} of them skipped): "
        "the optimizer was not resumed with the model, or the files are of two saves"
    )


def _round_robin(shards: ShardSet) -> bool:
    config = shards.first.get("ds_config") or {}
    zero = config.get("zero_optimization")
    return bool(zero.get("round_robin_gradients")) if isinstance(zero, dict) else False


def _int(value: object) -> int | None:
    return value if isinstance(value, int) else None
