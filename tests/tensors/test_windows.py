"""Windows: every element of every group is seen once, in order, whatever the number of threads."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ckpt_tools.errors import CkptError, DamagedCheckpoint
from ckpt_tools.tensors import windows
from ckpt_tools.tensors.catalogue import FlatRange, Fragment, Stored, Tensor
from ckpt_tools.tensors.derived import cast
from ckpt_tools.tensors.dtypes import BFLOAT16, BY_NAME, DType
from ckpt_tools.tensors.windows import Meter, Window, same_bits, visit_windows, windows_of
from tests.support.waiting import LONGEST_SECONDS

SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (),
    "empty": (0, 5),
    "small": (7, 3),
    "window": (1 << 10,),
    "more": (1 << 10, 3),
    "odd": (1023, 3),
}


def our_dtype(tensor: torch.Tensor) -> DType:
    return BY_NAME[str(tensor.dtype).removeprefix("torch.")]


def stored(path: Path, tensor: torch.Tensor, pieces: int = 1) -> Stored:
    """The tensor in a file, in pieces that lie backwards."""
    path.parent.mkdir(exist_ok=True)
    flat, content = tensor.reshape(-1), bytearray(b"\xaa" * 8)
    fragments: list[Fragment] = []
    cuts = sorted({len(flat) * i // pieces for i in range(pieces + 1)})
    for low, high in reversed(list(itertools.pairwise(cuts))):
        fragments.insert(0, Fragment(path, len(content), FlatRange(low, high)))
        content += flat[low:high].contiguous().view(torch.uint8).numpy().tobytes()
    path.write_bytes(content)
    return Stored(our_dtype(tensor), tuple(tensor.shape), fragments)


@pytest.fixture
def values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "WINDOW", 1 << 10)
    monkeypatch.setattr(windows, "_BATCH_BYTES", 6 << 10)
    monkeypatch.setattr(windows, "_WORTHWHILE_READ", 1 << 10)


OTHERS = (torch.bfloat16, torch.float64)


def groups_of(values: dict[str, torch.Tensor], directory: Path) -> list[tuple[Tensor, ...]]:
    """Each tensor in many pieces, beside the same in one piece and in another dtype."""
    return [
        (
            stored(directory / "cut" / name, value, pieces=5),
            stored(directory / "whole" / name, value.to(OTHERS[index % 2])),
        )
        for index, (name, value) in enumerate(values.items())
    ]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_all_elements_are_seen_in_order(
    workers: int, values: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    groups = groups_of(values, tmp_path)
    before = torch.get_num_threads()
    threads: set[int] = set()
    barrier = threading.Barrier(min(workers, 2), timeout=LONGEST_SECONDS)
    calls = itertools.count()

    def visit(window: Window, elements: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if next(calls) < barrier.parties:
            barrier.wait()  # the first two come from two threads
        threads.add(threading.get_ident())
        assert torch.get_num_threads() == 1  # so that a sum has one order, and cores are left alone
        assert all(each.data_ptr() % each.element_size() == 0 for each in elements)
        return [each.clone() for each in elements]

    seen = list(visit_windows(groups, visit, workers=workers))

    assert [window for window, _ in seen] == list(windows_of(groups))
    for index, truth in enumerate(values.values()):
        parts = [parts for window, parts in seen if window.group == index]
        for side, dtype in enumerate((torch.float32, OTHERS[index % 2])):
            whole = torch.cat([torch.empty(0, dtype=dtype), *(each[side] for each in parts)])
            assert torch.equal(whole, truth.to(dtype).reshape(-1))
    assert len(threads) <= workers
    assert torch.get_num_threads() == before


def test_windows_cover_each_group_and_are_of_a_fixed_size(
    values: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    found = list(windows_of(groups_of(values, tmp_path)))

    sizes = [[w.stop - w.start for w in found if w.group == g] for g in range(len(SHAPES))]
    assert sizes == [[1], [], [21], [1024], [1024, 1024, 1024], [1024, 1024, 1021]]
    for a, b in itertools.pairwise(found):
        assert (b.group > a.group and b.start == 0) or b.start == a.stop


def test_only_the_windows_that_are_asked_for_are_read(
    values: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    groups = groups_of(values, tmp_path)
    wanted = [Window(4, 1024, 2048), Window(5, 3, 5)]

    seen = visit_windows(groups, lambda _, e: e[0].clone(), workers=2, windows=wanted)

    (first, a), (second, b) = seen
    assert [first, second] == wanted
    assert torch.equal(a, values["more"].reshape(-1)[1024:2048])
    assert torch.equal(b, values["odd"].reshape(-1)[3:5])


def test_progress_counts_the_bytes_of_all_sides(
    values: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    groups = groups_of(values, tmp_path)
    total = sum(tensor.nbytes for group in groups for tensor in group)
    told: list[tuple[int, int]] = []
    meter = Meter(lambda done, total: told.append((done, total)), total)

    list(visit_windows(groups, lambda *_: None, workers=3, progress=meter.add))

    assert told[-1] == (total, total)
    assert sorted(told) == told
    meter.expect(5)
    meter.add(5)
    assert told[-1] == (total + 5, total + 5)
    Meter(None, 3).add(1)


@pytest.fixture
def with_a_cut_file(values: dict[str, torch.Tensor], tmp_path: Path) -> list[tuple[Tensor, ...]]:
    groups: list[tuple[Tensor, ...]] = [
        (stored(tmp_path / name, value),) for name, value in values.items()
    ]
    path = tmp_path / "odd"
    path.write_bytes(path.read_bytes()[:6000])
    return groups


def test_a_file_that_ends_early_is_an_error(with_a_cut_file: list[tuple[Tensor, ...]]) -> None:
    with pytest.raises(DamagedCheckpoint, match="the file ends at byte 6,000"):
        list(visit_windows(with_a_cut_file, lambda *_: None, workers=2))


def test_a_window_that_cannot_be_read_stops_no_other(
    with_a_cut_file: list[tuple[Tensor, ...]],
) -> None:
    def failed(window: Window, error: CkptError) -> str:
        return f"{window.start}: {error.fact[:13]}"

    seen = list(visit_windows(with_a_cut_file, lambda *_: "read", workers=2, failed=failed))

    assert [window for window, _ in seen] == list(windows_of(with_a_cut_file))
    results = [result for window, result in seen if window.group == 5]
    assert results == ["read", "1024: the file ends", "2048: the file ends"]
    assert {result for window, result in seen if window.group != 5} == {"read"}


def test_a_caller_that_stops_early_stops_the_readers(
    values: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [(stored(tmp_path / str(i), values["more"]),) for i in range(40)]
    looked: list[Window] = []
    go_on = threading.Event()
    shutdown = ThreadPoolExecutor.shutdown

    def cancelled(threads: ThreadPoolExecutor, wait: bool = True, **options: bool) -> None:
        shutdown(threads, wait=False, **options)
        go_on.set()
        shutdown(threads, wait=wait)

    def visit(window: Window, _: Sequence[torch.Tensor]) -> None:
        assert window.group == 0 or go_on.wait(LONGEST_SECONDS)
        looked.append(window)

    found = visit_windows(groups, visit, workers=1)
    next(found)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", cancelled)
    found.close()  # type: ignore[attr-defined]

    # What was read ahead of the caller, and nothing that only waited for its turn.
    assert len({window.group for window in looked}) <= 2
    assert len(looked) <= 5


def test_computed_and_cast_tensors_are_seen_as_what_they_are(tmp_path: Path) -> None:
    truth = torch.randn(3000, generator=torch.Generator().manual_seed(1))
    half = cast(stored(tmp_path / "x", truth), BFLOAT16)

    seen = visit_windows([(half,)], lambda _, e: e[0].clone(), workers=1)

    assert torch.equal(torch.cat([part for _, part in seen]), truth.bfloat16())


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 1001])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_the_same_bits_are_the_same_bytes(count: int, dtype: torch.dtype) -> None:
    a = torch.arange(count).to(dtype)

    assert same_bits(a, a.clone())
    for place in {0, count // 2, count - 1} & set(range(count)):
        b = a.clone()
        b.view(torch.uint8)[place * dtype.itemsize] ^= 1
        assert not same_bits(a, b)


def test_zeros_of_other_signs_have_other_bits() -> None:
    assert not same_bits(torch.zeros(9), -torch.zeros(9))
    assert same_bits(torch.full((9,), float("nan")), torch.full((9,), float("nan")))


def test_a_tensor_of_many_pieces_is_read_in_larger_requests(tmp_path: Path) -> None:
    """A batch holds so many windows that each rank's piece of it is worth a request."""
    truth = torch.arange(1 << 16, dtype=torch.int32)
    tensor = stored(tmp_path / "x", truth, pieces=64)
    told: list[int] = []

    seen = visit_windows([(tensor,)], lambda _, e: e[0].clone(), workers=1, progress=told.append)

    assert torch.equal(torch.cat([part for _, part in seen]), truth)
    assert told == [64 << 10] * 4
