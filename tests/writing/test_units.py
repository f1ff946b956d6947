"""Units cover every byte once, are divided evenly among ranks, and their digests depend on bytes alone."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ckpt_tools.tensors.catalogue import FlatRange, Fragment, Stored
from ckpt_tools.tensors.dtypes import ALL, BFLOAT16, BY_NAME, FLOAT32, DType
from ckpt_tools.writing.layout import Plan, PlannedFile, plan
from ckpt_tools.writing.units import PAGES, Block, Units
from tests.writing.test_layout import counted, described, laid_out, raw, with_blocks_of

MIB = 1 << 20
NOWHERE = Path("/nowhere")
INT64, UINT8 = BY_NAME["int64"], BY_NAME["uint8"]


def lazy(dtype: DType, *shape: int) -> Stored:
    """A tensor of any size: a plan reads nothing of it."""
    return Stored(dtype, shape, [Fragment(NOWHERE, 0, FlatRange(0, math.prod(shape)))])


def of_sizes(sizes: Sequence[int], shard: int | str = "5GB", dtype: DType = FLOAT32) -> Units:
    """The units of a plan of tensors of so many elements each."""
    tensors = {f"t{i:05}": lazy(dtype, size) for i, size in enumerate(sizes)}
    return Units(plan(tensors, max_shard_size=shard))


def nbytes_of(units: Units, share: range) -> int:
    return sum(stop - start for _, start, stop in map(units.span, share))


def files_of(units: Units) -> list[PlannedFile]:
    return list(units.plan.files)


# -- units ------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 3_000_000), max_size=6),
    st.integers(100_000, 10**8),
    st.sampled_from([UINT8, BFLOAT16, FLOAT32, INT64]),
)
@example([], 10**8, FLOAT32)
@example([0, 0], 10**8, FLOAT32)
@example([MIB // 4] * 3, 100_000, FLOAT32)
def test_units_are_every_byte_of_tensor_data_once_and_no_byte_of_a_header(
    sizes: list[int], shard: int, dtype: DType
) -> None:
    units = of_sizes(sizes, shard, dtype)
    at = {index: len(file.header) for index, file in enumerate(files_of(units))}
    before = 0
    for unit in range(len(units)):
        file, start, stop = units.span(unit)
        assert file >= before, "in the order of the files"
        assert start == at[file] < stop
        assert start % units.nbytes == 0 or start == len(units.plan.files[file].header)
        assert stop % units.nbytes == 0 or stop == units.plan.files[file].size
        assert stop - start <= units.nbytes
        at[file], before = stop, file
    assert at == {index: file.size for index, file in enumerate(files_of(units))}


@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [
        (0, 64),
        (2 << 20, 64),
        ((2 << 20) + 1, 128),
        (30_000_000, 1024),
        (30_000_000_000, MIB),
        (32 << 30, MIB),
        (1 << 40, MIB),
    ],
)
def test_a_unit_is_small_where_there_is_little_to_divide_and_at_most_a_mebibyte(
    nbytes: int, expected: int
) -> None:
    units = of_sizes([nbytes], "2TB", UINT8)

    assert units.nbytes == expected
    assert PAGES == MIB
    assert PAGES % units.nbytes == 0, "or no border could lie on a page"


def test_units_of_terabytes_are_known_at_once() -> None:
    units = Units(
        plan({f"{i}": lazy(FLOAT32, MIB, 1 << 17) for i in range(20)}, max_shard_size="1TB")
    )

    assert len(units) == sum(-(-file.size // MIB) for file in files_of(units)) > 10_000_000
    first = next(iter(units.blocks(range(len(units)))))
    assert (first.file, first.offset) == (0, len(units.plan.files[0].header))
    assert units.span(len(units) - 1)[2] == units.plan.files[-1].size


# -- blocks -----------------------------------------------------------------------------------------


dtypes = st.sampled_from(ALL)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
states = st.lists(st.tuples(dtypes, shapes), max_size=8)


@settings(deadline=None, max_examples=60)
@given(states, st.integers(8, 400), st.integers(1, 500))
def test_blocks_carry_every_byte_exactly_once(
    state: list[tuple[DType, tuple[int, ...]]], block_bytes: int, shard_bytes: int
) -> None:
    tensors = {f"t{i}": counted(dtype, shape, i) for i, (dtype, shape) in enumerate(state)}
    units = Units(with_blocks_of(plan(described(tensors), max_shard_size=shard_bytes), block_bytes))
    data = {id(tensor): raw(tensors[name]) for name, tensor in units.plan.tensors.items()}
    contents = [bytearray(file.header.ljust(file.size, b"\xee")) for file in units.plan.files]
    times = [[0] * file.size for file in units.plan.files]
    met: list[int] = []
    for block in units.blocks(range(len(units))):
        assert 0 < block.nbytes <= units.block_bytes <= max(block_bytes, units.nbytes)
        met += range(block.first, block.last)
        assert units.span(block.first)[:2] == (block.file, block.offset)
        assert units.span(block.last - 1)[::2] == (block.file, block.offset + block.nbytes)
        for start, stop, values in filled(block, data):
            contents[block.file][start:stop] = values
            for byte in range(start, stop):
                times[block.file][byte] += 1
    assert met == list(range(len(units)))
    for file, content, written in zip(units.plan.files, contents, times, strict=True):
        assert written == [0] * len(file.header) + [1] * (file.size - len(file.header))
        assert bytes(content) == laid_out(file, tensors)


def filled(block: Block, data: Mapping[int, bytes]) -> list[tuple[int, int, bytes]]:
    """Which bytes of its file the block's slices fill, and with what."""
    parts = []
    for part in block.slices:
        itemsize = part.tensor.dtype.itemsize
        values = data[id(part.tensor)][part.start * itemsize : part.stop * itemsize]
        assert len(values) == (part.stop - part.start) * itemsize > 0
        assert 0 <= part.at <= block.nbytes - len(values)
        start = block.offset + part.at
        parts.append((start, start + len(values), values))
    assert sum(stop - start for start, stop, _ in parts) == block.nbytes
    return parts


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 20_000), min_size=1, max_size=5), st.data())
def test_blocks_of_some_units_are_of_those_alone(sizes: list[int], data: st.DataObject) -> None:
    units = with_units_of(of_sizes(sizes, 60_000), 7 * 64)
    start = data.draw(st.integers(0, len(units)))
    stop = data.draw(st.integers(start, len(units)))

    blocks = list(units.blocks(range(start, stop)))

    assert [u for b in blocks for u in range(b.first, b.last)] == list(range(start, stop))
    assert sum(block.nbytes for block in blocks) == nbytes_of(units, range(start, stop))
    for block in blocks:
        places = sorted((part.at, part.stop - part.start) for part in block.slices)
        ends = [0, *itertools.accumulate(4 * count for _, count in places)]
        assert [at for at, _ in places] == ends[:-1]
        assert ends[-1] == block.nbytes


def with_units_of(units: Units, block_bytes: int) -> Units:
    return Units(with_blocks_of(units.plan, block_bytes))


@pytest.mark.parametrize("pieces", [1, 8, 64, 1024, 8192])
def test_a_block_is_large_but_bounded_however_many_ranks_there_are(pieces: int) -> None:
    numel = 100_000_000
    cuts = [numel * i // pieces for i in range(pieces + 1)]
    fragments = [
        Fragment(Path(f"/rank{i}"), 0, FlatRange(low, high))
        for i, (low, high) in enumerate(itertools.pairwise(cuts))
    ]
    units = Units(plan({"x": Stored(FLOAT32, (numel,), fragments)}))

    blocks = list(units.blocks(range(len(units))))

    assert sum(block.nbytes for block in blocks) == 4 * numel
    header = len(units.plan.files[0].header)
    assert blocks[0].nbytes == units.block_bytes - header % units.nbytes
    assert {block.nbytes for block in blocks[1:-1]} == {units.block_bytes}
    assert units.block_bytes == units.plan.block_bytes
    assert 1 << 20 <= units.block_bytes <= 64 << 20


# -- shares -----------------------------------------------------------------------------------------


def shares(units: Units, machines: Sequence[int]) -> list[range]:
    return [units.share(rank, machines) for rank in range(len(machines))]


plans = st.tuples(st.lists(st.integers(0, 2_000_000), max_size=12), st.integers(50_000, 20_000_000))
runs = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=150)
@given(plans, runs)
@example(([400_000], 10**9), [(0, 1), (1, 2)])
@example(([400_000], 10**9), [(0, 1), (1, 1), (0, 1), (1, 2)])
@example(([10, 2_000_000, 10], 10**9), [(0, 2), (1, 5), (2, 1)])
def test_shares_are_every_unit_once_whatever_ranks_and_machines_there_are(
    layout: tuple[list[int], int], machines: list[tuple[int, int]]
) -> None:
    """Two that overlapped would be two machines writing one page; one left out would be a hole."""
    sizes, shard = layout
    units = of_sizes(sizes, shard)
    numbers = [number for number, count in machines for _ in range(count)]

    found = shares(units, numbers)

    assert found[0].start == 0
    assert found[-1].stop == len(units)
    for one, two in itertools.pairwise(found):
        assert one.start <= one.stop == two.start <= two.stop


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(plans, runs)
@example(([40_000_000, 3_000_000, 5], 10**7), [(0, 1), (1, 1), (2, 1), (3, 1)])
def test_between_machines_the_border_lies_on_a_page_or_begins_a_file(
    layout: tuple[list[int], int], machines: list[tuple[int, int]]
) -> None:
    sizes, shard = layout
    units = of_sizes(sizes, shard)
    numbers = [number for number, count in machines for _ in range(count)]
    total = units.plan.tensor_bytes
    written_before = 0
    for rank, share in enumerate(shares(units, numbers)):
        if rank and numbers[rank - 1] != numbers[rank] and 0 < share.start < len(units):
            file, start, _ = units.span(share.start)
            assert start % MIB == 0 or start == len(units.plan.files[file].header)
        even = total * rank / len(numbers)
        # To the unit's start, or on by less than a page and a unit.
        assert even - units.nbytes < written_before < even + MIB + units.nbytes
        written_before += nbytes_of(units, share)
    assert written_before == total


def sizes_of_3_tensors() -> list[int]:
    return [2_500_000, 1_700_001, 3_333_333]


def sizes_of_3000_tensors() -> list[int]:
    chance = random.Random(0)
    return [chance.choice([1, 64, 2_500, 5_001]) for _ in range(3_000)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "shard"),
    [
        (sizes_of_3_tensors(), "5GB"),
        (sizes_of_3_tensors(), "10MB"),
        (sizes_of_3000_tensors(), "5GB"),
        (sizes_of_3000_tensors(), "1MB"),
        (sizes_of_3000_tensors(), 100),
        ([1] * 2_999 + [7_500_000], 4),
        ([7_500_000] + [1] * 2_999, 4),
    ],
    ids=[
        "3",
        "3 in files",
        "3,000",
        "3,000 in files",
        "3,000 in 3,000",
        "a large one last",
        "first",
    ],
)
def test_the_work_of_ranks_on_one_machine_differs_by_less_than_five_percent(
    sizes: list[int], shard: int | str
) -> None:
    units = of_sizes(sizes, shard)
    for ranks in range(2, 17):
        work = [nbytes_of(units, share) for share in shares(units, [0] * ranks)]

        assert sum(work) == 4 * sum(sizes)
        assert max(work) < 1.05 * min(work), f"{ranks} ranks"


@settings(deadline=None, max_examples=60)
@given(plans, st.integers(1, 40))
def test_on_one_machine_shares_are_even_to_within_a_unit(
    layout: tuple[list[int], int], ranks: int
) -> None:
    sizes, shard = layout
    units = of_sizes(sizes, shard)

    for share in shares(units, [0] * ranks):
        assert abs(nbytes_of(units, share) - 4 * sum(sizes) / ranks) < units.nbytes + 1


def test_large_plans_are_even_across_machines_too() -> None:
    units = of_sizes([10**9] * 7)
    machines = [0, 0, 0, 1, 1, 1, 2, 2, 2]

    work = [nbytes_of(units, share) for share in shares(units, machines)]

    assert max(work) < 1.01 * min(work)


# -- digests ----------------------------------------------------------------------------------------


def digests_by_blocks(units: Units, contents: Sequence[bytes], todo: range) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    for block in units.blocks(todo):
        data = contents[block.file][block.offset : block.offset + block.nbytes]
        found.update(enumerate(units.digests(block, memoryview(data)), block.first))
    return found


def digests_by_hand(content: bytes, unit_bytes: int) -> dict[str, str]:
    """Each tensor of a safetensors file, as the manifest's schema says it."""
    size = int.from_bytes(content[:8], "little")
    found = {}
    for name, entry in json.loads(content[8 : 8 + size]).items():
        if name == "__metadata__":
            continue
        start, stop = (8 + size + offset for offset in entry["data_offsets"])
        inner = range(start // unit_bytes * unit_bytes + unit_bytes, stop, unit_bytes)
        pieces = [content[a:b] for a, b in itertools.pairwise([start, *inner, stop])]
        digests = [xxhash.xxh3_128_digest(piece) for piece in pieces]
        whole = digests[0] if len(digests) == 1 else xxhash.xxh3_128_digest(b"".join(digests))
        found[name] = whole.hex()
    return found


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(dtypes, st.integers(0, 300)), max_size=8),
    st.sampled_from([1, 64, 640, 5_000, 10**6]),
    st.sampled_from([100, 2_000, 10**6]),
)
def test_a_tensors_digest_is_that_of_its_bytes_cut_at_multiples_of_the_unit(
    state: list[tuple[DType, int]], block_bytes: int, shard: int
) -> None:
    tensors = {f"t{i}": counted(dtype, (size,), i) for i, (dtype, size) in enumerate(state)}
    layout = with_blocks_of(plan(described(tensors), max_shard_size=shard), block_bytes)
    contents = [laid_out(file, tensors) for file in layout.files]
    units = Units(layout)

    found = units.tensor_digests(digests_by_blocks(units, contents, range(len(units))))

    expected: dict[str, str] = {}
    for content in contents:
        expected |= digests_by_hand(content, units.nbytes)
    assert found == expected
    assert units.nbytes == 64


def test_units_larger_than_the_smallest_are_digested_alike() -> None:
    """A tensor of one piece, of many, of none, and one that shares a unit with its neighbours."""
    tensors = {
        "a": counted(FLOAT32, (1_500_000,)),
        "b": counted(FLOAT32, (3,)),
        "c": counted(BFLOAT16, (700_000,)),
        "none": counted(FLOAT32, (0, 4)),
    }
    layout = plan(described(tensors))
    (content,) = [laid_out(file, tensors) for file in layout.files]
    units = Units(layout)
    assert units.nbytes == 256

    found = units.tensor_digests(digests_by_blocks(units, [content], range(len(units))))

    assert found == digests_by_hand(content, 256)
    assert found["none"] == xxhash.xxh3_128_hexdigest(b"")
    offset = int.from_bytes(content[:8], "little") + 8 + 4 * 1_500_000
    assert found["b"] == xxhash.xxh3_128_hexdigest(content[offset : offset + 12])


@pytest.mark.parametrize("block_bytes", [1, 640, 10**6])
@pytest.mark.parametrize("machines", [[0], [0, 0], [0, 0, 0, 1, 1], [0, 1, 2, 3, 4, 5, 6]])
def test_digests_do_not_depend_on_blocks_or_on_who_wrote(
    block_bytes: int, machines: list[int]
) -> None:
    tensors = {f"t{i}": counted(ALL[i % len(ALL)], (i * 37,), i) for i in range(40)}
    layout = plan(described(tensors), max_shard_size=9_000)
    contents = [laid_out(file, tensors) for file in layout.files]
    whole = Units(layout)
    expected = digests_by_blocks(whole, contents, range(len(whole)))
    assert whole.plan.block_bytes > 100_000

    units = Units(with_blocks_of(plan(described(tensors), max_shard_size=9_000), block_bytes))
    found: dict[int, bytes] = {}
    for share in shares(units, machines):
        found |= digests_by_blocks(units, contents, share)

    assert found == expected


def test_a_flipped_bit_changes_the_digest_of_its_tensor_alone() -> None:
    tensors = {f"t{i}": counted(BFLOAT16, (150,), i) for i in range(5)}
    layout: Plan = plan(described(tensors))
    (content,) = [laid_out(file, tensors) for file in layout.files]
    units = Units(layout)
    before = units.tensor_digests(digests_by_blocks(units, [content], range(len(units))))
    for slot in layout.files[0].slots:
        damaged = bytearray(content)
        damaged[(slot.offset + slot.end) // 2] ^= 4

        after = units.tensor_digests(digests_by_blocks(units, [bytes(damaged)], range(len(units))))

        assert {name for name in before if before[name] != after[name]} == {slot.name}
