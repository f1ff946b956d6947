"""What is in a state dict in place of a plain tensor: read where it wraps one, else refused by its name."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from ckpt_tools.errors import CkptError, DamagedCheckpoint, UnsupportedLayout
from ckpt_tools.readers.containers.restricted_pickle import Opaque, TensorRef
from ckpt_tools.readers.containers.subclasses import SUBCLASS, plain
from ckpt_tools.readers.containers.torch_file import TorchFile
from ckpt_tools.readers.containers.weight_files import tensors_of
from ckpt_tools.tensors.dtypes import FLOAT32
from tests.support.readers.contract import assert_same

HERE = Path("model.bin")


def saved(value: object, tmp_path: Path) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"w": value}, tmp_path / "model.bin")
    return dict(tensors_of(TorchFile(tmp_path / "model.bin").load(), tmp_path / "model.bin")[0])


class Named(torch.Tensor):
    """A subclass that adds behaviour to its own storage."""


def _with_attribute() -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.arange(3.0))
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    return parameter


@pytest.mark.parametrize(
    "value",
    [
        torch.nn.Parameter(torch.arange(3.0)),
        _with_attribute(),
        torch.nn.Buffer(torch.arange(3.0)),
        torch.arange(3.0).as_subclass(Named),
    ],
    ids=["parameter", "parameter with an attribute", "buffer", "subclass"],
)
def test_subclasses_with_a_storage_of_their_own_are_tensors(
    value: torch.Tensor, tmp_path: Path
) -> None:
    assert_same(saved(value, tmp_path)["w"].load(), torch.arange(3.0), "w")


def _made() -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "a sparse tensor": torch.eye(3).to_sparse(),
            "a sparse tensor ": torch.eye(3).to_sparse_csr(),
            "a quantised tensor of torch": torch.quantize_per_tensor(
                torch.ones(3), 0.1, 0, torch.quint8
            ),
            "a tensor on the meta device": torch.empty(3, device="meta"),
            "a nested tensor": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            "_rebuild_njt": torch.nested.nested_tensor(
                [torch.ones(2), torch.ones(3)], layout=torch.jagged
            ),
            "dtype is torch.float4_e2m1fn_x2": torch.empty(2, dtype=torch.float4_e2m1fn_x2),
            "conjugate or negative bit": torch.ones(2, dtype=torch.complex64).conj(),
        }


@pytest.mark.parametrize("kind", list(_made()))
def test_every_other_kind_is_named_with_a_next_step(kind: str, tmp_path: Path) -> None:
    with pytest.raises(CkptError) as caught:
        saved(_made()[kind], tmp_path)
    assert kind.strip() in caught.value.fact
    assert caught.value.tensor == "w"
    assert caught.value.hint
    if kind != "_rebuild_njt":
        assert isinstance(caught.value, UnsupportedLayout)


class Storage:
    path = HERE
    dtype, numel, data_offset = FLOAT32, 6, 64


REF = TensorRef(Storage(), FLOAT32, 0, (2, 3), (3, 1))  # type: ignore[arg-type]


def wrapper(name: str, state: object, *, shape: tuple[int, ...] = (2, 3)) -> Opaque:
    kind = type("Kind", (Opaque,), {"global_name": name})
    made = type("Made", (Opaque,), {"global_name": SUBCLASS})(kind, FLOAT32, shape)
    made.state = state
    return made


FLOAT8 = "torchao.float8.fsdp_utils.WeightWithDynamicFloat8CastTensor"


@pytest.mark.parametrize("state", [{"_tensor": REF}, ({"_tensor": REF}, None)])
def test_a_wrapper_of_torchao_is_its_inner_tensor(state: object) -> None:
    assert plain(wrapper(FLOAT8, state), HERE, "w") is REF
    twice = wrapper(FLOAT8, {"_tensor": wrapper(FLOAT8, state)})
    assert plain(twice, HERE, "w") is REF


@pytest.mark.parametrize(
    "value",
    [
        wrapper("elsewhere.WeightWithDynamicFloat8CastTensor", {"_tensor": REF}),
        wrapper("torchao.quantization.Int8Tensor", {"qdata": REF, "scale": REF}),
        wrapper(FLOAT8, {"_data": REF}),
        wrapper(FLOAT8, {"_tensor": REF}, shape=(3, 2)),
        wrapper(FLOAT8, None),
    ],
)
def test_a_subclass_that_is_no_known_wrapper_is_refused_by_its_class(value: Opaque) -> None:
    with pytest.raises(UnsupportedLayout, match=value.args[0].global_name):
        plain(value, HERE, "w")


def test_a_wrapper_in_itself_ends() -> None:
    state: dict[str, object] = {}
    state["_tensor"] = wrapper(FLOAT8, state)
    with pytest.raises(DamagedCheckpoint, match="nested too deeply"):
        plain(state["_tensor"], HERE, "w")


@pytest.mark.parametrize("placements", [[Replicate()], [Shard(0)]], ids=["replicated", "sharded"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_dtensor_is_read_where_the_file_holds_all_of_it(
    tmp_path: Path, placements: list[Any], ranks: int
) -> None:
    whole = torch.arange(12.0).view(4, 3)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        mesh = init_device_mesh("cpu", (ranks,))
        held = whole[: 4 // ranks] if isinstance(placements[0], Shard) else whole
        value = DTensor.from_local(
            held.clone(), mesh, placements, run_check=False, shape=whole.shape, stride=(3, 1)
        )
        if len(held) == len(whole):
            assert_same(saved(value, tmp_path)["w"].load(), whole, "w")
        else:
            with pytest.raises(UnsupportedLayout, match="the part of one rank: 6 of 12"):
                saved(value, tmp_path)
    finally:
        dist.destroy_process_group()
