"""Tensor-parallel ranks, pipelines, experts, universal checkpoints: what is recorded and what is refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tools import open_checkpoint
from ckpt_tools.conversion.masters import check_masters
from ckpt_tools.errors import AmbiguousCheckpoint, CkptError, DamagedCheckpoint, UnsupportedLayout
from tests.support import damage
from tests.support.readers.contract import FIXTURES, Case, assert_same

LAYOUTS = FIXTURES / "layouts"
AUTOTP = "autotp-zero2-bf16-qwen2-4ranks"
FUSED = "autotp-zero1-bf16-phi3-fused-2ranks"
MEGATRON = "pipeline-bf16-megatron-4ranks"
PIPELINE = "pipeline-zero1-bf16-llama-4ranks"
MOE = "moe-zero2-bf16-native-4ranks"
AUTOEP = "autoep-zero2-bf16-mixtral-4ranks"
UNIVERSAL = "universal-zero3-bf16-qwen3-tied-2ranks"
INFO = "universal_checkpoint_info"


def copy_of(fixture: str, tmp_path: Path) -> Path:
    """A copy of a shipped checkpoint; returns the directory of its shards."""
    root = tmp_path / fixture
    shutil.copytree(LAYOUTS / fixture / "checkpoint", root)
    (pointer,) = root.glob("latest*")
    return root / pointer.read_text()


def edited(fixture: str, tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy in whose model files the record of slices was changed."""
    directory = copy_of(fixture, tmp_path)
    for path in directory.glob("*mp_rank_*_model_states.pt"):
        if "expert" not in path.name:
            damage.edit(path, lambda content: change(content[INFO]))
    return directory


def assert_is_the_live_model(directory: Path, fixture: str) -> None:
    checkpoint, case = open_checkpoint(directory), Case(LAYOUTS / fixture)
    assert set(checkpoint) == set(case.model)
    for name, truth in case.masters.items():
        assert_same(checkpoint[name].load(), truth, name)
    for name, truth in case.model.items():
        assert_same(checkpoint.catalogue("model")[name].load(), truth, name)


# Tensor parallelism.


@pytest.mark.parametrize("fixture", [AUTOTP, FUSED, "autotp-zero0-fp32-qwen2-2ranks"])
def test_without_its_geometry_a_slice_is_joined_by_its_category(
    fixture: str, tmp_path: Path
) -> None:
    """Rows, columns, replicated and fused parameters, as converters before the affine map read them."""
    directory = edited(fixture, tmp_path, lambda info: info.pop("affine_map"))
    assert_is_the_live_model(directory, fixture)


@pytest.mark.parametrize("shape", [(2, -1), ((26, 26), -1)], ids=["count", "sizes"])
def test_fused_parameters_of_older_records_were_cut_evenly(shape: Any, tmp_path: Path) -> None:
    def older(info: dict[str, Any]) -> None:
        del info["affine_map"], info["sub_param_shard_widths"]
        info["parameter_with_sub_params"][0]["shape"] = shape

    assert_is_the_live_model(edited(FUSED, tmp_path, older), FUSED)


def test_the_padding_of_a_vocabulary_is_cut_off() -> None:
    case = Case(LAYOUTS / MEGATRON)
    embedding = open_checkpoint(case.path)["tied_modules.embed.weight"]
    assert embedding.shape == (67, 10)
    assert_same(embedding.load(), case.masters["tied_modules.embed.weight"], "embedding")


def unrecorded(tmp_path: Path) -> Path:
    directory = copy_of(AUTOTP, tmp_path)
    for path in damage.model_files(directory):
        damage.edit(path, lambda content: content.pop(INFO))
    return directory


def undescribed(tmp_path: Path) -> Path:
    def change(info: dict[str, Any]) -> None:
        del info["affine_map"]["params"][r"^lm_head\.weight$"]
        info["autotp_unsupported_parameter_patterns"] = {r"^lm_head\.weight$": "interleaved"}

    return edited(AUTOTP, tmp_path, change)


def averaged(tmp_path: Path) -> Path:
    def change(info: dict[str, Any]) -> None:
        del info["affine_map"]
        info["parameter_to_average_patterns"] = [r".*norm\.weight"]

    return edited(AUTOTP, tmp_path, change)


def scaled(tmp_path: Path) -> Path:
    def change(info: dict[str, Any]) -> None:
        for rank in info["affine_map"]["params"][r"^model\.norm\.weight$"]["ranks"].values():
            rank["pieces"][0]["scale"] = 0.5

    return edited(AUTOTP, tmp_path, change)


def later(tmp_path: Path) -> Path:
    return edited(AUTOTP, tmp_path, lambda info: info["affine_map"].update(version=2))


def folded(tmp_path: Path) -> Path:
    directory = copy_of(AUTOTP, tmp_path)
    for path in damage.model_files(directory):
        damage.edit(path, lambda content: content.update(num_experts=[4]))
    return directory


SOUND = {
    unrecorded: "does not record how its slices are cut",
    undescribed: "could not describe how it is cut: interleaved",
    averaged: "must be averaged over the tensor-parallel ranks",
    scaled: "the ranks hold it scaled",
    later: "its affine_map has version 2",
    folded: "experts and model parallelism together",
}


@pytest.mark.parametrize("made", SOUND, ids=lambda made: made.__name__)
def test_a_sound_file_is_refused_by_its_layout_and_never_called_damaged(
    made: Callable[[Path], Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedLayout) as caught:
        open_checkpoint(made(tmp_path))
    assert SOUND[made] in caught.value.fact
    assert caught.value.hint
    said = f"{caught.value.fact} {caught.value.hint}"
    assert not re.search(r"damaged|missing|another|changed|corrupt|truncated", said)


# Files that are not there.


def drop(directory: Path, pattern: str) -> str:
    (path,) = directory.glob(pattern)
    path.unlink()
    return str(path.relative_to(directory))


@pytest.mark.parametrize(
    ("fixture", "lost", "fact"),
    [
        (AUTOTP, "mp_rank_01_model*", "a DeepSpeed checkpoint with no *_model_states.pt file"),
        (MEGATRON, "layer_02-model_01*", "the layers [2] lack the file of tensor-parallel rank 1"),
        (MOE, "layer_1_expert_2_*", "files of experts are missing (1)"),
        (AUTOEP, "layer_0_expert_3_*", "files of experts are missing (1)"),
        (UNIVERSAL, "zero/model.norm.weight/fp32.pt", "1 of 13 parameters have no fp32.pt"),
        (UNIVERSAL, "zero_pp_rank_0_*", None),
        (
            "pipeline-bf16-llama-tied-2ranks",
            "layer_02*",
            "9 parameters have a master and no layer's",
        ),
    ],
)
def test_a_file_that_is_not_there_is_named(
    fixture: str, lost: str, fact: str | None, tmp_path: Path
) -> None:
    directory = copy_of(fixture, tmp_path)
    name = drop(directory, lost)
    if fact is None:  # nothing is frozen: every rank's copy of the model file says the same
        assert len(open_checkpoint(directory)) == len(Case(LAYOUTS / fixture).masters)
        return
    with pytest.raises(DamagedCheckpoint) as caught:
        open_checkpoint(directory)
    assert caught.value.fact.startswith(fact)
    assert caught.value.hint
    assert (
        name in caught.value.missing
        or "*" in caught.value.missing[0]
        or "model_00" in str(caught.value.missing)
    )


def test_all_files_of_a_model_parallel_rank_may_be_elsewhere(tmp_path: Path) -> None:
    directory = copy_of(AUTOTP, tmp_path)
    for path in directory.glob("*mp_rank_01_*"):
        path.unlink()
    with pytest.raises(DamagedCheckpoint) as caught:
        open_checkpoint(directory)
    assert caught.value.fact == "the files of 1 of 2 model-parallel ranks are missing"
    assert caught.value.missing == ("mp_rank_01_model_states.pt",)


@pytest.mark.parametrize("fixture", [AUTOTP, PIPELINE, MEGATRON, MOE, AUTOEP])
def test_the_16_bit_weights_are_read_without_optimizer_files(fixture: str, tmp_path: Path) -> None:
    directory = copy_of(fixture, tmp_path)
    for path in damage.optim_files(directory):
        path.unlink()
    checkpoint, case = open_checkpoint(directory), Case(LAYOUTS / fixture)
    for name, truth in case.model.items():
        assert_same(checkpoint.catalogue("model")[name].load(), truth, name)
    with pytest.raises(CkptError, match="--weights model takes them"):
        checkpoint.catalogue()


# What is exchanged is found out.


def test_masters_of_exchanged_experts_are_found_out(tmp_path: Path) -> None:
    directory = copy_of(MOE, tmp_path)
    for path in directory.glob("layer_0_expert_[03]_*"):
        path.rename(path.with_suffix(".kept"))
    for old, new in ((0, 3), (3, 0)):
        source = directory / f"layer_0_expert_{old}_mp_rank_00_model_states.kept"
        content = torch.load(source)
        prefix = "layers.0.deepspeed_moe.experts.deepspeed_experts."
        torch.save(
            {name.replace(f"{prefix}{old}.", f"{prefix}{new}."): t for name, t in content.items()},
            directory / f"layer_0_expert_{new}_mp_rank_00_model_states.pt",
        )
        source.unlink()
    with pytest.raises(DamagedCheckpoint, match="is not its 16-bit weight"):
        check_masters(open_checkpoint(directory), check_all_masters=False, workers=1)


def test_expert_parallel_ranks_may_follow_data_parallel_ones(tmp_path: Path) -> None:
    """`use_data_before_expert_parallelism`: the ranks that hold the same experts are neighbours."""
    directory = copy_of(MOE, tmp_path)
    order = {0: 0, 1: 2, 2: 1, 3: 3}
    for path in damage.optim_files(directory):
        path.rename(path.with_suffix(".kept"))
    for old, new in order.items():
        name = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states"
        path = (directory / f"{name.format(old)}.kept").rename(directory / f"{name.format(new)}.pt")
        damage.edit(path, lambda content: None)  # saved under this name
    damage.edit(
        directory / "mp_rank_00_model_states.pt",
        lambda content: content["ds_config"].update(use_data_before_expert_parallelism=True),
    )
    checkpoint, case = open_checkpoint(directory), Case(LAYOUTS / MOE)
    experts = [name for name in case.masters if ".experts." in name]
    assert experts
    for name in experts:
        assert_same(checkpoint[name].load(), case.masters[name], name)


# Where people point.


def test_a_universal_checkpoint_is_found_where_people_point(tmp_path: Path) -> None:
    directory = copy_of(UNIVERSAL, tmp_path)
    root = directory.parent
    places = [root, root / "latest_universal", directory, directory / "zero"]
    assert {open_checkpoint(place).location.directory for place in places} == {directory}
    assert (
        open_checkpoint(root, tag=directory.name).title == "DeepSpeed ZeRO-3, universal checkpoint"
    )


def test_a_parameter_of_a_universal_checkpoint_may_have_a_slash_in_its_name(tmp_path: Path) -> None:
    """A key of a ParameterDict, say: ds_to_universal makes a folder in a folder of it."""
    directory = copy_of(UNIVERSAL, tmp_path)
    old, new = "model.norm.weight", "model.norm/of/all"

    def rename(content: dict[str, Any]) -> None:
        for named in (content["module"], *content["param_shapes"]):
            if old in named:
                named[new] = named.pop(old)

    for path in damage.model_files(directory):
        damage.edit(path, rename)
    (directory / "zero" / new).parent.mkdir(parents=True)
    (directory / "zero" / old).rename(directory / "zero" / new)

    masters = open_checkpoint(directory).catalogue()
    whole = open_checkpoint(FIXTURES / "layouts" / UNIVERSAL / "checkpoint").catalogue()
    assert torch.equal(masters[new].load(), whole[old].load())


def test_masters_of_a_universal_checkpoint_are_doubted_after_round_robin_gradients(
    tmp_path: Path,
) -> None:
    """DeepSpeed records fragments in another order than that of the partition, and cuts by that record."""
    directory = copy_of("universal-zero1-bf16-llama-2ranks", tmp_path)
    assert not open_checkpoint(directory).doubts
    (path,) = damage.model_files(directory)
    damage.edit(
        path,
        lambda content: content["ds_config"]["zero_optimization"].update(
            round_robin_gradients=True
        ),
    )
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"]
    one, other = (directory / "zero" / name / "fp32.pt" for name in names)
    damage.swap(one, other)

    with pytest.raises(DamagedCheckpoint, match="had round_robin_gradients"):
        check_masters(open_checkpoint(directory), check_all_masters=False, workers=1)


def test_a_universal_checkpoint_beside_its_source_is_chosen_by_its_tag(tmp_path: Path) -> None:
    directory = copy_of("universal-zero1-bf16-llama-2ranks", tmp_path)
    root = directory.parent
    shutil.copytree(damage.shards_of("zero1-bf16-llama-2ranks"), root / "global_step2")
    (root / "latest").write_text("global_step2")
    plain = open_checkpoint(root)
    assert (plain.title, plain.remarks) == ("DeepSpeed ZeRO-1", ())
    universal = open_checkpoint(root, tag="global_step2_universal")
    assert universal.title == "DeepSpeed ZeRO-1, universal checkpoint"
    (root / "latest").unlink()
    (root / "latest_universal").unlink()
    with pytest.raises(AmbiguousCheckpoint):
        open_checkpoint(root)


def test_files_of_sequence_ranks_are_those_of_data_parallel_ranks() -> None:
    for stage in (1, 3):
        case = Case(LAYOUTS / f"old-0.18.3-ulysses-zero{stage}-bf16-llama-4ranks")
        checkpoint = open_checkpoint(case.path)
        assert (checkpoint.title, checkpoint.world_size) == (f"DeepSpeed ZeRO-{stage}", 4)


def test_tensor_parallel_files_of_which_some_are_lost_are_not_taken_for_sequence_ranks(
    tmp_path: Path,
) -> None:
    directory = copy_of(AUTOTP, tmp_path)
    drop(directory, "*pp_rank_1_mp_rank_00_optim*")
    drop(directory, "*pp_rank_0_mp_rank_01_optim*")
    with pytest.raises(CkptError):
        open_checkpoint(directory).catalogue()


def test_the_file_of_save_16bit_model_is_a_hugging_face_one() -> None:
    case = Case(LAYOUTS / "bin-zero3-bf16-qwen3-tied-2ranks")
    checkpoint = open_checkpoint(case.path)
    assert checkpoint.title == "Hugging Face torch"
    assert dict(checkpoint.ties) == case.ties
    for name, truth in case.model.items():
        assert_same(checkpoint[name].load(), truth, name)


def test_a_mics_group_that_is_not_the_recorded_one_is_found_out(tmp_path: Path) -> None:
    directory = copy_of("old-0.18.3-mics-zero3-bf16-llama-4ranks", tmp_path)
    for path in damage.model_files(directory):
        damage.edit(path, lambda c: c["ds_config"]["zero_optimization"].update(mics_shard_size=4))
    with pytest.raises(DamagedCheckpoint, match="states 4 ranks, the optimizer files state 2"):
        open_checkpoint(directory)


def test_slice_mappings_with_a_gap_are_not_taken_for_a_tensor(tmp_path: Path) -> None:
    directory = copy_of("old-0.18.3-moe-zero1-bf16-native-2ranks", tmp_path)

    def shift(content: dict[str, Any]) -> None:
        dense = content["optimizer_state_dict"]["param_slice_mappings"][0]
        dense["layers.1.deepspeed_moe.gate.wg.weight"].start = 1

    damage.edit(damage.optim_files(directory)[1], shift)
    with pytest.raises(DamagedCheckpoint, match="slices"):
        open_checkpoint(directory)
