"""Live tensors are read as files are: any range of bytes, in row-major order, whatever their strides."""

from __future__ import annotations

import random

import pytest
import torch

from ckpt_tools.storage.places import read_fully
from ckpt_tools.training.memory import ALIGNMENT, Memory, Row, copy_bytes, synchronize


def tensors() -> dict[str, torch.Tensor]:
    """One of each trait; values that differ from element to element."""
    grid = torch.arange(2 * 3 * 5 * 7, dtype=torch.float32).view(2, 3, 5, 7)
    return {
        "plain": grid,
        "bf16": grid.to(torch.bfloat16),
        "transposed": grid.transpose(1, 3),
        "channels last": grid.to(memory_format=torch.channels_last),
        "every second": grid[:, :, ::2],
        "expanded": torch.arange(5).expand(4, 5),
        "scalar": torch.tensor(1.5),
        "flags": torch.tensor([True, False, True]),
        "trained": torch.nn.Parameter(grid.half().transpose(0, 1)),
        "slice": torch.arange(100)[7:31],
    }


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", tensors())
def test_any_range_of_bytes_is_copied(name: str) -> None:
    tensor = tensors()[name]
    expected, chance = bytes_of(tensor), random.Random(1)
    for _ in range(60):
        start = chance.randrange(len(expected))
        stop = chance.randrange(start + 1, len(expected) + 1)
        buffer = bytearray(stop - start)

        copy_bytes(tensor, start, memoryview(buffer))

        assert buffer == expected[start:stop]


def test_a_row_is_a_file_with_zeros_between_tensors() -> None:
    row, expected = Row(), bytearray()
    for tensor in tensors().values():
        data = bytes_of(tensor)
        offset = row.reserve(len(data) + 3)
        assert offset % ALIGNMENT == 0
        row.put(offset, tensor)
        expected += bytes(offset - len(expected)) + data + bytes(3)
    chance = random.Random(2)

    assert row.size == len(expected)
    for _ in range(200):
        start = chance.randrange(len(expected))
        view = memoryview(bytearray(b"\xff" * chance.randrange(1, 700)))
        count = read_fully(row, view, start)
        assert count == min(len(view), len(expected) - start)
        assert view[:count] == expected[start : start + count]


def test_nothing_is_read_behind_the_end() -> None:
    row = Row()
    row.put(row.reserve(4), torch.ones(1))

    assert row.read_into(memoryview(bytearray(4)), 4) == 0
    assert Row().read_into(memoryview(bytearray(4)), 0) == 0


def test_a_place_lets_go_of_its_tensors() -> None:
    row = Row()
    row.put(row.reserve(4), torch.ones(1))
    memory = Memory("memory of rank 3", {"rank00003": row})

    assert {name: facts.size for name, facts in memory.listing().items()} == {"rank00003": 4}
    assert read_fully(memory.open("rank00003"), memoryview(bytearray(9)), 0) == 4
    memory.close()
    with pytest.raises(FileNotFoundError):
        memory.open("rank00003")


def test_only_devices_that_run_by_themselves_are_waited_for() -> None:
    synchronize([torch.ones(1), torch.ones(2)])
