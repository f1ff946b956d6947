"""What lies in a way that is not read is refused by name, before anything is written.

The frameworks' own layouts are tested with the frameworks; here are the states that need an NVMe disk,
experts or quantised slices, stood in for by objects with the attributes that those have.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ckpt_tools.errors import UnsupportedLayout
from ckpt_tools.tensors.catalogue import FlatRange
from ckpt_tools.training.state_dict import holding_of
from ckpt_tools.training.wrappers import Unwrapped


class Model(nn.Module):
    """A parameter, one that is frozen, a second name, buffers of both kinds, and extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.b = nn.Linear(3, 2)
        self.b.weight = self.a.weight
        self.b.bias.requires_grad_(False)
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def get_extra_state(self) -> torch.Tensor:
        return torch.ones(1)

    def set_extra_state(self, state: Any) -> None: ...


def unwrapped(module: nn.Module, engine: Any = None) -> Unwrapped:
    return Unwrapped(module, engine, (module,))


def test_names_order_kinds_and_ties_are_those_of_the_state_dict() -> None:
    holding = holding_of(unwrapped(Model()), masters=False)

    assert [(held.name, held.kind) for held in holding.tensors] == [
        ("kept", "buffer"),
        ("a.weight", "parameter"),
        ("a.bias", "parameter"),
        ("b.bias", "frozen"),
    ]
    assert holding.ties == {"b.weight": "a.weight"}
    assert all(held.is_whole for held in holding.tensors)


class LeavesAPrefixOut(nn.Module):
    """As TRL's value head does."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_model = nn.Linear(2, 2)

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return self.pretrained_model.state_dict(*args, **options)


def test_under_deepspeed_a_parameter_is_called_by_its_place() -> None:
    engine = SimpleNamespace(optimizer=None)

    names = [
        [held.name for held in holding_of(unwrapped(LeavesAPrefixOut(), e), masters=False).tensors]
        for e in (None, engine)
    ]

    assert names == [["weight", "bias"], ["pretrained_model.weight", "pretrained_model.bias"]]


def sliced(rank: int = 1, **attributes: Any) -> nn.Module:
    """A module of one parameter of 5 elements that ZeRO-3 cut in two."""
    module = nn.Module()
    module.w = nn.Parameter(torch.empty(0))
    part: Any = torch.tensor([3.0, 4.0, 9.0] if rank else [0.0, 1.0, 2.0])
    part.ds_numel, part.status = 3, SimpleNamespace(name="AVAILABLE")
    w: Any = module.w
    w.ds_tensor, w.ds_numel, w.ds_shape = part, 5, torch.Size([5])
    w.ds_zero_partition_rank = rank
    for name, value in attributes.items():
        setattr(part, name, value)
    return module


def test_of_a_slice_the_padding_is_left_out() -> None:
    for rank, (region, values) in enumerate(
        [(FlatRange(0, 3), [0.0, 1.0, 2.0]), (FlatRange(3, 5), [3.0, 4.0])]
    ):
        (held,) = holding_of(unwrapped(sliced(rank)), masters=False).tensors
        (piece,) = held.pieces
        assert (held.shape, held.room, held.is_whole) == ((5,), 3, False)
        assert piece.region == region
        assert piece.tensor.tolist() == values


@pytest.mark.parametrize(
    ("attributes", "fact"),
    [
        ({"status": SimpleNamespace(name="NOT_AVAILABLE")}, "w: its slice is on NVMe"),
        ({"ds_numel": 4}, "w: its slice is on NVMe"),
        ({"ds_quant_scale": 1.0}, "w: it is quantised"),
    ],
)
def test_slices_that_are_elsewhere_are_refused(attributes: dict[str, Any], fact: str) -> None:
    with pytest.raises(UnsupportedLayout, match=fact):
        holding_of(unwrapped(sliced(**attributes)), masters=False)


@pytest.mark.parametrize(
    ("engine", "fact"),
    [
        (SimpleNamespace(has_moe_layers=True), "experts on different ranks"),
        (SimpleNamespace(mp_world_size=2), "tensor parallelism"),
        (SimpleNamespace(autotp_size=lambda: 2), "tensor parallelism"),
    ],
)
def test_engines_with_other_parallelism_are_refused(engine: Any, fact: str) -> None:
    with pytest.raises(UnsupportedLayout, match=fact):
        holding_of(unwrapped(Model(), engine), masters=False)


@pytest.mark.parametrize(
    ("mark", "value", "fact"),
    [
        ("allreduce", False, r"a\.bias: an expert"),
        ("tensor_model_parallel", True, r"a\.bias: a tensor-parallel part"),
    ],
)
def test_parts_of_which_each_rank_has_another_are_refused(
    mark: str, value: bool, fact: str
) -> None:
    module: Any = Model()
    setattr(module.a.bias, mark, value)

    with pytest.raises(UnsupportedLayout, match=fact):
        holding_of(unwrapped(module), masters=False)


def test_a_view_of_a_flat_parameter_is_refused() -> None:
    module: Any = Model()
    module.a.bias._fsdp_flattened = True

    with pytest.raises(UnsupportedLayout, match=r"a\.bias: it is part of an FSDP wrapper"):
        holding_of(unwrapped(module), masters=False)


def test_what_has_no_elements_in_memory_is_refused() -> None:
    sparse = Model()
    sparse.register_buffer("odd", torch.eye(2).to_sparse())

    with pytest.raises(UnsupportedLayout, match="weight: it is on the meta device"):
        holding_of(unwrapped(nn.Linear(2, 2, device="meta")), masters=False)
    with pytest.raises(UnsupportedLayout, match="odd: it is a Tensor, whose elements"):
        holding_of(unwrapped(sparse), masters=False)


def test_masters_that_are_not_known_are_not_made_up() -> None:
    module = Model().to(torch.bfloat16)
    engine = SimpleNamespace(optimizer=SimpleNamespace())

    with pytest.raises(
        UnsupportedLayout, match="masters of SimpleNamespace have an unknown layout"
    ):
        holding_of(unwrapped(module, engine), masters=True)
    assert holding_of(unwrapped(Model(), engine), masters=True)


def test_masters_on_nvme_are_refused() -> None:
    module: Any = sliced()
    module.w._z3_optimizer = SimpleNamespace(
        grad_position={7: (0, 0, 3)},
        get_param_id=lambda parameter: 7,
        fp32_partitioned_groups_flat=[torch.ones(3)],
        _swappable_optimizer_subgroup=lambda group: True,
    )

    with pytest.raises(UnsupportedLayout, match="w: its master is not in memory"):
        holding_of(unwrapped(module), masters=True)


def test_masters_of_a_partition_that_was_let_go_are_refused() -> None:
    module: Any = nn.Module()
    module.w = nn.Parameter(torch.ones(4).bfloat16())
    address = SimpleNamespace(start=1, numel=2)
    module.w._hp_mapping = SimpleNamespace(lp_fragment_address=address, hp_fragment=None)

    with pytest.raises(UnsupportedLayout, match="w: its master is not in memory"):
        holding_of(unwrapped(module), masters=True)


def test_reordered_masters_of_an_older_deepspeed_are_refused() -> None:
    optimizer = SimpleNamespace(round_robin_gradients=True)

    with pytest.raises(UnsupportedLayout, match="round_robin_gradients"):
        holding_of(unwrapped(Model(), SimpleNamespace(optimizer=optimizer)), masters=True)
