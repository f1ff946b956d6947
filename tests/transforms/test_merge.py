"""Merging, element by element: the same bits as the formula, however it is cut into windows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckpt_tools.readers.containers.weight_files import read_weight_files
from ckpt_tools.tensors.catalogue import Tensor
from ckpt_tools.tensors.derived import cast
from ckpt_tools.tensors.dtypes import BFLOAT16
from ckpt_tools.tensors.gather import Gatherer, load
from ckpt_tools.transforms import merge
from ckpt_tools.transforms.merge import Merged, MergedBias, merged_experts, with_rows

R = 3


@pytest.fixture
def values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "w": random(37, 29),
        "a": random(R, 29, dtype=torch.float32),
        "b": random(37, R),
        "m": random(37),
        "columns": random(29),
        "experts": random(4, 37, 29),
        "ea": random(4 * R, 29),
        "eb": random(37, 4 * R),
        "bias": random(37),
    }


@pytest.fixture
def stored(values: dict[str, torch.Tensor], tmp_path: Path) -> dict[str, Tensor]:
    save_file(values, tmp_path / "x.safetensors")
    return dict(read_weight_files(tmp_path / "x.safetensors").tensors)


def _windows(tensor: Tensor, size: int) -> torch.Tensor:
    with Gatherer() as gatherer:
        parts = [
            gatherer.window(tensor, at, min(at + size, tensor.numel))
            for at in range(0, tensor.numel, size)
        ]
    return torch.cat(parts).view(tensor.shape)


@pytest.mark.parametrize("tile", [1, 29 * 9, 1 << 18])
@pytest.mark.parametrize("size", [7, 29, 100, 10**6])
def test_windows_and_tiles_change_nothing(
    values: dict[str, torch.Tensor],
    stored: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    tile: int,
) -> None:
    monkeypatch.setattr(merge, "_TILE", tile)
    v, s = values, stored
    expected = v["w"].float() + (v["b"].float() @ v["a"]) * 0.7

    assert torch.equal(_windows(Merged(s["w"], s["a"], s["b"], 0.7), size), expected)


def test_one_rounding(values: dict[str, torch.Tensor], stored: dict[str, Tensor]) -> None:
    v, s = values, stored
    expected = (v["w"].float() + (v["b"].float() @ v["a"]) * 2.0).bfloat16()

    assert torch.equal(load(cast(Merged(s["w"], s["a"], s["b"], 2.0), BFLOAT16)), expected)


@pytest.mark.parametrize("size", [7, 100, 10**6])
def test_transposed(values: dict[str, torch.Tensor], stored: dict[str, Tensor], size: int) -> None:
    """The weight is (in, out) = (37, 29): A has 37 columns, B 29 rows."""
    v = values
    a, b = v["b"].T.contiguous(), v["a"].T.contiguous()
    expected = v["w"].float() + (b @ a.float()).T * 0.7
    merged = Merged(stored["w"], _turned(stored["b"]), _turned(stored["a"]), 0.7, transposed=True)

    assert torch.equal(_windows(merged, size), expected)


@pytest.mark.parametrize("size", [7, 100, 10**6])
@pytest.mark.parametrize("tile", [29 * 9, 1 << 18])
def test_dora_scales_rows(
    values: dict[str, torch.Tensor],
    stored: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    tile: int,
) -> None:
    monkeypatch.setattr(merge, "_TILE", tile)
    v, s = values, stored
    whole = v["w"].float() + (v["b"].float() @ v["a"]) * 0.7
    expected = (v["m"].float() / torch.linalg.norm(whole, dim=1)).view(-1, 1) * whole

    merged = Merged(s["w"], s["a"], s["b"], 0.7, magnitude=s["m"])

    assert torch.equal(_windows(merged, size), expected)


@pytest.mark.parametrize("tile", [29 * 9, 1 << 18])
def test_dora_scales_columns_of_what_is_stored_transposed(
    values: dict[str, torch.Tensor],
    stored: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    tile: int,
) -> None:
    """As PEFT does for embeddings and Conv1D; norms of many tiles are summed in another order."""
    monkeypatch.setattr(merge, "_TILE", tile)
    v, s = values, stored
    whole = v["w"].float() + (v["a"].T @ v["b"].float().T).T * 0.7
    norms = torch.linalg.norm(whole.T, dim=1)
    expected = (v["columns"].float() / norms).view(1, -1) * whole

    merged = Merged(
        s["w"], _turned(s["b"]), _turned(s["a"]), 0.7, transposed=True, magnitude=s["columns"]
    )

    torch.testing.assert_close(_windows(merged, 50), expected, rtol=1e-6, atol=0)
    assert torch.equal(_windows(merged, 50), _windows(merged, 10**6))


@pytest.mark.parametrize("size", [100, 10**6])
def test_experts(values: dict[str, torch.Tensor], stored: dict[str, Tensor], size: int) -> None:
    v, s = values, stored
    a = v["ea"].float().reshape(4, -1, 29)
    b = v["eb"].float().reshape(37, -1, 4)
    expected = v["experts"].float() + torch.einsum("ore,eri->eoi", b, a) * 0.7

    merged = merged_experts(s["experts"], s["ea"], s["eb"], 0.7, transposed=False)

    assert merged.shape == (4, 37, 29)
    torch.testing.assert_close(_windows(merged, size), expected, rtol=0, atol=2e-6)


def test_bias(values: dict[str, torch.Tensor], stored: dict[str, Tensor]) -> None:
    expected = values["bias"].float() + values["m"].float() * 0.7

    assert torch.equal(load(MergedBias(stored["bias"], stored["m"], 0.7)), expected)


@pytest.mark.parametrize("indices", [[3, 5, 36], [36, 0, 1], [1, 2, 3]])
def test_rows_are_replaced(
    values: dict[str, torch.Tensor], stored: dict[str, Tensor], indices: list[int]
) -> None:
    expected = values["w"].clone()
    expected[indices] = values["a"].bfloat16()

    assert torch.equal(load(with_rows(stored["w"], stored["a"], indices)), expected)


def _turned(tensor: Tensor) -> Tensor:
    from ckpt_tools.tensors.derived import view

    rows, columns = tensor.shape
    return view(tensor, 0, (columns, rows), (1, columns))
