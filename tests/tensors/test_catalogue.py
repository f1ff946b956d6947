"""Any tiling, any window: the moves put together are a slice of the tensor; what does not tile is refused."""

from __future__ import annotations

import math
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ckpt_tools.errors import DamagedCheckpoint, UnsupportedLayout
from ckpt_tools.tensors import tiling
from ckpt_tools.tensors.catalogue import (
    Box,
    Catalogue,
    FlatRange,
    Fragment,
    Move,
    Shape,
    Stored,
    row_major_strides,
    window_slabs,
)
from ckpt_tools.tensors.dtypes import BY_NAME, FLOAT32

INT32 = BY_NAME["int32"]
FILE = Path("f")
Window = tuple[int, int]


class Disk:
    """Files in memory. Each fragment is put into one of three, after some bytes of something else."""

    def __init__(self) -> None:
        self.files = {Path(name): bytearray(b"\xee" * 3) for name in "abc"}

    def put(self, values: np.ndarray, which: int, gap: int, region: FlatRange | Box) -> Fragment:
        path = list(self.files)[which % 3]
        content = self.files[path]
        content += b"\xdd" * gap
        fragment = Fragment(path, len(content), region)
        content += values.tobytes()
        return fragment

    def carry_out(self, moves: list[Move], window: Window) -> np.ndarray:
        """What the moves make of the window; every element must be written once, none outside."""
        size = window[1] - window[0]
        found, written = np.zeros(size, np.int32), np.zeros(size, int)
        for move in moves:
            data = self.files[move.file][move.offset : move.offset + move.nbytes]
            values = np.frombuffer(bytes(data), np.int32).reshape(move.sizes)
            for index in np.ndindex(*move.sizes):
                place = move.at + sum(i * s for i, s in zip(index, move.strides, strict=True))
                assert 0 <= place < size
                found[place] = values[index]
                written[place] += 1
        assert (written == 1).all()
        return found


shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def ranges_of(draw: st.DrawFn) -> tuple[Disk, Stored, np.ndarray]:
    """A tensor in flat ranges, some of them empty, in any files."""
    shape = draw(shapes)
    whole = np.arange(1, math.prod(shape) + 1, dtype=np.int32)
    cuts = draw(st.lists(st.integers(0, whole.size), max_size=8))
    borders = sorted([0, *cuts, whole.size])
    disk, fragments = Disk(), []
    for low, high in pairwise(borders):
        which, gap = draw(st.integers(0, 2)), draw(st.integers(0, 5))
        fragments.append(disk.put(whole[low:high], which, gap, FlatRange(low, high)))
    return disk, Stored(INT32, shape, fragments), whole


@st.composite
def boxes_of(draw: st.DrawFn) -> tuple[Disk, Stored, np.ndarray]:
    """A tensor in boxes, cut again and again along any axis, in any order and files."""
    shape = draw(shapes)
    whole = np.arange(1, math.prod(shape) + 1, dtype=np.int32).reshape(shape)
    boxes = [Box((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        boxes += split(box, axis, draw(st.integers(0, box.sizes[axis])))
    disk, fragments = Disk(), []
    for box in draw(st.permutations(boxes)):
        values = whole[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))]
        fragments.append(disk.put(values, draw(st.integers(0, 2)), draw(st.integers(0, 5)), box))
    return disk, Stored(INT32, shape, fragments), whole.reshape(-1)


def split(box: Box, axis: int, at: int) -> list[Box]:
    def part(low: int, size: int) -> Box:
        offsets, sizes = list(box.offsets), list(box.sizes)
        offsets[axis], sizes[axis] = offsets[axis] + low, size
        return Box(tuple(offsets), tuple(sizes))

    return [part(0, at), part(at, box.sizes[axis] - at)]


@given(st.one_of(ranges_of(), boxes_of()), st.data())
def test_the_moves_of_a_window_are_the_slice(
    case: tuple[Disk, Stored, np.ndarray], data: st.DataObject
) -> None:
    disk, tensor, whole = case
    start = data.draw(st.integers(0, whole.size))
    stop = data.draw(st.integers(start, whole.size))
    found = disk.carry_out(list(tensor.moves(start, stop)), (start, stop))
    assert (found == whole[start:stop]).all()


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
def test_every_window_of_a_tensor_in_two_boxes_is_the_slice(shape: Shape) -> None:
    """All of them, since few that are drawn show several rows of a box that is narrower than they are."""
    whole = np.arange(1, math.prod(shape) + 1, dtype=np.int32).reshape(shape)
    for axis, size in enumerate(shape):
        for at in range(1, size):
            disk, fragments = Disk(), []
            for box in split(Box((0,) * len(shape), shape), axis, at):
                inside = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
                fragments.append(disk.put(whole[inside], 0, 1, box))
            tensor = Stored(INT32, shape, fragments)
            for window in combinations(range(whole.size + 1), 2):
                found = disk.carry_out(list(tensor.moves(*window)), window)
                assert (found == whole.reshape(-1)[slice(*window)]).all()


@given(st.one_of(ranges_of(), boxes_of()), st.integers(1, 9))
def test_windows_side_by_side_are_the_whole(
    case: tuple[Disk, Stored, np.ndarray], step: int
) -> None:
    disk, tensor, whole = case
    windows = [(at, min(at + step, whole.size)) for at in range(0, whole.size, step)]
    parts = [disk.carry_out(list(tensor.moves(*window)), window) for window in windows]
    assert (np.concatenate(parts) == whole).all()


@given(boxes_of())
def test_a_whole_box_that_is_a_run_of_the_window_is_one_plain_move(
    case: tuple[Disk, Stored, np.ndarray],
) -> None:
    _, tensor, _ = case
    assume(len(tensor.fragments) == 1)
    (move,) = tensor.moves(0, tensor.numel)
    assert move.is_plain
    assert (move.sizes, move.at, move.strides) == ((tensor.numel,), 0, (1,))


@given(ranges_of(), st.data())
def test_flat_ranges_with_a_hole_or_an_overlap_are_refused(
    case: tuple[Disk, Stored, np.ndarray], data: st.DataObject
) -> None:
    _, tensor, _ = case
    fragments = list(tensor.fragments)
    full = [
        i for i, f in enumerate(fragments) if isinstance(f.region, FlatRange) and f.region.numel
    ]
    index = data.draw(st.sampled_from(full))
    fault = data.draw(st.sampled_from(["leave out", "twice", "shorter", "longer", "earlier"]))
    region = fragments[index].region
    assert isinstance(region, FlatRange)
    changed = {
        "leave out": [],
        "twice": [region, region],
        "shorter": [FlatRange(region.start, region.stop - 1)],
        "longer": [FlatRange(region.start, region.stop + 1)],
        "earlier": [FlatRange(region.start - 1, region.stop)],
    }[fault]
    fragments[index : index + 1] = [Fragment(FILE, 0, r) for r in changed]
    with pytest.raises(DamagedCheckpoint, match="hole or overlap|fragments hold") as caught:  # noqa: RUF043
        Stored(INT32, tensor.shape, fragments)
    assert caught.value.exit_code == 4


@given(boxes_of(), st.data())
def test_boxes_with_a_hole_or_an_overlap_are_refused(
    case: tuple[Disk, Stored, np.ndarray], data: st.DataObject
) -> None:
    _, tensor, _ = case
    assume(tensor.shape)
    fragments = list(tensor.fragments)
    full = [i for i, f in enumerate(fragments) if f.region.numel]
    index = data.draw(st.sampled_from(full))
    axis = data.draw(st.integers(0, len(tensor.shape) - 1))
    fault = data.draw(st.sampled_from(["leave out", "twice", "shorter", "longer", "moved"]))
    box = fragments[index].region
    assert isinstance(box, Box)
    changed = {
        "leave out": [],
        "twice": [box, box],
        "shorter": [stretched(box, axis, 0, -1)],
        "longer": [stretched(box, axis, 0, 1)],
        "moved": [stretched(box, axis, 1, 0)],
    }[fault]
    fragments[index : index + 1] = [Fragment(FILE, 0, b) for b in changed]
    with pytest.raises(DamagedCheckpoint):
        Stored(INT32, tensor.shape, fragments)


def stretched(box: Box, axis: int, by: int, longer: int) -> Box:
    offsets, sizes = list(box.offsets), list(box.sizes)
    offsets[axis] += by
    sizes[axis] += longer
    return Box(tuple(offsets), tuple(sizes))


def refusal(shape: Shape, *regions: FlatRange | Box) -> str:
    fragments = [Fragment(Path(str(i)), 0, region) for i, region in enumerate(regions)]
    with pytest.raises(DamagedCheckpoint) as caught:
        Stored(FLOAT32, shape, fragments)
    return caught.value.fact


def test_a_tensor_without_fragments_has_a_hole() -> None:
    assert refusal((2, 3)) == "its fragments hold 0 of 6 elements"
    assert refusal(()) == "its fragments hold 0 of 1 elements"


def test_a_missing_first_range_is_a_hole() -> None:
    told = "its fragments leave a hole or overlap at element 0"
    assert refusal((6,), FlatRange(2, 6)) == told


def test_a_missing_last_range_is_counted() -> None:
    assert refusal((6,), FlatRange(0, 4)) == "its fragments hold 4 of 6 elements"


def test_ranges_out_of_order_are_refused() -> None:
    assert "hole or overlap" in refusal((6,), FlatRange(3, 6), FlatRange(0, 3))


def test_a_range_beyond_the_tensor_is_refused() -> None:
    assert refusal((6,), FlatRange(0, 7)) == "its fragments hold 7 of 6 elements"


def test_a_range_that_ends_before_it_begins_is_refused() -> None:
    assert "hole or overlap" in refusal((6,), FlatRange(0, 8), FlatRange(8, 6))


def test_a_missing_first_box_and_a_missing_last_box_are_holes() -> None:
    told = "its fragments do not hold all of its elements"
    assert refusal((4, 2), Box((2, 0), (2, 2))) == told
    assert refusal((4, 2), Box((0, 0), (2, 2))) == told


def test_boxes_that_meet_at_a_corner_only_leave_holes() -> None:
    told = "its fragments do not hold all of its elements"
    assert refusal((2, 2), Box((0, 0), (1, 1)), Box((1, 1), (1, 1))) == told


def test_boxes_whose_sizes_add_up_may_overlap_all_the_same() -> None:
    told = "two fragments hold the same elements"
    assert refusal((4,), Box((0,), (2,)), Box((1,), (2,))) == told


def thin_boxes(count: int) -> tuple[Shape, list[Box]]:
    """A tiling by a few thousand boxes that cuts the tensor into billions of cells."""
    shape = (3 * count, count, count)
    boxes = []
    for axis in range(3):
        for at in range(count):
            offsets, sizes = [axis * count, 0, 0], [count, count, count]
            offsets[axis] += at
            sizes[axis] = 1
            boxes.append(Box((offsets[0], offsets[1], offsets[2]), (sizes[0], sizes[1], sizes[2])))
    return shape, boxes


def test_many_thin_boxes_are_compared_by_their_corners() -> None:
    shape, boxes = thin_boxes(1_000)
    fragments = [Fragment(FILE, 0, box) for box in boxes]
    told = "its fragments do not hold each of its elements once"

    assert Stored(INT32, shape, fragments).pieces == 3_000
    assert refusal(shape, *boxes[:-1]) == told
    assert refusal(shape, *boxes, boxes[7]) == told
    assert refusal(shape, *boxes[:-1], boxes[7]) == told


@given(boxes_of(), st.data())
def test_corners_and_cells_tell_the_same(
    case: tuple[Disk, Stored, np.ndarray], data: st.DataObject
) -> None:
    _, tensor, _ = case
    boxes = [fragment.region for fragment in tensor.fragments]
    assume(all(isinstance(box, Box) for box in boxes) and boxes)
    taken = [box for box in boxes if isinstance(box, Box) and data.draw(st.booleans())]
    count = np.zeros(tensor.shape, dtype=int)
    for box in taken:
        count[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))] += 1

    assert tiling._corners_cancel(taken, tensor.shape) == bool((count == 1).all())


def test_more_axes_than_can_be_compared_are_refused_as_such() -> None:
    fragments = [Fragment(FILE, 0, Box((i,) * 24, (1,) * 24)) for i in range(2)]

    with pytest.raises(UnsupportedLayout, match="2 parts along 24 axes"):
        Stored(INT32, (2,) * 24, fragments)


@pytest.mark.parametrize(
    "box", [Box((-1,), (5,)), Box((0,), (5,)), Box((3,), (2,)), Box((4,), (-4,))]
)
def test_a_box_outside_its_tensor_is_refused(box: Box) -> None:
    assert refusal((4,), box) == "a fragment reaches outside it"


@pytest.mark.parametrize("box", [Box((), ()), Box((0, 0), (4, 1))])
def test_a_box_of_another_rank_is_refused(box: Box) -> None:
    assert refusal((4,), Box((0,), (2,)), box) == "a fragment has another number of dimensions"


def test_ranges_and_boxes_do_not_mix() -> None:
    assert refusal((4,), FlatRange(0, 2), Box((2,), (2,))) == "it has flat and boxed fragments"
    assert (
        refusal((4,), Box((0,), (2,)), FlatRange(2, 4))
        == "a fragment has another number of dimensions"
    )


def test_a_0_d_tensor_has_one_element() -> None:
    for region in (FlatRange(0, 1), Box((), ())):
        tensor = Stored(FLOAT32, (), [Fragment(FILE, 12, region)])
        (move,) = tensor.moves(0, 1)
        assert (tensor.numel, tensor.nbytes) == (1, 4)
        assert (move.offset, move.nbytes, move.at) == (12, 4, 0)


def test_two_0_d_boxes_hold_the_same_element() -> None:
    assert refusal((), Box((), ()), Box((), ())) == "two fragments hold the same elements"


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5, 2)])
def test_a_tensor_without_elements_needs_no_fragment_and_makes_no_move(shape: Shape) -> None:
    empty = Box((0,) * len(shape), shape)
    for fragments in ([], [Fragment(FILE, 0, FlatRange(0, 0))], [Fragment(FILE, 0, empty)]):
        tensor = Stored(FLOAT32, shape, fragments)
        assert tensor.nbytes == 0
        assert list(tensor.moves(0, 0)) == []


@given(shapes, st.data())
def test_slabs_tile_their_window_and_are_few(shape: Shape, data: st.DataObject) -> None:
    whole = np.arange(math.prod(shape)).reshape(shape)
    start = data.draw(st.integers(0, whole.size))
    stop = data.draw(st.integers(start, whole.size))
    slabs = list(window_slabs(shape, start, stop))
    assert len(slabs) <= max(2 * len(shape) - 1, 1)
    parts = [
        whole[tuple(slice(o, o + n) for o, n in zip(b.offsets, b.sizes, strict=True))].reshape(-1)
        for b in slabs
    ]
    assert np.concatenate([*parts, np.empty(0, int)]).tolist() == list(range(start, stop))


@given(shapes)
def test_strides_are_those_of_a_contiguous_array(shape: Shape) -> None:
    array = np.empty(shape, np.int8)
    assert row_major_strides(shape) == array.strides


# The map.


def tensor(*shape: int) -> Stored:
    return Stored(FLOAT32, shape, [Fragment(FILE, 0, FlatRange(0, math.prod(shape)))])


def test_a_catalogue_keeps_its_order_and_counts_tied_tensors_once() -> None:
    catalogue = Catalogue({"z": tensor(2, 3), "a": tensor(4)}, {"alias": "z"})
    assert list(catalogue) == ["z", "a"]
    assert (catalogue.numel, catalogue.nbytes) == (10, 40)
    assert catalogue["alias"] is catalogue["z"]


def test_a_catalogue_cannot_be_changed_from_outside() -> None:
    tensors, ties = {"a": tensor(1)}, {"b": "a"}
    catalogue = Catalogue(tensors, ties)
    tensors.clear()
    ties.clear()
    assert list(catalogue) == ["a"]
    assert dict(catalogue.ties) == {"b": "a"}
    with pytest.raises(TypeError):
        catalogue.ties["c"] = "a"  # type: ignore[index]


@pytest.mark.parametrize("ties", [{"b": "nobody"}, {"a": "a"}, {"b": "c", "c": "b"}])
def test_a_tie_that_does_not_fit_is_refused(ties: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="does not fit the tensors"):
        Catalogue({"a": tensor(1)}, ties)
