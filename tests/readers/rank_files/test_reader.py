"""One file a rank: verl, Accelerate without DCP, plain loops; whole, damaged and hostile."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from ckpt_tools import consolidate, extract_lora, inspect, open_checkpoint, readers
from ckpt_tools.errors import (
    AmbiguousCheckpoint,
    CkptError,
    DamagedCheckpoint,
    NotACheckpoint,
    UnsafePickle,
    UnsupportedLayout,
    UsageError,
)
from ckpt_tools.readers.containers.torch_file import TorchFile
from ckpt_tools.readers.rank_files.local_state import local_parts
from ckpt_tools.tensors.catalogue import Box, FlatRange
from ckpt_tools.tensors.checkpoint import Checkpoint
from ckpt_tools.tensors.deferred import settle
from tests.support import damage
from tests.support.hostile import CALLS, splice
from tests.support.readers.contract import (
    FIXTURES,
    Case,
    ReaderContract,
    Tensors,
    assert_same,
    opened,
)

FILES = FIXTURES / "rank_files"
LOCAL = ["rank_files/flat-param-2ranks", "accelerate/fsdp1-local-2ranks"]


class RankCase(Case):
    """A shipped checkpoint of this format; nothing in the files tells a frozen parameter from others."""

    @cached_property
    def facts(self) -> dict[str, Any]:
        return {**super().facts, "frozen": []}

    @cached_property
    def left_out(self) -> set[str]:
        return set()

    @cached_property
    def masters(self) -> Tensors:
        others = {*self.facts["tied"], *self.facts["buffers"]}
        return {name: value for name, value in self.model.items() if name not in others}


CASES = [
    RankCase(path.parent)
    for path in [
        *FILES.glob("*/facts.json"),
        *FIXTURES.glob("accelerate/*-rank-files-*/facts.json"),
    ]
    if not path.parent.name.startswith("flat-param")
]


class TestEveryFixtureOfRankFiles(ReaderContract):
    @pytest.fixture(params=CASES, ids=lambda case: case.name)
    def case(self, request: pytest.FixtureRequest) -> Case:
        case = request.param
        assert isinstance(case, Case)
        return case

    def keeps_model_copy(self, case: Case) -> bool:
        return True

    def framework(self, case: Case) -> str:
        return "accelerate" if case.directory.parent.name == "accelerate" else "verl"

    def test_step_ranks_and_framework_are_those_of_the_run(
        self, checkpoint: Checkpoint, case: Case
    ) -> None:
        found = (checkpoint.step, checkpoint.world_size, checkpoint.framework)
        assert found == (None, case.facts["world_size"], self.framework(case))
        assert checkpoint.remarks == ()

    def test_every_place_can_be_found_beforehand(self, case: Case) -> None:
        catalogue = case.open().catalogue("model")
        assert settle(catalogue.values(), workers=2) == sum(t.pieces for t in catalogue.values())


def test_the_fixtures_cover_what_the_contract_is_for() -> None:
    assert len(CASES) >= 11
    assert {case.facts["world_size"] for case in CASES} == {1, 2, 3, 4}


def checkpoint_of(name: str) -> Checkpoint:
    return opened(next(case for case in CASES if case.name == name))


@pytest.mark.parametrize(
    ("name", "title", "kinds"),
    [
        ("verl-fsdp1-3ranks", "FSDP1 rank files", ["DTensor"]),
        ("fsdp-tp-4ranks", "FSDP2 rank files", ["DTensor"]),
        ("sharded-tensor-3ranks", "FSDP1 rank files", ["ShardedTensor"]),
        ("verl-single", "FSDP1 rank files", ["plain"]),
        ("fsdp1-rank-files-2ranks", "FSDP1 rank files", ["ShardedTensor"]),
        ("fsdp2-rank-files-3ranks", "FSDP rank files", ["DTensor"]),
    ],
)
def test_its_title(name: str, title: str, kinds: list[str]) -> None:
    checkpoint = checkpoint_of(name)
    assert (checkpoint.title, checkpoint.details["kinds"]) == (title, kinds)


def test_whole_rows_are_ranges_and_a_replica_is_read_once() -> None:
    for name in ("verl-fsdp1-3ranks", "verl-hsdp-fsdp2-4ranks"):
        stored = checkpoint_of(name).weights["lm_head.weight"].model
        assert stored is not None
        assert all(isinstance(fragment.region, FlatRange) for fragment in stored.fragments)
        assert stored.pieces == (3 if "3ranks" in name else 2)


def test_the_config_beside_the_files_is_near() -> None:
    location = checkpoint_of("verl-fsdp1-3ranks").location
    assert location.near[0] == FILES / "verl-fsdp1-3ranks" / "checkpoint"


# Layouts that no run here makes, written by torch's own DTensor as each rank of a pretended group.


def save_ranks(
    directory: Path,
    mesh: tuple[int, ...],
    state: dict[str, tuple[torch.Tensor, list[Placement]]],
    turned: bool = False,
) -> Path:
    """Save each rank's part of the tensors; a list of placements may be empty for a plain tensor."""
    directory.mkdir()
    world = torch.Size(mesh).numel()
    for rank, at in enumerate(product(*map(range, mesh))):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            on = init_device_mesh("cpu", mesh)
            saved = {
                name: shard(value, on, at, placements, turned) if placements else value
                for name, (value, placements) in state.items()
            }
            torch.save(saved, directory / f"model_world_size_{world}_rank_{rank}.pt")
        finally:
            dist.destroy_process_group()
    return directory


def shard(
    value: torch.Tensor, mesh: Any, at: Any, placements: list[Placement], turned: bool
) -> DTensor:
    local = value
    for parts, index, placement in zip(mesh.shape, at, placements, strict=True):
        if isinstance(placement, Shard | _StridedShard):
            local = placement._split_tensor(local, parts, with_padding=False)[0][index]
    local = local.detach().clone(memory_format=torch.contiguous_format)
    if turned:
        local = local.mT.contiguous().mT
    return DTensor.from_local(
        local,
        mesh,
        placements,
        run_check=False,
        shape=value.shape,
        stride=value.stride(),
    )


@pytest.mark.parametrize(
    ("mesh", "placements"),
    [
        ((3,), [Shard(1)]),
        ((2, 2), [Shard(1), Shard(1)]),
        ((2, 3), [_StridedShard(1, split_factor=3), Shard(1)]),
        ((3,), [_StridedShard(0, split_factor=2)]),
        ((3,), [_StridedShard(1, split_factor=2)]),
        ((2, 2, 2), [Replicate(), Shard(0), Shard(1)]),
        ((2, 2, 2), [Shard(2), Replicate(), Shard(0)]),
        ((2, 2), [Replicate(), Replicate()]),
    ],
    ids=str,
)
@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
def test_every_way_to_shard(
    tmp_path: Path, mesh: tuple[int, ...], placements: list[Placement], turned: bool
) -> None:
    """A turned part lies with its last two axes exchanged."""
    generator = torch.Generator().manual_seed(0)
    zoo = {
        "cube": torch.randn(5, 7, 3, generator=generator),
        "small": torch.randn(1, 2, 3, generator=generator).to(torch.bfloat16),
        "whole": torch.arange(24, dtype=torch.int64).view(2, 3, 4),
        "empty": torch.empty(4, 0, 2),
    }
    state = {name: (value, placements) for name, value in zoo.items()}
    scale = torch.tensor(-0.0)
    checkpoint = open_checkpoint(
        save_ranks(tmp_path / "saved", mesh, {**state, "scale": (scale, [])}, turned)
    )
    assert list(checkpoint) == [*zoo, "scale"]
    for name, value in (*zoo.items(), ("scale", scale)):
        assert_same(checkpoint[name].load(), value, name)
    assert checkpoint.weights["scale"].kind == "buffer"
    assert checkpoint.weights["cube"].kind == "parameter"


def test_a_0d_tensor_that_is_replicated(tmp_path: Path) -> None:
    placements: list[Placement] = [Replicate()]
    path = save_ranks(tmp_path / "saved", (2,), {"scale": (torch.tensor(1.0), placements)})
    assert_same(open_checkpoint(path)["scale"].load(), torch.tensor(1.0), "scale")


# Where it lies.


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return copy_of("rank_files/verl-fsdp1-3ranks", tmp_path)


def copy_of(fixture: str, tmp_path: Path) -> Path:
    """A copy of a shipped checkpoint to damage."""
    return Path(shutil.copytree(FIXTURES / fixture / "checkpoint", tmp_path / Path(fixture).name))


def test_one_of_its_files_means_the_whole(directory: Path) -> None:
    location = readers.locate(directory / "model_world_size_3_rank_2.pt")
    assert (location.directory, location.name) == (directory, "world_size_3")
    assert readers.locate(directory, "world_size_3") == location


def test_verls_directories_tell_the_step(directory: Path, tmp_path: Path) -> None:
    step = tmp_path / "global_step_40"
    for role in ("actor", "critic"):
        shutil.copytree(directory, step / role)
    with pytest.raises(AmbiguousCheckpoint) as caught:
        readers.locate(step)
    assert caught.value.choices == (str(step / "actor"), str(step / "critic"))
    assert open_checkpoint(step / "critic").step == 40
    assert open_checkpoint(step, tag="actor").step == 40


def test_two_world_sizes_in_a_directory_are_a_choice(directory: Path) -> None:
    for path in (FILES / "verl-fsdp2-bf16-2ranks" / "checkpoint").glob("model_*"):
        shutil.copy(path, directory)
    (directory / "fsdp_config.json").unlink()
    with pytest.raises(AmbiguousCheckpoint) as caught:
        open_checkpoint(directory)
    assert caught.value.choices == ("world_size_2", "world_size_3")
    assert open_checkpoint(directory, tag="world_size_2").world_size == 2
    with pytest.raises(UsageError, match="one of: world_size_2, world_size_3"):
        open_checkpoint(directory, tag="world_size_8")


def test_files_of_a_plain_loop_are_read_and_the_step_of_the_trainer_is_taken(
    tmp_path: Path,
) -> None:
    directory = copy_of("accelerate/fsdp2-rank-files-3ranks", tmp_path)
    for rank in range(3):
        path = directory / f"pytorch_model_fsdp_0_rank{rank}.bin"
        path.rename(directory / f"model_rank{rank}.pt")
    (directory / "trainer_state.json").write_text('{"global_step": 7}')
    checkpoint = open_checkpoint(directory)
    assert (checkpoint.step, checkpoint.world_size, checkpoint.framework) == (7, 3, "torch")


# Damage.


def refusal(path: Path) -> CkptError:
    with pytest.raises(CkptError) as caught:
        settle(open_checkpoint(path).catalogue().values())
    return caught.value


def damaged(path: Path) -> DamagedCheckpoint:
    error = refusal(path)
    assert type(error) is DamagedCheckpoint
    return error


@pytest.mark.parametrize("name", ["checkpoint_rank{}.pt", "policy-rank-{}.pth", "step9.rank{}.bin"])
def test_files_of_a_loop_may_have_any_name_if_their_tensors_say_where_they_lie(
    name: str, tmp_path: Path
) -> None:
    source = next(case for case in CASES if case.directory.name == "verl-fsdp1-3ranks")
    for rank in range(3):
        file = next(source.path.rglob(f"model_world_size_3_rank_{rank}.pt"))
        shutil.copyfile(file, tmp_path / name.format(rank))

    whole = open_checkpoint(tmp_path)
    assert (whole.world_size, whole.framework) == (3, "torch")
    for tensor, truth in source.model.items():
        assert_same(whole[tensor].load(), truth, tensor)
    (tmp_path / name.format(2)).unlink()
    with pytest.raises(DamagedCheckpoint, match="1 of 3 ranks are missing"):
        open_checkpoint(tmp_path / name.format(0))


def test_plain_tensors_under_such_names_are_not_taken_for_replicas(tmp_path: Path) -> None:
    """They may be slices: nothing says how they were cut. One file alone is read as it is."""
    for rank in range(2):
        torch.save(
            {"model": {"a.weight": torch.full((2, 3), rank)}}, tmp_path / f"tp_rank{rank}.pt"
        )

    with pytest.raises(NotACheckpoint) as caught:
        open_checkpoint(tmp_path)
    hint = str(caught.value.hint)
    assert "Nothing records how such files belong together." in hint
    named = Path(hint.rpartition("pass it: ")[2].removesuffix("."))
    assert open_checkpoint(named)["a.weight"].load().equal(torch.zeros(2, 3))


def test_files_of_another_kind_under_such_names_are_not_taken_for_shards(tmp_path: Path) -> None:
    """A loop may name anything after its rank; what cannot be read proves nothing."""
    weight = torch.ones(2, 3)
    save_file({"a.weight": weight}, tmp_path / "model.safetensors", {"format": "pt"})
    for rank in range(2):
        (tmp_path / f"eval_rank{rank}.bin").write_bytes(b"loss 0.1\n" * 99)

    found = open_checkpoint(tmp_path)

    assert found["a.weight"].load().equal(weight)


def test_missing_ranks_are_named_with_the_likely_reason(directory: Path) -> None:
    names = ("model_world_size_3_rank_1.pt", "model_world_size_3_rank_2.pt")
    for name in names:
        (directory / name).unlink()
    error = damaged(directory)
    assert (error.path, error.missing) == (directory, names)
    assert f"2 of 3 ranks are missing: {', '.join(names)}" in error.fact
    assert "every node" in str(error.hint)
    assert names[0] in inspect(directory).problems[0]


@pytest.mark.parametrize("version", [1, 2])
def test_a_last_rank_that_only_the_contents_of_the_others_tell(
    tmp_path: Path, version: int
) -> None:
    name = {1: "fsdp1-rank-files-2ranks", 2: "fsdp2-rank-files-3ranks"}[version]
    directory = copy_of(f"accelerate/{name}", tmp_path)
    lost = f"pytorch_model_fsdp_0_rank{version}.bin"
    (directory / lost).unlink()
    assert damaged(directory).missing == (lost,)


@pytest.mark.parametrize("size", [0, 64, 5000])
def test_a_truncated_file(directory: Path, size: int) -> None:
    path = directory / "model_world_size_3_rank_1.pt"
    damage.truncate(path, size)
    assert damaged(directory).path == path


def test_a_config_of_another_run(directory: Path) -> None:
    config = directory / "fsdp_config.json"
    config.write_text(json.dumps({"FSDP_version": 1, "world_size": 8}))
    error = damaged(directory)
    assert error.path == config
    assert "it states 8 ranks, the files beside it are of 3" in error.fact
    config.write_text("{")
    assert damaged(directory).path == config
    config.write_text("[]")
    assert damaged(directory).path == config


def test_older_versions_of_verl_wrote_no_config(directory: Path) -> None:
    (directory / "fsdp_config.json").unlink()
    assert open_checkpoint(directory).title == "FSDP rank files"


def test_a_file_under_another_ranks_name(directory: Path) -> None:
    path = directory / "model_world_size_3_rank_1.pt"
    shutil.copyfile(directory / "model_world_size_3_rank_0.pt", path)
    error = damaged(directory)
    assert error.path == path
    assert error.fact.startswith("its content was saved as model_world_size_3_rank_0.pt: ")
    torch.save(torch.load(path, weights_only=False), path)
    assert "its name states rank 1, its content rank 0" in damaged(directory).fact


def test_a_file_of_a_larger_run(tmp_path: Path) -> None:
    directory = copy_of("accelerate/fsdp1-rank-files-2ranks", tmp_path)
    other = (
        FIXTURES / "accelerate/fsdp2-rank-files-3ranks/checkpoint/pytorch_model_fsdp_0_rank2.bin"
    )
    shutil.copy(other, directory)
    error = damaged(directory)
    assert error.path == directory / other.name
    assert "more ranks than the 2 of the other files" in error.fact


def test_a_file_of_another_model(directory: Path) -> None:
    name = "model_world_size_3_rank_2.pt"
    shutil.copyfile(FILES / "verl-fsdp2-tied-3ranks" / "checkpoint" / name, directory / name)
    error = damaged(directory)
    assert error.path == directory / name
    assert "Not every rank has it" in str(error.hint)


def test_a_rank_that_lacks_a_tensor(directory: Path) -> None:
    def drop(state: dict[str, Any]) -> None:
        del state["lm_head.weight"]

    path = directory / "model_world_size_3_rank_1.pt"
    edit(path, drop)
    assert (damaged(directory).path, damaged(directory).tensor) == (path, "lm_head.weight")


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what a rank saved, with torch's own classes and no process group."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    change(state)
    torch.save(state, path)


def replace(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    torch.save(change(torch.load(path, map_location="cpu", weights_only=True)), path)


def test_a_replica_that_differs(tmp_path: Path) -> None:
    directory = copy_of("rank_files/verl-hsdp-fsdp2-4ranks", tmp_path)
    path = directory / "model_world_size_4_rank_3.pt"
    edit(path, lambda state: state["lm_head.weight"]._local_tensor[-1, -1].add_(1))
    error = damaged(directory)
    assert (error.path, error.tensor) == (path, "lm_head.weight")
    assert "same elements with different values" in error.fact


def test_a_replica_in_another_place_of_its_file_is_the_same(tmp_path: Path) -> None:
    def move(state: dict[str, Any]) -> None:
        part = state["lm_head.weight"]
        larger = torch.cat([torch.ones_like(part._local_tensor[:1]), part._local_tensor])
        part._local_tensor = larger[1:]

    directory = copy_of("rank_files/verl-hsdp-fsdp2-4ranks", tmp_path)
    edit(directory / "model_world_size_4_rank_3.pt", move)
    assert_same(
        open_checkpoint(directory)["lm_head.weight"].load(),
        RankCase(FILES / "verl-hsdp-fsdp2-4ranks").model["lm_head.weight"],
        "lm_head.weight",
    )


@pytest.mark.parametrize("change", [0, 1])
def test_a_replica_that_lies_otherwise_is_compared_by_its_elements(
    tmp_path: Path, change: int
) -> None:
    def turn(state: dict[str, Any]) -> None:
        part = state["lm_head.weight"]
        part._local_tensor = part._local_tensor.T.contiguous().T
        part._local_tensor[-1, -1] += change

    directory = copy_of("rank_files/verl-hsdp-fsdp2-4ranks", tmp_path)
    edit(directory / "model_world_size_4_rank_3.pt", turn)
    if change:
        assert "same elements with different values" in damaged(directory).fact
    else:
        truth = RankCase(FILES / "verl-hsdp-fsdp2-4ranks").model["lm_head.weight"]
        assert_same(open_checkpoint(directory)["lm_head.weight"].load(), truth, "lm_head.weight")


@pytest.fixture
def awkward(tmp_path: Path) -> Path:
    return copy_of("rank_files/verl-awkward-2ranks", tmp_path)


def test_a_matrix_that_every_rank_holds_whole_and_otherwise(awkward: Path) -> None:
    path = awkward / "model_world_size_2_rank_1.pt"
    edit(path, lambda state: state["table"][0, 0].add_(1))
    assert (damaged(awkward).path, damaged(awkward).tensor) == (path, "table")


def test_a_statistic_of_each_ranks_own_is_a_remark(awkward: Path) -> None:
    path = awkward / "model_world_size_2_rank_1.pt"
    edit(path, lambda state: state["norm.running_mean"].add_(1))
    checkpoint = open_checkpoint(awkward)
    assert checkpoint.remarks == (
        "copies differ between ranks, the first rank's are taken: norm.running_mean",
    )
    truth = RankCase(FILES / "verl-awkward-2ranks").model["norm.running_mean"]
    assert_same(checkpoint["norm.running_mean"].load(), truth, "norm.running_mean")


@pytest.mark.parametrize("other", [torch.zeros(2, 6), torch.zeros(2, 5, dtype=torch.float64)])
def test_a_plain_tensor_of_another_shape_or_dtype(awkward: Path, other: torch.Tensor) -> None:
    path = awkward / "model_world_size_2_rank_1.pt"
    edit(path, lambda state: state.update(table=other))
    assert (damaged(awkward).path, damaged(awkward).tensor) == (path, "table")


def test_legacy_files_are_read(awkward: Path) -> None:
    for path in awkward.glob("model_*"):
        state = torch.load(path, weights_only=True)
        torch.save(state, path, _use_new_zipfile_serialization=False)
    truth = RankCase(FILES / "verl-awkward-2ranks").model
    checkpoint = open_checkpoint(awkward)
    for name in checkpoint:
        assert_same(checkpoint[name].load(), truth[name], name)


@pytest.mark.parametrize("fixture", LOCAL)
def test_a_local_state_of_fsdp1_has_every_element_and_no_shape(fixture: str) -> None:
    checkpoint = open_checkpoint(FIXTURES / fixture / "checkpoint")
    truth = RankCase(FIXTURES / fixture).model
    assert set(checkpoint) == set(truth)
    assert checkpoint.shapeless == truth.keys()
    for name, value in truth.items():
        assert_same(checkpoint[name].load(), value.flatten(), name)
    assert "the shapes of 21 parameters are not recorded" in checkpoint.remarks[0]


@pytest.mark.slow
def test_a_local_state_needs_the_config_of_its_model(tmp_path: Path) -> None:
    source, config = FILES / "flat-param-2ranks" / "checkpoint", FILES / "flat-param-2ranks" / "hf"
    with pytest.raises(UsageError, match="do not record the shapes of 21 parameters"):
        consolidate(source, tmp_path / "bare", weights_only=True)
    with pytest.raises(UnsupportedLayout, match="do not record the shapes of 21 parameters"):
        extract_lora(source, tmp_path / "part")
    wider = json.loads((config / "config.json").read_text()) | {"intermediate_size": 27}
    (tmp_path / "config.json").write_text(json.dumps(wider))
    with pytest.raises(UsageError, match=r"260 elements, but the config describes \(27, 10\)"):
        consolidate(source, tmp_path / "other", config=tmp_path / "config.json")


def test_a_range_that_two_ranks_hold_or_none_is_refused(tmp_path: Path) -> None:
    directory = copy_of("rank_files/flat-param-2ranks", tmp_path)
    files = [directory / f"model_rank{rank}.pt" for rank in (0, 1)]
    name = "model.layers.0.mlp.gate_proj.weight"
    contents = [TorchFile(path).load() for path in files]
    assert [content[name].shape for content in contents] == [(161,), (99,)]
    states = [*zip(files, contents, strict=True)]
    assert [part[name].shape for part in local_parts(states)] == [(260,), (260,)]
    contents[1][name] = contents[1]["model.layers.0.mlp.up_proj.weight"]
    starts = [part[name].runs[0].box for part in local_parts(states)]
    assert starts == [Box((0,), (161,)), Box((260,), (260,))], (
        "the hole between them is refused later"
    )


def test_a_local_state_without_names_is_refused_with_the_way_out() -> None:
    error = refusal(FILES / "flat-param-nameless-2ranks" / "checkpoint")
    assert isinstance(error, UnsupportedLayout)
    assert "an FSDP1 LOCAL state with 3 flat parameters" in error.fact
    assert "use_orig_params=False" in error.fact
    assert "SHARDED_STATE_DICT or FULL_STATE_DICT" in str(error.hint)


def test_a_file_that_holds_no_state_dict(directory: Path) -> None:
    path = directory / "model_world_size_3_rank_0.pt"
    torch.save([torch.ones(2)], path)
    assert "not a state dict" in damaged(directory).fact


def test_the_state_dict_may_stand_under_a_key(directory: Path) -> None:
    plain = open_checkpoint(directory)
    expected = {name: tensor.load() for name, tensor in plain.items()}
    for path in directory.glob("model_world_size_*.pt"):
        replace(path, lambda state: {"model": state, "optimizer": {"w": torch.ones(2)}, "step": 2})

    held = open_checkpoint(directory)

    assert held.keys() == expected.keys()
    for name, value in expected.items():
        assert_same(held[name].load(), value, name)


def test_several_state_dicts_or_none_are_no_damage(directory: Path) -> None:
    first = next(directory.glob("model_world_size_*.pt"))
    replace(first, lambda state: {"model": state, "ema": state})
    assert "holds 2 state dicts: model, ema" in refusal(directory).fact
    replace(first, lambda _: {"step": 2, "seed": 3})
    error = refusal(directory)
    assert (error.fact, error.exit_code) == (
        "it holds no state dict of a model: its entries are step, seed",
        5,
    )


def test_extra_state_of_a_module_is_no_weight(awkward: Path) -> None:
    for path in awkward.glob("model_*"):
        edit(path, lambda state: state.update({"norm._extra_state": {"a": 1}}))
    assert "norm._extra_state" not in open_checkpoint(awkward)
    edit(awkward / "model_world_size_2_rank_1.pt", lambda state: state.update(epoch=3))
    assert "not a tensor" in damaged(awkward).fact


# Other people's files.


def test_only_the_model_files_are_opened(directory: Path) -> None:
    for path in (*directory.glob("optim_*"), *directory.glob("extra_state_*")):
        path.write_bytes(b"garbage")
    assert_same(
        open_checkpoint(directory)["lm_head.weight"].load(),
        RankCase(FILES / "verl-fsdp1-3ranks").model["lm_head.weight"],
        "lm_head.weight",
    )


@pytest.mark.parametrize("attack", CALLS)
def test_no_code_runs(awkward: Path, attack: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    splice(awkward / "model_world_size_2_rank_0.pt", "evil", CALLS[attack](canary))
    assert isinstance(refusal(awkward), DamagedCheckpoint | UnsafePickle | UnsupportedLayout)
    assert not canary.exists()


def test_metadata_alone_needs_no_torch() -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from ckpt_tools import readers\n"
        "readers.read(readers.locate(Path(sys.argv[1])))\n"
        "assert 'torch' not in sys.modules\n"
    )
    path = FILES / "fsdp-tp-4ranks" / "checkpoint"
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)
