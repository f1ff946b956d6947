"""Owns checkpoints of one torch file a rank, each with a part of every tensor: verl, Accelerate, plain loops.

The files of a set are found by their names, must be complete, and must agree with each other.
:mod:`~ckpt_tools.readers.containers.dtensor` finds the elements that a rank holds. A tensor that every rank
holds whole is taken from one rank. Files of optimizer and extra state have other names and are not opened.

Sources: verl ``utils/checkpoint/fsdp_checkpoint_manager.py``; ``accelerate/utils/fsdp_utils.py``
(``save_fsdp_model``), read at 1.15; ``torch/distributed/fsdp/_state_dict_utils.py`` (the three kinds of
state dict of FSDP1), read at 2.13.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ckpt_tools.errors import DamagedCheckpoint, listed
from ckpt_tools.readers.containers.dtensor import Part, Run, part_of
from ckpt_tools.readers.containers.restricted_pickle import TensorRef
from ckpt_tools.readers.containers.torch_file import TorchFile, refuse_exchanged
from ckpt_tools.readers.containers.weight_files import refuse_odd_names
from ckpt_tools.readers.rank_files.content import state_dict_in
from ckpt_tools.readers.rank_files.copies import differ
from ckpt_tools.readers.rank_files.local_state import KIND as FLAT
from ckpt_tools.readers.rank_files.local_state import is_local, local_parts
from ckpt_tools.readers.rank_files.names import (
    RANK,
    is_proven,
    part_named,
    rank_in,
    sets_in,
    writer_of,
)
from ckpt_tools.readers.trainer_state import trainer_step
from ckpt_tools.storage.regular import content_of
from ckpt_tools.tensors.catalogue import Box, FlatRange, Stored
from ckpt_tools.tensors.checkpoint import Checkpoint, Location, Weight
from ckpt_tools.tensors.deferred import DeferredFragment, Place
from ckpt_tools.tensors.fragments import assembled
from ckpt_tools.tensors.threads import garbage_kept, read_each

NAME = "rank-files"
_STEP = re.compile(r"global_step_(\d+)")
# A file can claim any number of ranks, so the list of missing names has a limit.
_NAMED = 1000
_OTHER_NODES = (
    "Each node may have written to its own disk: copy the rank files of every node into this "
    "directory, or pass their folders with --also DIR."
)
_OTHER_SAVE = "A file of another save is among them. Take all files from one save."
_OTHER_COPY = (
    "Take all files from one save. If they are, the ranks held copies that drifted apart in training: "
    "broadcast the parameter from one rank in the training script, and save again."
)


def find(path: Path, tag: str | None = None) -> list[Location]:
    """The checkpoints of this format to which ``path`` leads.

    Args:
        path: the directory of the files, or one of them.
        tag: the name of one of several sets: ``world_size_8``, ``pytorch_model_fsdp_0``.
    """
    if path.is_file():
        if (tag := part_named(path.name)) is None:
            return []
        path = path.parent
    parts = sets_in(path)
    if tag is not None and tag != path.name:
        parts = {name: files for name, files in parts.items() if name == tag}
    parts = {name: files for name, files in parts.items() if is_proven(files)}
    near = (path, path.parent, path.parent.parent)
    return [Location(NAME, path, name, near, part=name) for name in parts]


@dataclass(frozen=True)
class _RankFile:
    """The content of one rank's file: its part of each tensor, in the order of its state dict."""

    rank: int
    path: Path
    parts: Mapping[str, Part]
    world_size: int | None


def read(location: Location) -> Checkpoint:
    """Read a checkpoint's metadata.

    Raises:
        DamagedCheckpoint: ranks are missing, or of different saves.
        UnsupportedLayout: FSDP1 LOCAL files without the names of the parameters.
    """
    found = sets_in(location.directory).get(location.part or "", {})
    if not found:
        raise DamagedCheckpoint("its files no longer exist", path=location.directory)
    first = next(iter(found.values())).name
    writer = writer_of(first)
    config: dict[str, object] = {}
    named = None
    if writer == "verl":
        named = int((location.part or "").rpartition("_")[2])
        _expect(found, named)
        config = _config(location.directory, named)
    with garbage_kept():
        ranks = _read_ranks(found)
    world_size = _world_size(ranks, named)
    _expect(found, world_size)
    with garbage_kept():
        joined = _Joined(ranks)
    kinds = {part.kind for file in ranks for part in file.parts.values()} - {"plain"}
    version = config.get("FSDP_version", 1 if kinds & {"ShardedTensor", FLAT} else None)
    shapeless = frozenset(joined.shapeless)
    remarks = [*location.remarks, *joined.remarks]
    if shapeless:
        remarks.append(
            f"an FSDP1 LOCAL state: the shapes of {len(shapeless)} parameters are not recorded; "
            "consolidate takes them from the config of the model"
        )
    return Checkpoint(
        location=location,
        title=f"FSDP{version if type(version) is int else ''} rank files",
        weights=joined.weights,
        ties=joined.ties,
        files={p: p.stat().st_size for p in sorted(location.directory.iterdir()) if p.is_file()},
        step=_step(location.directory),
        world_size=world_size,
        framework=writer,
        details={"kinds": sorted(kinds) or ["plain"]},
        remarks=tuple(remarks),
        shapeless=shapeless,
    )


def _expect(found: Mapping[int, Path], world_size: int) -> None:
    """Check that every rank has a file.

    Raises:
        DamagedCheckpoint: files are missing; the error lists their names.
    """
    count = world_size - sum(rank < world_size for rank in found)
    if count:
        other = next(iter(found.values()))
        lost = (rank for rank in range(world_size) if rank not in found)
        names = [RANK.sub(str(rank), other.name) for rank in islice(lost, _NAMED)]
        raise DamagedCheckpoint(
            f"{count} of {world_size} ranks are missing: {listed(names, total=count)}",
            path=other.parent,
            missing=names,
            hint=_OTHER_NODES,
        )


def _config(directory: Path, world_size: int) -> dict[str, object]:
    """The config that newer versions of verl write.

    Raises:
        DamagedCheckpoint: it belongs to a run with another number of ranks.
    """
    path = directory / "fsdp_config.json"
    try:
        config = json.loads(content_of(path).decode())
        recorded = config.get("world_size", world_size)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"cannot be read ({error})", path=path) from error
    if recorded != world_size:
        raise DamagedCheckpoint(
            f"it states {recorded} ranks, the files beside it are of {world_size}",
            path=path,
            hint=_OTHER_SAVE,
        )
    return dict(config)


def _load(path: Path) -> Mapping[str, Any]:
    file = TorchFile(path)
    content = file.load()
    refuse_exchanged(file, rank_in)
    if not isinstance(content, dict):
        raise DamagedCheckpoint("its content is not a state dict", path=path)
    refuse_odd_names(content, path)
    found = state_dict_in(content, path)
    refuse_odd_names(found, path)
    return found


def _read_ranks(found: Mapping[int, Path]) -> list[_RankFile]:
    paths = list(found.values())
    states = list(zip(paths, read_each(_load, paths), strict=True))
    if any(is_local(content) for _, content in states):
        parts = local_parts(states)
    else:
        parts = [_parts(path, content) for path, content in states]
    ranks = []
    for (rank, path), held in zip(found.items(), parts, strict=True):
        _own_file(rank, path, held.values())
        sizes = {part.world_size for part in held.values() if part.world_size is not None}
        ranks.append(_RankFile(rank, path, held, max(sizes, default=None)))
    return ranks


def _parts(path: Path, content: Mapping[str, Any]) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for name, value in content.items():
        if name.endswith("_extra_state") and not isinstance(value, TensorRef):
            continue  # extra state of a module is not a weight
        part = part_of(value, path, name)
        if part is None:
            raise DamagedCheckpoint("it is not a tensor", path=path, tensor=name)
        parts[name] = part
    return parts


def _own_file(rank: int, path: Path, parts: Iterable[Part]) -> None:
    recorded = {part.rank for part in parts if part.rank is not None} - {rank}
    if recorded:
        raise DamagedCheckpoint(
            f"its name states rank {rank}, its content rank {min(recorded)}",
            path=path,
            hint="It was renamed, or copied over the file of another rank. Copy it anew.",
        )


def _world_size(ranks: Sequence[_RankFile], named: int | None) -> int:
    """The number of ranks that saved, from the names of the files or else from their content.

    Raises:
        DamagedCheckpoint: a file belongs to a run with more ranks.
    """
    recorded = [file.world_size for file in ranks if file.world_size is not None]
    known = named or min(recorded, default=ranks[-1].rank + 1)
    for file in ranks:
        # A mesh may have fewer ranks than the run, so a smaller number is not a contradiction.
        if max(file.world_size or 0, file.rank + 1) > known:
            raise DamagedCheckpoint(
                f"it belongs to a run with more ranks than the {known} of the other files",
                path=file.path,
                hint=_OTHER_SAVE,
            )
    return known


class _PartFragment(DeferredFragment):
    """A fragment of a rank's file. Its storage is looked up when its bytes are requested."""

    __slots__ = ("_run",)
    _run: Run

    def __init__(self, run: Run, region: FlatRange | Box) -> None:
        super().__init__(region)
        object.__setattr__(self, "_run", run)

    def find_place(self) -> Place:
        """See the base class."""
        return self._run.place


class _Joined:
    """The tensors of all ranks put together.

    Attributes:
        weights: every tensor, in the order of the first rank's state dict.
        ties: second names.
        remarks: names of tensors whose copies differ between ranks.
        shapeless: names of tensors of which only the number of elements is known.
    """

    def __init__(self, ranks: Sequence[_RankFile]) -> None:
        self._ranks = ranks
        self._differing: list[str] = []
        self._sharded = any(p.kind != "plain" for file in ranks for p in file.parts.values())
        self.weights: dict[str, Weight] = {}
        self.ties: dict[str, str] = {}
        places: dict[object, str] = {}
        named = dict.fromkeys(name for file in ranks for name in file.parts)
        starts = Counter(_start(ranks, name) for name in named)
        for name in named:
            held = [(file, file.parts[name]) for file in ranks if name in file.parts]
            self._agree(name, held)
            runs = [run for _, part in held for run in part.runs]
            # Names of one tensor start at one place; few others do, and the place has a part of each rank.
            place = _place(runs) if starts[_start(ranks, name)] > 1 else ()
            first = places.setdefault(place or name, name)
            if first == name:
                self.weights[name] = self._weight(name, held[0][1], runs)
            else:
                self.ties[name] = first
        self.shapeless = {
            name for file in ranks for name, part in file.parts.items() if part.kind == FLAT
        } & self.weights.keys()
        self.remarks: list[str] = []
        if self._differing:
            names = listed(self._differing)
            self.remarks.append(f"copies differ between ranks, the first rank's are taken: {names}")

    def _agree(self, name: str, held: Sequence[tuple[_RankFile, Part]]) -> None:
        (file, part), *others = held
        for other, its in others:
            if (its.dtype, its.shape, its.kind) != (part.dtype, part.shape, part.kind):
                raise DamagedCheckpoint(
                    f"here it is a {its.kind} tensor {its.dtype} {its.shape}, in {file.path.name} a "
                    f"{part.kind} tensor {part.dtype} {part.shape}",
                    path=other.path,
                    tensor=name,
                    hint=_OTHER_SAVE,
                )

    def _weight(self, name: str, part: Part, runs: Sequence[Run]) -> Weight:
        distinct: dict[Box, Run] = {}
        for run in runs:
            kept = distinct.setdefault(run.box, run)
            if kept is not run and differ(kept, run):
                self._differs(name, part, run)
        stored = self._stored(name, part, list(distinct.values()))
        # In a sharded model the parameters are sharded, and tensors that every rank holds whole are buffers.
        trained = part.dtype.is_floating and (part.kind != "plain" or not self._sharded)
        kind = "parameter" if trained else "buffer"
        return Weight(kind, part.shape, part.dtype, model=stored)  # type: ignore[arg-type]

    def _differs(self, name: str, part: Part, run: Run) -> None:
        """Refuse different copies of a matrix; each rank may have its own copy of a statistic."""
        if len(part.shape) > 1:
            raise DamagedCheckpoint(
                "two ranks hold the same elements with different values",
                path=run.ref.storage.path,
                tensor=name,
                hint=_OTHER_COPY,
            )
        if name not in self._differing:
            self._differing.append(name)

    def _stored(self, name: str, part: Part, runs: Sequence[Run]) -> Stored:
        pieces = [(run.box, partial(_PartFragment, run)) for run in runs]
        source, hint = self._ranks[0].path.parent, _OTHER_NODES
        lacking = [file.path for file in self._ranks if name not in file.parts]
        if lacking:
            having = [file.path for file in self._ranks if name in file.parts]
            source, hint = min(lacking, having, key=len)[0], f"Not every rank has it. {_OTHER_SAVE}"
        return assembled(name, part.dtype, part.shape, pieces, source, hint)


def _start(ranks: Sequence[_RankFile], name: str) -> object:
    """Equal for two names of one tensor: where its first run starts."""
    for file in ranks:
        part = file.parts.get(name)
        if part is not None and part.runs:
            ref = part.runs[0].ref
            return id(ref.storage), ref.storage_offset, part.runs[0].start
    return name


def _place(runs: Sequence[Run]) -> object:
    """Equal for two names of one tensor: on each rank, the same elements of one storage."""
    return tuple(
        (id(run.ref.storage), run.ref.storage_offset, run.ref.shape, run.start, run.box)
        for run in runs
    )


def _step(directory: Path) -> int | None:
    """The step in the name of verl's directory, or else in the Trainer's record."""
    for name in (directory.name, directory.parent.name):
        if match := _STEP.fullmatch(name):
            return int(match[1])
    return trainer_step(directory)
