"""A model in training as a checkpoint: the memory of all processes, read through one catalogue.

Owns the step from the parts in each process to one ``Checkpoint``. Each process offers its pieces as a
file, in which equal slices have equal offsets on all ranks. A tensor that every rank holds whole is read
by each rank from its own memory if the digests agree, and otherwise from the leader's. The leader puts
the parts together and proves that they cover each tensor once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from ckpt_tools.errors import AttributeNotFound, UnsupportedLayout, listed
from ckpt_tools.ranks import Exchange, Ranks
from ckpt_tools.storage.pool import Pool
from ckpt_tools.tensors.catalogue import Box, FlatRange, Fragment, Shape, Stored
from ckpt_tools.tensors.checkpoint import LIVE, Checkpoint, Copy, Kind, Location, Weight
from ckpt_tools.tensors.dtypes import DType
from ckpt_tools.tensors.fragments import EvenSlices, assembled
from ckpt_tools.training.facts import Facts
from ckpt_tools.training.holding import Held, Holding
from ckpt_tools.training.memory import Memory, Row, copy_bytes, synchronize
from ckpt_tools.transforms.prefixes import strip_wrappers

if TYPE_CHECKING:
    import torch

_NAME = "weights in memory"
_EVERYBODY, _LEADER = "everybody", "leader"
_DIGEST_BYTES = 4 << 20
_SAME_MODEL = (
    "Every rank must pass the same model. Parts that only some ranks have (pipeline and expert parallelism) "
    "are not saved from memory."
)


@dataclass(frozen=True)
class _Told:
    """The message of a rank to the leader about a tensor that it holds.

    Attributes:
        regions: the regions of its pieces, each with its first byte in the rank's file.
        digest: digest of a whole tensor that each rank is to read from its own memory.
    """

    name: str
    copy: Copy
    kind: Kind
    dtype: DType
    shape: Shape
    is_whole: bool
    regions: tuple[tuple[FlatRange | Box, int], ...]
    digest: int | None


@contextmanager
def offered(
    ranks: Ranks | None, holding: Holding, facts: Facts, shared: Collection[str] | None
) -> Iterator[Checkpoint | None]:
    """Offer the memory of this process to all ranks, and read theirs. All ranks enter and leave together.

    Args:
        ranks: the ranks, in a session; None for a single process.
        holding: what this process holds.
        facts: of the checkpoint.
        shared: names of whole parameters that each rank is to read from its own memory; None for all.

    Yields:
        The checkpoint, for the leader; None for the others.

    Raises:
        UnsupportedLayout: the ranks hold tensors that do not fit together.
    """
    rank = 0 if ranks is None else ranks.rank
    rows = {_EVERYBODY: Row(), _file_of(rank): Row()}
    synchronize([piece.tensor for held in holding.tensors for piece in held.pieces])
    told = tuple(
        _told(held, rows, rank, ranks is not None and (shared is None or held.name in shared))
        for held in holding.tensors
    )
    if rank == 0:
        rows[_LEADER] = rows[_EVERYBODY]
    memory = Memory(f"memory of rank {rank}", rows)
    try:
        if ranks is None:
            pool = Pool(Path(LIVE), [memory])
            yield _checkpoint([(told, holding.ties)], pool, facts)
            return
        tables = ranks.gather("held", (told, holding.ties))
        with Exchange(ranks, memory) as exchange:
            others = [r for r in range(ranks.size) if r != rank]
            places = [exchange.place(f"memory of rank {other}", (other,)) for other in others]
            pool = Pool(Path(LIVE), [memory, *places], key=f"{LIVE}-{ranks.session_number}")
            yield None if tables is None else _checkpoint(tables, pool, facts)
    finally:
        memory.close()


def part_of(checkpoint: Checkpoint, attribute: str) -> Checkpoint:
    """The checkpoint of one attribute of a composite model, as if it were a model of its own.

    Raises:
        AttributeNotFound: there is none of this name.
    """
    plain = strip_wrappers([*checkpoint]).names
    weights: dict[str, Weight] = {}
    ties: dict[str, str] = {}
    homes: dict[str, str] = {}
    for name, path in plain.items():
        if path.startswith(f"{attribute}."):
            kept, own = checkpoint.ties.get(name, name), path.removeprefix(f"{attribute}.")
            if kept in homes:
                ties[own] = homes[kept]
            else:
                homes[kept], weights[own] = own, checkpoint.weights[kept]
    if not weights:
        tops = Counter(path.split(".")[0] for path in plain.values())
        raise AttributeNotFound(f"the model has no attribute {attribute!r}", choices=tops)
    return replace(checkpoint, weights=weights, ties=ties)


def _file_of(rank: int) -> str:
    return f"rank{rank:05d}"


def _told(held: Held, rows: Mapping[str, Row], rank: int, is_shared: bool) -> _Told:
    row = rows[_EVERYBODY if held.is_whole else _file_of(rank)]
    size = sum(piece.tensor.numel() for piece in held.pieces)
    offset = row.reserve(max(held.room, size) * held.dtype.itemsize)
    regions = []
    for piece in held.pieces:
        row.put(offset, piece.tensor)
        regions.append((piece.region, offset))
        offset += piece.tensor.numel() * held.dtype.itemsize
    digest = None
    if held.is_whole and is_shared and held.kind != "buffer":
        digest = _digest([piece.tensor for piece in held.pieces])
    return _Told(
        held.name,
        held.copy,
        held.kind,
        held.dtype,
        held.shape,
        held.is_whole,
        tuple(regions),
        digest,
    )


def _digest(tensors: Sequence[torch.Tensor]) -> int:
    digest, buffer = xxhash.xxh3_64(), bytearray(_DIGEST_BYTES)
    for tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        for start in range(0, nbytes, _DIGEST_BYTES):
            view = memoryview(buffer)[: min(_DIGEST_BYTES, nbytes - start)]
            copy_bytes(tensor, start, view)
            digest.update(view)
    return digest.intdigest()


_Table = tuple[tuple[_Told, ...], Mapping[str, str]]


def _checkpoint(tables: Sequence[_Table], pool: Pool, facts: Facts) -> Checkpoint:
    """The tables of all ranks as one checkpoint."""
    first, ties = tables[0]
    for rank, table in enumerate(tables[1:], start=1):
        _agree(tables[0], table, rank)
    files = tuple(pool.path(_file_of(rank)) for rank in range(len(tables)))
    weights: dict[str, Weight] = {}
    differing: list[str] = []
    for index, told in enumerate(first):
        parts = [table[index] for table, _ in tables]
        if told.is_whole:
            same = told.digest is not None and len({part.digest for part in parts}) == 1
            if told.digest is not None and not same:
                differing.append(told.name)
            source = _EVERYBODY if same else _LEADER
            places = [(region, pool.path(source), offset) for region, offset in told.regions]
            stored = _stored(told, places, pool.path())
        else:
            stored = _joined(parts, files, pool.path())
        weight = weights.get(told.name) or Weight(told.kind, told.shape, stored.dtype)
        copies: dict[str, Stored] = {told.copy: stored}
        weights[told.name] = replace(weight, **copies)  # type: ignore[arg-type]
    remarks: tuple[str, ...] = ()
    if differing:
        names = listed(differing)
        remarks = (f"differ from rank to rank, rank 0's are taken: {names}",)
    paths = pool.path().iterdir()
    return Checkpoint(
        location=Location(LIVE, Path(LIVE), _NAME, ()),
        title=_NAME,
        weights=weights,
        ties=ties,
        files={path: path.stat().st_size for path in paths},
        step=facts.step,
        world_size=facts.world_size,
        framework=facts.framework,
        remarks=remarks,
    )


def _agree(first: _Table, other: _Table, rank: int) -> None:
    """Raise UnsupportedLayout unless two ranks hold parts of the same tensors."""

    def facts(table: _Table) -> list[tuple[object, ...]]:
        # A rank that holds no part of a master does not know its dtype.
        return [
            (t.name, t.copy, t.kind, t.shape, t.is_whole, t.dtype if t.copy == "model" else None)
            for t in table[0]
        ]

    mine, its = facts(first), facts(other)
    if mine == its and first[1] == other[1]:
        return
    odd = next((a or b for a, b in zip_longest(mine, its) if a != b), None)
    raise UnsupportedLayout(
        f"the tensors of rank {rank} are not those of rank 0",
        tensor=None if odd is None else str(odd[0]),
        hint=_SAME_MODEL,
    )


def _joined(parts: Sequence[_Told], files: Sequence[Path], source: Path) -> Stored:
    """A tensor of which each rank holds a part. A region that several ranks hold is read from the first.

    Raises:
        UnsupportedLayout: they hold it in several dtypes.
        DamagedCheckpoint: the parts leave a hole, or overlap.
    """
    distinct: dict[FlatRange | Box, tuple[Path, int]] = {}
    for part, file in zip(parts, files, strict=True):
        for region, offset in part.regions:
            distinct.setdefault(region, (file, offset))
    holders = [part for part in parts if part.regions] or parts
    if len({part.dtype for part in holders}) > 1:
        raise UnsupportedLayout(
            "the ranks hold it in several dtypes",
            tensor=parts[0].name,
            hint="Give it one dtype on all ranks before the save.",
        )
    places = [(region, file, offset) for region, (file, offset) in distinct.items()]
    return _compact(_stored(holders[0], places, source), files)


def _stored(
    told: _Told, places: Sequence[tuple[FlatRange | Box, Path, int]], source: Path
) -> Stored:
    boxes = [(region, file, at) for region, file, at in places if isinstance(region, Box)]
    if boxes:
        pieces = [(box, partial(Fragment, file, at)) for box, file, at in boxes]
        return assembled(told.name, told.dtype, told.shape, pieces, source, _SAME_MODEL)
    fragments = [Fragment(file, at, region) for region, file, at in places]
    return Stored(told.dtype, told.shape, sorted(fragments, key=_start))


def _start(fragment: Fragment) -> int:
    assert isinstance(fragment.region, FlatRange)
    return fragment.region.start


def _compact(stored: Stored, files: Sequence[Path]) -> Stored:
    """The same tensor; even slices are stated by one number, so a plan for many ranks stays small."""
    if not stored.fragments or not isinstance(stored.fragments[0].region, FlatRange):
        return stored
    first = stored.fragments[0]
    if first.region.numel * len(files) < stored.numel:
        return stored
    slices = EvenSlices(files, first.offset, first.region.numel, stored.numel)
    if list(slices) != list(stored.fragments):
        return stored
    return Stored(stored.dtype, stored.shape, slices)
