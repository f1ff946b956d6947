"""Which elements a rank holds, against torch's own arithmetic and torch's own cutting of real tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard

from ckpt_tools.errors import CkptError, DamagedCheckpoint, UnsafePickle, UnsupportedLayout
from ckpt_tools.readers.containers.dtensor import Part, part_of
from ckpt_tools.readers.containers.restricted_pickle import Opaque, StorageRef, TensorRef
from ckpt_tools.readers.containers.torch_file import TorchFile
from ckpt_tools.tensors.catalogue import Box, Fragment, Shape, Stored
from ckpt_tools.tensors.dtypes import FLOAT32, DType
from ckpt_tools.tensors.placements import Sharding, local_boxes, local_spans, readings

HERE = Path("rank_0.pt")


def ours(placement: Placement) -> Sharding | None:
    if isinstance(placement, Replicate):
        return None
    factor = placement.split_factor if isinstance(placement, _StridedShard) else 1
    return Sharding(placement.dim, int(factor))


def cut(whole: torch.Tensor, mesh: Shape, at: Shape, placements: list[Placement]) -> torch.Tensor:
    """The part of the rank at ``at``, as torch itself cuts it."""
    for parts, index, placement in zip(mesh, at, placements, strict=True):
        if isinstance(placement, Shard | _StridedShard):
            whole = placement._split_tensor(whole, parts, with_padding=False)[0][index]
    return whole.contiguous()


@st.composite
def shardings(draw: st.DrawFn) -> tuple[Shape, Shape, list[Placement]]:
    """A shape, a mesh, and what each of its axes does to the shape."""
    shape = tuple(draw(st.lists(st.integers(0, 13), min_size=1, max_size=3)))
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    axis = st.integers(0, len(shape) - 1)
    placement = st.one_of(
        st.just(Replicate()),
        axis.map(Shard),
        st.builds(
            lambda dim, factor: _StridedShard(dim, split_factor=factor), axis, st.integers(1, 5)
        ),
    )
    return shape, mesh, [draw(placement) for _ in mesh]


@pytest.mark.slow
@given(shardings())
def test_every_rank_holds_what_torch_gives_it(case: tuple[Shape, Shape, list[Placement]]) -> None:
    shape, mesh, placements = case
    whole = torch.arange(math.prod(shape)).view(shape)
    held: dict[Box, None] = {}
    for at in product(*map(range, mesh)):
        local = cut(whole, mesh, at, placements)
        spans = local_spans(shape, mesh, at, list(map(ours, placements)))
        sizes = tuple(sum(high - low for low, high in axis) for axis in spans)
        torch_sizes, offsets = _compute_local_shape_and_global_offset(
            shape, mesh, list(at), placements
        )
        assert sizes == tuple(torch_sizes) == tuple(local.shape)
        if math.prod(sizes):
            assert tuple(axis[0][0] for axis in spans) == tuple(offsets)
        covered = 0
        for box, start in local_boxes(spans):
            assert start == covered
            covered += box.numel
            inside = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
            stored = local.flatten()[start : start + box.numel].view(box.sizes)
            assert torch.equal(stored, whole[inside])
            held[box] = None
        assert covered == local.numel()
    # All ranks together hold every element, each once but for replicas. Replicas are the same boxes.
    Stored(FLOAT32, shape, [Fragment(HERE, 0, box) for box in held])


@pytest.mark.parametrize(
    ("data", "tensor", "rows"), [(3, 2, 67), (4, 2, 9), (2, 3, 10), (3, 4, 25)]
)
def test_fsdp2_after_tensor_parallelism_cuts_the_parts_that_are_there(
    data: int, tensor: int, rows: int
) -> None:
    """torch notes it as a strided placement, and computes other parts where the rows do not divide evenly."""
    placements = [Sharding(0, split_factor=tensor), Sharding(0)]
    whole = torch.arange(rows)
    for column, part in enumerate(whole.tensor_split(_starts(rows, tensor))):
        for row, local in enumerate(part.tensor_split(_starts(len(part), data))):
            first, *_ = readings((rows,), (data, tensor), (row, column), placements)
            span = (int(local[0]), int(local[-1]) + 1) if len(local) else None
            assert first == (((span,) if span else ()),)


def _starts(length: int, parts: int) -> list[int]:
    """Where ``torch.chunk`` cuts; it may make fewer parts, and the rest of the ranks hold nothing."""
    step = -(-length // parts)
    return [min(step * i, length) for i in range(1, parts)]


def test_a_strided_placement_of_another_factor_has_one_reading() -> None:
    given = [Sharding(0, split_factor=4), Sharding(0)]
    assert len(list(readings((9,), (2, 2), (0, 0), given))) == 1
    across = [Sharding(0, split_factor=2), Sharding(1)]
    assert len(list(readings((9, 9), (2, 2), (0, 0), across))) == 1


def test_a_span_of_whole_rows_is_one_run_and_a_broken_axis_is_cut_by_rows() -> None:
    rows = local_boxes((((2, 4), (6, 7)), ((0, 5),)))
    assert list(rows) == [(Box((2, 0), (2, 5)), 0), (Box((6, 0), (1, 5)), 10)]
    columns = local_boxes((((3, 5),), ((0, 1), (4, 6))))
    assert list(columns) == [
        (Box((3, 0), (1, 1)), 0),
        (Box((3, 4), (1, 2)), 1),
        (Box((4, 0), (1, 1)), 3),
        (Box((4, 4), (1, 2)), 4),
    ]
    assert list(local_boxes(())) == [(Box((), ()), 0)]
    assert list(local_boxes(((), ((0, 5),)))) == []


def test_where_two_axes_are_broken_a_run_is_one_index_of_the_first() -> None:
    spans = (((0, 2), (3, 4)), ((1, 2), (4, 6)), ((0, 2),))
    rows, columns, last = ([i for low, high in held for i in range(low, high)] for held in spans)
    local = torch.arange(4 * 6 * 2).view(4, 6, 2)[rows][:, columns][:, :, last]
    covered = 0
    for box, start in local_boxes(spans):
        inside = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
        whole = torch.arange(4 * 6 * 2).view(4, 6, 2)[inside]
        assert local.flatten()[start : start + box.numel].tolist() == whole.flatten().tolist()
        covered += box.numel
    assert covered == local.numel()


# The pickled form, with what older and newer versions of torch write.


class Storage(StorageRef):
    __slots__ = ("dtype", "numel")
    path = "rank_0.pt"
    data_offset = 64

    def __init__(self, numel: int) -> None:
        self.dtype, self.numel = FLOAT32, numel

    def spend(self, runs: int) -> None:
        pass


def ref(*shape: int) -> TensorRef:
    stride = tuple(torch.empty(shape, device="meta").stride())
    return TensorRef(Storage(math.prod(shape)), FLOAT32, 0, shape, stride)


def opaque(name: str, *args: Any, **state: Any) -> Opaque:
    made = type(name, (Opaque,), {"global_name": name})(*args)
    assert isinstance(made, Opaque)
    made.state = state
    return made


PLACEMENTS = "torch.distributed.tensor.placement_types"
SHARD_0 = opaque(f"{PLACEMENTS}.Shard", dim=0)


def mesh_of(coordinate: Any, **sizes: Any) -> Opaque:
    return opaque(
        "torch.distributed.device_mesh.DeviceMesh", _coordinate_on_dim=coordinate, **sizes
    )


def dtensor(
    shape: Shape, local: object, mesh: Opaque, *placements: Opaque, dtype: DType = FLOAT32
) -> Opaque:
    kind = type("DTensor", (Opaque,), {"global_name": "torch.distributed.tensor.DTensor"})
    made = opaque("torch._utils._rebuild_wrapper_subclass", kind, dtype, shape)
    spec = opaque("DTensorSpec", mesh=mesh, placements=placements)
    made.state = (None, {"_local_tensor": local, "_spec": spec})
    return made


def read(value: object) -> Part:
    part = part_of(value, HERE, "w")
    assert part is not None
    return part


AXES = {"_layout": opaque("L", axes=(opaque("A", shape=(2,)), opaque("A", shape=(3, 2))))}


@pytest.mark.parametrize(
    ("sizes", "world"),
    [
        ({"mesh": ref(2, 6)}, 12),
        ({"_layout": opaque("L", shape=(2, (3, 2)), stride=(6, (2, 1)))}, 12),
        (AXES, 12),
        ({**AXES, "_rank": 5, "_root_mesh": None}, 12),
        (
            {
                **AXES,
                "_rank": 5,
                "_root_mesh": mesh_of(None, _layout=opaque("L", shape=48, stride=1)),
            },
            48,
        ),
    ],
    ids=[
        "a tensor",
        "one layout",
        "a layout an axis",
        "a root of its own",
        "cut from a larger one",
    ],
)
def test_the_mesh_is_read_as_every_version_of_torch_writes_it(sizes: Any, world: int) -> None:
    replicate = opaque(f"{PLACEMENTS}.Replicate")
    part = read(dtensor((7, 4), ref(2, 4), mesh_of([1, 2], **sizes), replicate, SHARD_0))
    assert [run.box for run in part.runs] == [Box((4, 0), (2, 4))]
    assert (part.rank, part.world_size) == (sizes.get("_rank"), world)


def test_a_rank_outside_the_mesh_holds_nothing() -> None:
    assert read(dtensor((7,), ref(0), mesh_of(None, mesh=ref(2)), SHARD_0)).runs == ()


def refused(value: object) -> CkptError:
    with pytest.raises(CkptError) as caught:
        part_of(value, HERE, "w")
    assert (caught.value.path, caught.value.tensor) == (HERE, "w")
    return caught.value


MESH = mesh_of([1], mesh=ref(2))


def test_a_sum_that_was_not_carried_out_is_refused() -> None:
    error = refused(dtensor((4,), ref(4), MESH, opaque(f"{PLACEMENTS}.Partial", reduce_op="sum")))
    assert isinstance(error, UnsupportedLayout)
    assert "Partial" in error.fact
    assert "Redistribute" in str(error.hint)


def test_a_local_part_of_another_class_is_refused_by_name() -> None:
    local = opaque("torch._utils._rebuild_wrapper_subclass")
    local.args = (type("Float8Tensor", (Opaque,), {"global_name": "torchao.Float8Tensor"}),)
    error = refused(dtensor((4,), local, MESH, SHARD_0))
    assert isinstance(error, UnsupportedLayout)
    assert "torchao.Float8Tensor" in error.fact


@pytest.mark.parametrize(
    "value",
    [
        dtensor((4,), ref(3), MESH, SHARD_0),
        dtensor((4,), ref(2), MESH, SHARD_0, SHARD_0),
        dtensor((4,), ref(2), MESH, opaque(f"{PLACEMENTS}.Shard", dim=1)),
        dtensor((4,), ref(2), MESH, opaque(f"{PLACEMENTS}._StridedShard", dim=0, split_factor=0)),
        dtensor(
            (4,), ref(2), MESH, opaque(f"{PLACEMENTS}._StridedShard", dim=0, split_factor=1 << 40)
        ),
        dtensor((4,), ref(2), opaque("DeviceMesh"), SHARD_0),
        dtensor((-4,), ref(2), MESH, SHARD_0),
        dtensor((4,), ref(2), mesh_of([0], mesh=ref(0)), SHARD_0),
        opaque("torch._utils._rebuild_wrapper_subclass"),
    ],
)
def test_a_spec_that_does_not_fit_is_damage(value: Opaque) -> None:
    assert isinstance(refused(value), DamagedCheckpoint)


@pytest.mark.parametrize("value", [3, "text", [ref(2)]])
def test_what_is_no_tensor_is_none(value: object) -> None:
    assert part_of(value, HERE, "w") is None


def test_an_object_that_only_its_own_code_can_build_is_refused() -> None:
    with pytest.raises(UnsafePickle, match=r"os\.system"):
        part_of(opaque("os.system"), HERE, "w")


@pytest.fixture
def new_storage(tmp_path: Path) -> Callable[[], StorageRef]:
    """Storages of a file of its own each, which is shorter than the number of runs that any file may have."""
    torch.save({"w": torch.zeros(1)}, tmp_path / "rank_0.pt")

    def new() -> StorageRef:
        found = TorchFile(tmp_path / "rank_0.pt").load()["w"].storage
        assert isinstance(found, StorageRef)
        return found

    return new


TOO_MANY = "more runs than it has bytes"


def test_placements_cut_a_file_into_no_more_runs_than_it_has_bytes(
    new_storage: Callable[[], StorageRef],
) -> None:
    def local(*shape: int) -> TensorRef:
        return TensorRef(new_storage(), FLOAT32, 0, shape, (0,) * len(shape))

    shard = opaque(f"{PLACEMENTS}._StridedShard", dim=0, split_factor=1 << 15)
    one = dtensor((1 << 16,), local(1 << 15), mesh_of((0,), mesh=ref(2)), shard)
    assert len(read(one).runs) == 1 << 15
    with pytest.raises(DamagedCheckpoint, match=TOO_MANY):
        read(one)
    # A chunk of one element is held by the first of two ranks.
    none = dtensor((1 << 15,), local(0), mesh_of((1,), mesh=ref(2)), shard)
    assert read(none).runs == read(none).runs == ()
    with pytest.raises(DamagedCheckpoint, match=TOO_MANY):
        read(none)
    squared = dtensor((1 << 40,), local(1 << 15), mesh_of((0, 0), mesh=ref(2, 2)), shard, shard)
    with pytest.raises(DamagedCheckpoint, match=TOO_MANY):
        read(squared)
    # Few chunks of the columns are a run in each row.
    columns = opaque(f"{PLACEMENTS}._StridedShard", dim=1, split_factor=32)
    rows = dtensor((1 << 12, 64), local(1 << 12, 32), mesh_of((0,), mesh=ref(2)), columns)
    with pytest.raises(DamagedCheckpoint, match=TOO_MANY):
        read(rows)


def test_shards_are_no_more_than_a_file_has_bytes(new_storage: Callable[[], StorageRef]) -> None:
    held = TensorRef(new_storage(), FLOAT32, 0, (1,), (1,))
    placed = opaque("ShardMetadata")
    placed.state = (None, {"shard_offsets": [0], "shard_sizes": [1]})
    shard = opaque("Shard")
    shard.state = (None, {"tensor": held, "metadata": placed})
    kind = type("ShardedTensor", (Opaque,), {"global_name": "torch.ShardedTensor"})

    def sharded(count: int) -> Opaque:
        made = opaque("torch._utils._rebuild_wrapper_subclass", kind, FLOAT32, (count,))
        group = opaque("ProcessGroup", global_rank=0, global_world_size=1)
        made.state = ([shard] * count, None, group)
        return made

    assert len(read(sharded(1 << 16)).runs) == 1 << 16
    with pytest.raises(DamagedCheckpoint, match=TOO_MANY):
        read(sharded(1 << 16))
