"""Tensors that lie in their storage with any strides: transposed, channels last, expanded, views with gaps.

The truth is ``torch.load`` of the same file.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from ckpt_tools.readers.containers.torch_file import TorchFile, stored
from ckpt_tools.readers.containers.weight_files import tensors_of
from ckpt_tools.tensors.catalogue import Tensor
from ckpt_tools.tensors.derived import Cast, Concat, View
from ckpt_tools.tensors.dtypes import BFLOAT16, FLOAT32
from ckpt_tools.tensors.gather import Gatherer


def _base(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def _tensors() -> dict[str, torch.Tensor]:
    big = _base(40, 60)
    return {
        "transposed": _base(33, 57).t(),
        "channels_last": _base(5, 7, 6, 4).to(memory_format=torch.channels_last),
        "channels_last_3d": _base(3, 4, 5, 6, 7).to(memory_format=torch.channels_last_3d),
        "permuted": _base(4, 5, 6, 7).permute(2, 0, 3, 1),
        "expanded": _base(17, 1).expand(17, 31),
        "scalar_expanded": torch.tensor(1.5).expand(8, 9, 10),
        "expanded_between": _base(6, 1, 5).expand(6, 40, 5),
        "expanded_and_transposed": _base(9, 1).expand(9, 20).t(),
        "column": big[:, 3],
        "columns": big[:, 7:11],
        "every_third": big[:, ::3],
        "every_third_row": big[::3].t(),
        "far_apart": _base(5, 40_000)[:, :3],
        "window": big[3:30, 5:50].t(),
        "inner_rows": big[3:30],
        "overlapping": _base(50).as_strided((10, 20), (3, 1)),
        "overlapping_all": _base(50).as_strided((10, 8, 4), (1, 2, 1)),
        "bfloat16": _base(12, 18, dtype=torch.bfloat16).t(),
        "int64": torch.arange(60).view(6, 10).t(),
        "bool": (_base(9, 7) > 0).t(),
        "complex64": torch.view_as_complex(_base(6, 8, 2)).t(),
        "float8": _base(9, 7).to(torch.float8_e4m3fn).t(),
        "empty": torch.empty(4, 0).t(),
        "one_element": _base(4, 5).t()[2:3, 1:2],
        "contiguous": _base(7, 8),
    }


@pytest.fixture(scope="module", params=[True, False], ids=["zip", "legacy"])
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Tensor], dict[str, torch.Tensor]]:
    path = tmp_path_factory.mktemp("strided") / "model.bin"
    tensors = _tensors()
    if not request.param:
        del tensors["float8"]  # The legacy container has no storage of this dtype.
    torch.save(tensors, path, _use_new_zipfile_serialization=request.param)
    read, ties = tensors_of(TorchFile(path).load(), path)
    assert not ties
    return dict(read), torch.load(path, weights_only=True)


def _same(made: torch.Tensor, truth: torch.Tensor) -> bool:
    truth = truth.clone(memory_format=torch.contiguous_format)
    return (
        (made.dtype, made.shape) == (truth.dtype, truth.shape)
        and made.is_contiguous()
        and torch.equal(made.flatten().view(torch.uint8), truth.flatten().view(torch.uint8))
    )


def test_every_tensor_is_read_by_its_strides(
    saved: tuple[dict[str, Tensor], dict[str, torch.Tensor]],
) -> None:
    read, truth = saved
    assert read.keys() == truth.keys()
    assert not [name for name in truth if not _same(read[name].load(), truth[name])]


def test_every_window_is_read_by_its_strides(
    saved: tuple[dict[str, Tensor], dict[str, torch.Tensor]],
) -> None:
    read, truth = saved
    choose = random.Random(0)
    with Gatherer() as gatherer:
        for name, tensor in truth.items():
            flat = tensor.contiguous().flatten()
            for _ in range(30):
                start, stop = sorted(choose.randint(0, tensor.numel()) for _ in range(2))
                assert _same(gatherer.window(read[name], start, stop), flat[start:stop]), name


def test_casts_views_and_joins_of_strided_tensors(
    saved: tuple[dict[str, Tensor], dict[str, torch.Tensor]],
) -> None:
    read, truth = saved
    for name, tensor in truth.items():
        if tensor.dim() < 2 or not tensor.numel():
            continue
        whole, part = tensor.contiguous(), read[name]
        rows, columns = tensor.shape[0], tensor.numel() // tensor.shape[0]
        turned = View(part, 0, (columns, rows), (1, columns))
        assert _same(turned.load(), whole.view(rows, columns).t()), name
        inner = View(part, columns - 1, (rows,), (columns,))
        assert _same(inner.load(), whole.view(rows, columns)[:, -1]), name
        for axis in range(tensor.dim()):
            assert _same(Concat((part, part), axis).load(), torch.cat([whole, whole], axis)), name
        if tensor.dtype == torch.float32:
            there_and_back = Cast(Cast(part, BFLOAT16), FLOAT32)
            assert _same(there_and_back.load(), whole.bfloat16().float()), name


def test_a_window_of_a_strided_tensor_takes_few_moves(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.zeros(()).expand(1000, 1000),
        "rows": torch.zeros(1000, 1).expand(1000, 1000),
        "every_second": torch.zeros(1000, 2000)[:, ::2],
        "transposed": torch.zeros(1000, 1000).t(),
        "channels_last": torch.zeros(10, 100, 10, 100).to(memory_format=torch.channels_last),
    }
    torch.save(tensors, tmp_path / "model.bin")
    content = TorchFile(tmp_path / "model.bin").load()
    for name in tensors:
        moves = list(stored(content[name]).moves(100_000, 600_000))
        assert len(moves) <= 1000, name
        assert sum(move.nbytes for move in moves) <= 8 * 4 * 500_000, name


def test_a_strided_tensor_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    from ckpt_tools.errors import DamagedCheckpoint
    from ckpt_tools.readers.containers.restricted_pickle import TensorRef

    torch.save({"w": torch.zeros(4, 5)}, tmp_path / "model.bin")
    ref = TorchFile(tmp_path / "model.bin").load()["w"]
    for shape, stride in (((5, 4), (1, 6)), ((20, 2), (1, 1)), ((2, 2), (-1, 1))):
        with pytest.raises(DamagedCheckpoint, match="reaches beyond its storage"):
            stored(TensorRef(ref.storage, ref.dtype, 0, shape, stride))


def test_a_lazy_conjugate_or_negative_is_no_plain_tensor(tmp_path: Path) -> None:
    value = torch.randn(4, dtype=torch.complex64)
    for lazy in (value.conj(), value.conj().imag):
        torch.save({"w": lazy}, tmp_path / "model.bin")
        assert "bit" in repr(TorchFile(tmp_path / "model.bin").load()["w"])
