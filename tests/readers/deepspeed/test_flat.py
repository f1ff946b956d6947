"""Weights whose order is not recorded, found in flat vectors by their values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ckpt_tools.readers.containers.torch_file import TorchFile
from ckpt_tools.readers.deepspeed import flat
from ckpt_tools.readers.deepspeed.flat import FlatVector, match_by_value

if TYPE_CHECKING:
    import pytest

COUNT = 400


def saved(directory: Path, masters: torch.Tensor, weights: dict[str, torch.Tensor]) -> Any:
    torch.save({"masters": masters, "weights": weights}, directory / "state.pt")
    return TorchFile(directory / "state.pt").load()


def reversed_order(directory: Path) -> Any:
    """As many weights, of a few sizes, as follow each other from the last to the first in the vector."""
    sizes = [1 + i % 3 for i in range(COUNT)]
    # No two of these numbers are equal.
    bits = torch.arange(8_000, 8_000 + sum(sizes), dtype=torch.int16)
    values = bits.view(torch.bfloat16).split(sizes)
    weights = {f"w{i}": value for i, value in enumerate(values)}
    return saved(directory, torch.cat(values[::-1]).float(), weights)


def test_weights_are_found_in_any_order_without_comparing_each_with_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = reversed_order(tmp_path)
    reads: list[int] = []
    read_at = flat.read_at
    monkeypatch.setattr(flat, "read_at", lambda *a: reads.append(1) or read_at(*a))
    master = state["masters"]

    found = match_by_value([FlatVector([master], [master.numel])], state["weights"])

    assert found is not None
    assert [*found] == [f"w{i}" for i in reversed(range(COUNT))]
    assert len(reads) < 20 * COUNT


def test_the_first_of_equal_weights_is_taken_and_ends_decide(tmp_path: Path) -> None:
    tail = torch.zeros(200)
    tail[-1] = 1
    values = [torch.zeros(200), torch.zeros(200), tail]
    weights = {name: value.half() for name, value in zip("abc", values, strict=True)}
    state = saved(tmp_path, torch.cat([tail, *values[:2]]), weights)
    vector = FlatVector([state["masters"]], [600])

    assert [*(match_by_value([vector], state["weights"]) or ())] == ["c", "a", "b"]
    state["weights"].pop("b")
    assert match_by_value([vector], state["weights"]) is None


def test_weights_of_many_sizes_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = reversed_order(tmp_path)
    monkeypatch.setattr(flat, "_MOST_COMPARED", COUNT)
    monkeypatch.setattr(flat, "_COMPARED_A_WEIGHT", 0)
    vector = FlatVector([state["masters"]], [state["masters"].numel])

    assert match_by_value([vector], state["weights"]) is None
