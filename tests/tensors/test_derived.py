"""Derived tensors are what torch makes of the same bytes, in every window."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_tools.tensors.catalogue import (
    Box,
    FlatRange,
    Fragment,
    Move,
    Stored,
    Tensor,
    row_major_strides,
)
from ckpt_tools.tensors.derived import Concat, View, cast, view
from ckpt_tools.tensors.dtypes import BFLOAT16, BY_NAME, FLOAT32
from ckpt_tools.tensors.gather import Gatherer
from ckpt_tools.tensors.requests import Slice


class Pair:
    """A lazy tensor and what it should hold."""

    def __init__(self, lazy: Tensor, truth: torch.Tensor) -> None:
        self.lazy, self.truth = lazy, truth


def stored(path: Path, truth: torch.Tensor, cuts: list[int], boxes: int | None = None) -> Pair:
    """Write ``truth`` to a file in fragments that lie backwards, with gaps between them.

    Flat ranges between ``cuts``; or, where ``boxes`` is an axis, boxes cut along it.
    """
    shape = tuple(truth.shape)
    fragments: list[Fragment] = []
    pieces: list[tuple[FlatRange | Box, torch.Tensor]] = []
    flat = truth.reshape(-1)
    if boxes is None or not shape:
        borders = sorted({0, truth.numel(), *(cut % (truth.numel() + 1) for cut in cuts)})
        for low, high in pairwise(borders):
            pieces.append((FlatRange(low, high), flat[low:high]))
    else:
        axis = boxes % len(shape)
        borders = sorted({0, shape[axis], *(cut % (shape[axis] + 1) for cut in cuts)})
        for low, high in pairwise(borders):
            offsets = tuple(low if i == axis else 0 for i in range(len(shape)))
            sizes = tuple(high - low if i == axis else size for i, size in enumerate(shape))
            pieces.append((Box(offsets, sizes), truth.narrow(axis, low, high - low)))
    data = bytearray(path.read_bytes() if path.exists() else b"")
    for region, values in reversed(pieces):
        data += bytes(truth.element_size())
        fragments.insert(0, Fragment(path, len(data), region))
        data += raw_bytes(values)
    path.write_bytes(data)
    dtype = BY_NAME[str(truth.dtype).removeprefix("torch.")]
    return Pair(Stored(dtype, shape, fragments), truth)


def window(tensor: Tensor, start: int, stop: int) -> torch.Tensor:
    buffer = bytearray(b"\xee" * ((stop - start) * tensor.dtype.itemsize))
    with Gatherer() as gatherer:
        gatherer.fill(buffer, [Slice(tensor, start, stop, 0)])
    return torch.frombuffer(buffer, dtype=tensor.dtype.torch)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.numel() == b.numel() and raw_bytes(a) == raw_bytes(b)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    packed = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
    return packed.view(torch.uint8).numpy().tobytes()


def counted(shape: tuple[int, ...], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    numel = torch.Size(shape).numel()
    return torch.arange(1, numel + 1, dtype=torch.float32).to(dtype).reshape(shape)


# -- what torch does, done lazily ------------------------------------------------------------------


def strided(pair: Pair, make: Callable[[torch.Tensor], torch.Tensor]) -> Pair:
    """Apply a torch view to both: the lazy one takes torch's own offset, sizes and strides."""
    truth = pair.truth.contiguous()
    shown = make(truth)
    assert shown.untyped_storage().data_ptr() == truth.untyped_storage().data_ptr()
    offset = shown.storage_offset() - truth.storage_offset()
    return Pair(view(pair.lazy, offset, tuple(shown.shape), shown.stride()), shown.contiguous())


@st.composite
def derived(draw: st.DrawFn, path: Path, depth: int = 3) -> Pair:
    kind = draw(st.sampled_from(["stored", "view", "view", "join", "cast"])) if depth else "stored"
    if kind == "stored":
        shape = tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=4)))
        cuts = draw(st.lists(st.integers(0, 700), max_size=4))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
        boxes = draw(st.none() | st.integers(0, 3))
        return stored(path, counted(shape, dtype), cuts, boxes)
    pair = draw(derived(path, depth - 1))
    if kind == "cast":
        dtype = draw(st.sampled_from([FLOAT32, BFLOAT16]))
        return Pair(cast(pair.lazy, dtype), pair.truth.to(dtype.torch))
    if kind == "join" and pair.truth.ndim:
        axis = draw(st.integers(0, pair.truth.ndim - 1))
        shapes = [list(pair.truth.shape) for _ in range(draw(st.integers(1, 2)))]
        for shape in shapes:
            shape[axis] = draw(st.integers(1, 4))
        others = [stored(path, counted(tuple(s), pair.truth.dtype) + 500, []) for s in shapes]
        pairs = draw(st.permutations([pair, *others]))
        lazy = Concat(tuple(p.lazy for p in pairs), axis)
        return Pair(lazy, torch.cat([p.truth for p in pairs], axis))
    return strided(pair, draw(torch_views(tuple(pair.truth.shape))))


@st.composite
def torch_views(draw: st.DrawFn, shape: tuple[int, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    if not shape:
        return lambda x: x.reshape(1, 1)
    kind = draw(st.sampled_from(["permute", "narrow", "step", "split", "flat", "select", "expand"]))
    axis = draw(st.integers(0, len(shape) - 1))
    if kind == "permute":
        order = draw(st.permutations(range(len(shape))))
        return lambda x: x.permute(order)
    if kind == "narrow":
        low = draw(st.integers(0, shape[axis] - 1))
        length = draw(st.integers(1, shape[axis] - low))
        return lambda x: x.narrow(axis, low, length)
    if kind == "step":
        by = draw(st.integers(1, 3))
        return lambda x: x[(slice(None),) * axis + (slice(None, None, by),)]
    if kind == "split":
        factors = [n for n in range(1, shape[axis] + 1) if shape[axis] % n == 0]
        n = draw(st.sampled_from(factors))
        return lambda x: x.unflatten(axis, (n, -1)).transpose(axis, axis + 1)
    if kind == "select" and len(shape) > 1:
        index = draw(st.integers(0, shape[axis] - 1))
        return lambda x: x.select(axis, index)
    if kind == "expand":
        return lambda x: x.unsqueeze(axis).expand(*x.shape[:axis], 2, *x.shape[axis:])
    return lambda x: x.reshape(-1)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_every_window_is_what_torch_makes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("lazy") / "data.bin"
    pair = data.draw(derived(path))
    assert pair.lazy.shape == tuple(pair.truth.shape)
    assert pair.lazy.pieces >= 1
    assert same_bits(pair.lazy.load(), pair.truth)
    numel = pair.truth.numel()
    start = data.draw(st.integers(0, numel - 1))
    stop = data.draw(st.integers(start + 1, numel))
    assert same_bits(window(pair.lazy, start, stop), pair.truth.reshape(-1)[start:stop])


def test_windows_are_filled_once(tmp_path: Path) -> None:
    pair = stored(tmp_path / "data.bin", counted((6, 5, 4)), [17, 50])
    pair = strided(pair, lambda x: x.permute(2, 0, 1))
    for start, stop in [(0, 120), (7, 93), (31, 32)]:
        filled = [place for move in pair.lazy.moves(start, stop) for place in places_of(move)]
        assert sorted(filled) == list(range(stop - start))


def places_of(move: Move) -> list[int]:
    places = torch.zeros(move.sizes, dtype=torch.int64)
    for axis, (size, stride) in enumerate(zip(move.sizes, move.strides, strict=True)):
        steps = torch.arange(size) * stride
        places = places + steps.reshape(-1, *(1,) * (len(move.sizes) - axis - 1))
    return (places + move.at).reshape(-1).tolist()


class TestRunsAreLong:
    """What is one run in the source is one move, whatever becomes of it in the window."""

    def make(self, tmp_path: Path, shape: tuple[int, ...]) -> Pair:
        return stored(tmp_path / "data.bin", counted(shape), [])

    def count(self, pair: Pair, start: int, stop: int) -> int:
        return len(list(pair.lazy.moves(start, stop)))

    def test_a_whole_transposed_matrix(self, tmp_path: Path) -> None:
        pair = strided(self.make(tmp_path, (30, 40)), lambda x: x.T)
        assert self.count(pair, 0, 1200) == 1

    def test_whole_transposed_experts(self, tmp_path: Path) -> None:
        pair = strided(self.make(tmp_path, (8, 30, 40)), lambda x: x.transpose(1, 2))
        assert self.count(pair, 2 * 1200, 5 * 1200) == 1

    def test_a_window_of_a_transposed_matrix_takes_one_run_a_row(self, tmp_path: Path) -> None:
        pair = strided(self.make(tmp_path, (30, 40)), lambda x: x.T)
        assert self.count(pair, 7 * 30, 12 * 30) == 30
        assert self.count(pair, 7 * 30 - 4, 12 * 30 + 9) == 30

    def test_an_expert_of_fused_projections(self, tmp_path: Path) -> None:
        pair = strided(self.make(tmp_path, (8, 20, 6)), lambda x: x.chunk(2, 1)[1])
        pair = strided(pair, lambda x: x[3])
        assert isinstance(pair.lazy, View)
        assert isinstance(pair.lazy.tensor, Stored)
        assert pair.lazy.is_one_run
        assert self.count(pair, 0, 60) == 1

    def test_rotary_permutation(self, tmp_path: Path) -> None:
        pair = strided(
            self.make(tmp_path, (24, 16)),
            lambda x: x.unflatten(0, (3, 2, 4)).transpose(1, 2),
        )
        assert self.count(pair, 0, 24 * 16) == 1
        assert self.count(pair, 16, 5 * 16) <= 4

    def test_joined_columns(self, tmp_path: Path) -> None:
        parts = tuple(self.make(tmp_path, (50, n)).lazy for n in (3, 4))
        assert len(list(Concat(parts, 1).moves(0, 350))) == 2

    def test_two_views_that_undo_each_other_are_none(self, tmp_path: Path) -> None:
        base = self.make(tmp_path, (6, 4))
        pair = strided(strided(base, lambda x: x.T), lambda x: x.T)
        assert pair.lazy is base.lazy


@pytest.mark.slow
def test_a_long_strided_run_is_no_copy_of_bytes(tmp_path: Path) -> None:
    """One axis with a stride is long enough to be copied as bytes, and must not be."""
    pair = strided(stored(tmp_path / "data.bin", counted((40_000, 2)), []), lambda x: x.T)
    assert same_bits(pair.lazy.load(), pair.truth)
    columns = stored(tmp_path / "columns.bin", counted((40_000, 2)), [])
    column = strided(columns, lambda x: x[:, :1])
    joined = Concat((column.lazy, column.lazy), 1)
    assert same_bits(joined.load(), torch.cat([column.truth, column.truth], 1))


@pytest.mark.slow
def test_a_matrix_larger_than_every_buffer_transposes(tmp_path: Path) -> None:
    pair = stored(tmp_path / "data.bin", counted((1500, 1100), torch.float32), [700_001])
    pair = strided(pair, lambda x: x.T)
    step = 400_003
    for start in range(0, 1_650_000, step):
        stop = min(start + step, 1_650_000)
        assert same_bits(window(pair.lazy, start, stop), pair.truth.reshape(-1)[start:stop])


def test_a_view_outside_its_tensor_is_refused(tmp_path: Path) -> None:
    lazy = stored(tmp_path / "data.bin", counted((3, 4)), []).lazy
    for offset, shape, strides in [
        (1, (12,), (1,)),
        (0, (4, 4), (4, 1)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
    ]:
        with pytest.raises(ValueError, match="outside its tensor"):
            View(lazy, offset, shape, strides)


@pytest.mark.parametrize(
    ("shapes", "axis"), [([(3, 4), (3, 5)], 0), ([(3,), (3, 4)], 1), ([(3,)], 1), ([], 0)]
)
def test_parts_that_do_not_fit_are_refused(
    tmp_path: Path, shapes: list[tuple[int, ...]], axis: int
) -> None:
    parts = tuple(stored(tmp_path / "data.bin", counted(shape), []).lazy for shape in shapes)
    with pytest.raises(ValueError, match="cannot join"):
        Concat(parts, axis)


def test_empty_tensors(tmp_path: Path) -> None:
    empty = Stored(FLOAT32, (0, 4), ())
    assert view(empty, 0, (4, 0), (1, 4)).load().shape == (4, 0)
    full = stored(tmp_path / "data.bin", counted((2, 4), torch.float32), [])
    assert same_bits(Concat((empty, full.lazy), 0).load(), full.truth)
    assert row_major_strides((4, 0)) == (0, 1)
