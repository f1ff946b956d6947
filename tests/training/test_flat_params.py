"""FSDP1's oddities are refused by name; its real layouts are tested with FSDP1 itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ckpt_tools.errors import UnsupportedLayout
from ckpt_tools.tensors.catalogue import FlatRange
from ckpt_tools.training.flat_params import holding_of, is_flat


class FullyShardedDataParallel(nn.Module):
    """A linear layer in a flat parameter of 6 + 2 elements, of which this rank has the second half."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        inner = nn.Linear(3, 2)
        inner.register_buffer("scale", torch.ones(1))
        self._fsdp_wrapped_module = inner
        del inner.weight, inner.bias
        runs = [(True, 0, 2, 4, 5), (True, 2, 2, 0, 1)]
        names = ("in_shard", "offset_in_shard", "numel_in_shard", "intra_param_start_idx", "_")
        flat = {
            "_param_infos": [
                SimpleNamespace(module=inner, param_name=n) for n in ("weight", "bias")
            ],
            "_shared_param_infos": [],
            "_shapes": [(2, 3), (2,)],
            "_contiguities": [True, True],
            "_local_shard": torch.tensor([4.0, 5.0, 6.0, 7.0]),
            "_shard_param_infos": [
                SimpleNamespace(**dict(zip(names, r, strict=True))) for r in runs
            ],
            "_params": None,
            "requires_grad": True,
        }
        self._handle = SimpleNamespace(flat_param=SimpleNamespace(**{**flat, **changes}))


def test_runs_of_a_shard_are_runs_of_parameters() -> None:
    module = FullyShardedDataParallel()

    found = {held.name: held for held in holding_of(module).tensors}

    assert is_flat(module)
    assert not is_flat(nn.Linear(1, 1))
    assert [*found] == ["weight", "bias", "scale"]
    for name, region, values in (
        ("weight", FlatRange(4, 6), [4.0, 5.0]),
        ("bias", FlatRange(0, 2), [6.0, 7.0]),
    ):
        (piece,) = found[name].pieces
        assert (piece.region, piece.tensor.tolist()) == (region, values)
    assert found["scale"].kind == "buffer"


def test_parameters_in_another_order_of_elements_are_refused() -> None:
    with pytest.raises(UnsupportedLayout, match="bias: FSDP keeps its elements in another order"):
        holding_of(FullyShardedDataParallel(_contiguities=[True, False]))


def test_buffers_that_were_cast_are_refused() -> None:
    module: Any = FullyShardedDataParallel()
    module._buffer_name_to_orig_dtype = {"scale": torch.float64}

    with pytest.raises(UnsupportedLayout, match=r"scale: FSDP keeps the buffer in torch\.float32"):
        holding_of(module)


def test_buffers_that_no_state_has_may_be_cast() -> None:
    """Accelerate's bf16 casts ``inv_freq`` of rotary embeddings."""
    module: Any = FullyShardedDataParallel()
    inner = module._fsdp_wrapped_module
    inner.register_buffer("inv_freq", torch.ones(2).bfloat16(), persistent=False)
    module._buffer_name_to_orig_dtype = {"scale": torch.float32, "inv_freq": torch.float32}

    assert [held.name for held in holding_of(module).tensors] == ["weight", "bias", "scale"]


def test_a_wrapper_around_the_module_is_known_through_one_within() -> None:
    """The Trainer's callbacks get the model without the outermost wrapper."""
    outer: Any = FullyShardedDataParallel()
    inner: Any = FullyShardedDataParallel()
    within = outer._fsdp_wrapped_module
    within.child = inner
    inner._exec_order_data = SimpleNamespace(all_handles=[outer._handle, inner._handle])

    names = [held.name for held in holding_of(within).tensors]

    assert names == ["weight", "bias", "scale", "child.weight", "child.bias", "child.scale"]
