"""Raw DeepSpeed checkpoints, all that are shipped, against the live engines that wrote them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
import torch

from ckpt_tools import open_checkpoint
from ckpt_tools.conversion.masters import check_masters
from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.readers.containers import torch_file
from ckpt_tools.readers.deepspeed.names import names_in
from ckpt_tools.readers.deepspeed.shards import open_shards
from ckpt_tools.tensors.checkpoint import Checkpoint
from tests.support import damage
from tests.support.readers.contract import FIXTURES, Case, ReaderContract, assert_same, cases
from tests.support.readers.contract import opened as opened_case

ZERO = FIXTURES / "zero"
CASES = cases("zero")


class TestEveryZeroFixture(ReaderContract):
    @pytest.fixture(params=CASES, ids=lambda case: case.name)
    def case(self, request: pytest.FixtureRequest) -> Case:
        case = request.param
        assert isinstance(case, Case)
        return case

    def keeps_model_copy(self, case: Case) -> bool:
        # Stage 3 keeps the weights of frozen parameters and buffers only.
        return bool(case.facts["stage"] < 3)

    def framework(self, case: Case) -> str:
        # Releases before 0.4 did not say which they were.
        return (
            f"deepspeed {case.facts['deepspeed_version']}" if case.release > (0, 4) else "deepspeed"
        )

    def test_the_stage_is_recorded(self, checkpoint: Checkpoint, case: Case) -> None:
        # BF16_Optimizer partitions its masters as stage 1 does, under whatever stage it was chosen.
        stage = case.facts["stage"]
        if case.facts["optimizer_wrapper"] == "BF16_Optimizer":
            stage = 1
        assert checkpoint.details["stage"] == stage
        assert checkpoint.details["skipped_steps"] == case.facts["skipped_steps"]

    def test_masters_have_the_dtype_that_the_optimizer_kept(
        self, checkpoint: Checkpoint, case: Case
    ) -> None:
        kept = {str(w.master.dtype) for w in checkpoint.weights.values() if w.master is not None}
        # fp32 training without ZeRO keeps no copy: the weights are the masters.
        assert kept <= set(case.facts["master_dtype"].split("+"))
        assert kept or case.facts["stage"] == 0

    def test_masters_agree_with_the_weights_that_lie_beside_them(
        self, checkpoint: Checkpoint, case: Case
    ) -> None:
        compared = check_masters(checkpoint, check_all_masters=True, workers=1)
        both = case.facts["stage"] < 3 and any(w.master for w in checkpoint.weights.values())
        assert bool(compared) == both


def test_the_fixtures_cover_what_the_contract_is_for() -> None:
    names = {case.name for case in CASES}
    assert len(names) >= 60
    assert {case.facts["stage"] for case in CASES} == {0, 1, 2, 3}
    assert {case.facts["world_size"] for case in CASES} >= {2, 3, 5, 7}


# Each trait of a layout, in one sentence. The values of each are held by the contract above.


@lru_cache
def case_of(name: str) -> Case:
    return Case(ZERO / name)


def opened(name: str) -> Checkpoint:
    return opened_case(case_of(name))


def assert_is_the_live_master(name: str, *tensors: str) -> None:
    assert tensors
    for tensor in tensors:
        assert_same(opened(name)[tensor].load(), case_of(name).masters[tensor], tensor)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_says_its_name(stage: int) -> None:
    name = {
        0: "zero0-bf16-llama-fused-2ranks",
        1: "zero1-bf16-llama-2ranks",
        2: "zero2-bf16-llama-3ranks",
        3: "zero3-bf16-llama-7ranks",
    }[stage]
    assert opened(name).title == (f"DeepSpeed ZeRO-{stage}" if stage else "DeepSpeed without ZeRO")


@pytest.mark.parametrize(
    "name",
    [
        "zero1-bf16-llama-fp32-grad-accum-3ranks",
        "zero1-bf16-qwen3-fp32-grad-accum-groups-2ranks",
        "zero1-bf16-llama-fp32-grad-accum-frozen-2ranks",
    ],
)
def test_files_of_bf16_optimizer_are_known_by_their_missing_stage(name: str) -> None:
    checkpoint = opened(name)
    assert (checkpoint.title, checkpoint.details["stage"]) == ("DeepSpeed BF16_Optimizer", 1)


def test_bf16_optimizer_padding_is_not_taken_for_weights() -> None:
    name = "zero1-bf16-llama-fp32-grad-accum-3ranks"
    assert_is_the_live_master(name, *case_of(name).masters)


@pytest.mark.parametrize("stage", [2, 3])
def test_masters_kept_in_bf16_stay_bf16(stage: int) -> None:
    checkpoint = opened(f"zero{stage}-bf16-llama-bf16-masters-2ranks")
    assert {str(tensor.dtype) for tensor in checkpoint.catalogue().values()} == {"bfloat16"}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_keeps_frozen_parameters(stage: int) -> None:
    name = f"zero{stage}-bf16-llama-frozen-{3 if stage == 3 else 2}ranks"
    frozen = case_of(name).facts["frozen"]
    assert_is_the_live_master(name, *frozen)
    assert {opened(name).weights[tensor].kind for tensor in frozen} == {"frozen"}
    assert {opened(name).weights[tensor].master for tensor in frozen} == {None}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_frozen_parameters_that_were_left_out_are_absent_and_not_invented(stage: int) -> None:
    name = f"zero{stage}-bf16-llama-frozen-excluded-2ranks"
    left_out = case_of(name).left_out
    assert left_out
    assert left_out.isdisjoint(opened(name))


def test_a_placeholder_without_values_anywhere_is_left_out_and_named(tmp_path: Path) -> None:
    """DeepSpeed 0.7 did not save frozen parameters of stage 3 and recorded none of them."""
    directory = damage.copy_of("zero3-bf16-llama-frozen-3ranks", tmp_path)
    for path in damage.model_files(directory):
        damage.edit(path, lambda c: [c.pop("frozen_param_shapes"), c.pop("frozen_param_fragments")])
    checkpoint = open_checkpoint(directory)
    frozen = case_of("zero3-bf16-llama-frozen-3ranks").facts["frozen"]
    assert set(frozen).isdisjoint(checkpoint)
    (remark,) = checkpoint.remarks
    assert remark.startswith("frozen or tied parameters without values in any file: ")
    assert all(name in remark for name in frozen)


@pytest.mark.parametrize(
    "name", ["zero2-bf16-llama-groups-3ranks", "zero3-bf16-llama-groups-2ranks"]
)
def test_several_parameter_groups_are_not_in_the_order_of_the_module(name: str) -> None:
    # A third group without parameters was passed; DeepSpeed itself drops it.
    assert case_of(name).facts["param_groups"] == 2
    assert_is_the_live_master(name, "model.norm.weight", "lm_head.weight")


def test_a_group_whose_parameters_are_all_frozen_hurts_nothing() -> None:
    name = "zero3-bf16-llama-frozen-group-2ranks"
    assert case_of(name).facts["param_groups"] == 3
    assert_is_the_live_master(name, *case_of(name).masters)


def test_several_flat_sub_groups_are_walked_one_after_the_other() -> None:
    name = "zero3-bf16-llama-sub-groups-3ranks"
    groups = opened(name).details["flat_groups"]
    assert isinstance(groups, int)
    assert groups > 2
    assert_is_the_live_master(name, *case_of(name).masters)


@pytest.mark.parametrize(
    "name",
    ["zero2-bf16-llama-round-robin-3ranks", "zero1-bf16-llama-round-robin-groups-3ranks"],
)
def test_round_robin_is_read_by_order_because_its_slice_mappings_are_wrong(name: str) -> None:
    checkpoint = opened(name)
    assert checkpoint.details["round_robin_gradients"] is True
    assert checkpoint.doubts == ()
    assert_is_the_live_master(name, *case_of(name).masters)


def test_gaps_between_aligned_parameters_are_skipped() -> None:
    name = "zero2-bf16-llama-aligned-3ranks"
    assert_is_the_live_master(name, *case_of(name).masters)


def test_a_parameter_smaller_than_the_world_lies_on_some_ranks_only() -> None:
    name = "zero3-bf16-buffers-5ranks"
    case = case_of(name)
    small = [n for n, value in case.masters.items() if 0 < value.numel() < 5]
    assert_is_the_live_master(name, *small)
    assert all(opened(name)[n].pieces == case.masters[n].numel() for n in small)


def test_a_stage_3_parameter_is_one_slice_a_rank() -> None:
    checkpoint = opened("zero3-bf16-llama-7ranks")
    tensor = checkpoint["lm_head.weight"]
    assert tensor.pieces == 7
    files = {move.file.name for move in tensor.moves(0, tensor.numel)}
    assert files == {f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(7)}


def test_the_flat_groups_of_ranks_need_not_lie_alike_in_their_files(tmp_path: Path) -> None:
    """What else a file holds may be longer on one rank: everything behind it lies further on."""
    case = case_of("zero3-bf16-llama-7ranks")
    directory = damage.copy_of(case.name, tmp_path)
    damage.edit(damage.optim_files(directory)[0], lambda content: content.update(note="x" * 5000))

    checkpoint = open_checkpoint(directory)

    tensor = checkpoint["lm_head.weight"]
    assert len({move.offset for move in tensor.moves(0, tensor.numel)}) > 1
    for name, truth in case.masters.items():
        assert_same(checkpoint[name].load(), truth, name)


def test_a_stage_2_parameter_may_cross_a_border_between_ranks() -> None:
    checkpoint = opened("zero2-bf16-llama-3ranks")
    crossing = [name for name, w in checkpoint.weights.items() if w.master and w.master.pieces > 1]
    assert_is_the_live_master("zero2-bf16-llama-3ranks", *crossing)


@pytest.mark.parametrize("name", [case.name for case in CASES if case.ties])
def test_a_tied_tensor_answers_to_every_one_of_its_names(name: str) -> None:
    checkpoint, case = opened(name), case_of(name)
    for alias, kept in case.ties.items():
        assert alias not in checkpoint.weights
        assert checkpoint[alias] is checkpoint[kept]


def test_four_names_of_one_tensor_are_one_tensor() -> None:
    for name in ("zero1-bf16-t5-2ranks", "zero3-bf16-t5-2ranks"):
        assert len(case_of(name).facts["tied"]) == 3
        assert len(set(opened(name).ties.values())) == 1


@pytest.mark.parametrize("stage", [2, 3])
def test_buffers_of_any_dtype_are_kept_as_they_are(stage: int) -> None:
    name = f"zero{stage}-bf16-buffers-5ranks"
    case = case_of(name)
    dtypes = {case.model[buffer].dtype for buffer in case.facts["buffers"]}
    assert dtypes >= {torch.bool, torch.int64, torch.float32}
    for buffer in case.facts["buffers"]:
        assert_same(opened(name)[buffer].load(), case.model[buffer], buffer)


def test_wrapper_prefixes_are_left_to_the_transforms() -> None:
    assert all(name.startswith("_orig_mod.") for name in opened("zero2-bf16-llama-compiled-2ranks"))
    assert all(
        name.startswith("module.") for name in opened("zero3-bf16-llama-under-module-2ranks")
    )


def test_the_legacy_serialization_of_torch_is_read_too() -> None:
    name = "zero2-bf16-llama-legacy-torch-2ranks"
    assert {p.read_bytes()[:2] for p in opened(name).files} == {b"\x80\x02"}
    assert_is_the_live_master(name, *case_of(name).masters)


def test_a_class_of_the_training_script_in_the_client_state_does_no_harm() -> None:
    name = "zero3-bf16-llama-client-object-2ranks"
    first = min(opened(name).files)
    assert any(b"RunInfo" in p.read_bytes() for p in opened(name).files), first
    assert_is_the_live_master(name, "lm_head.weight")


def test_without_zero_the_order_of_nameless_masters_is_found_and_doubted() -> None:
    name = "zero0-bf16-qwen3-tied-fused-groups-2ranks"
    assert_is_the_live_master(name, *case_of(name).masters)
    assert opened(name).doubts == ("masters of stage 0 have no recorded names",)


def test_without_zero_masters_that_fit_no_weight_are_left_out(tmp_path: Path) -> None:
    name = "zero0-bf16-llama-fused-2ranks"
    directory = damage.copy_of(name, tmp_path)

    def spoil(content: damage.Content) -> None:
        for flat in content["optimizer"]["fp32_groups_flat"]:
            flat.data += 1.0

    damage.edit(directory / "mp_rank_00_model_states.pt", spoil)
    checkpoint = open_checkpoint(directory)
    assert {weight.master for weight in checkpoint.weights.values()} == {None}
    (remark,) = checkpoint.remarks
    assert remark.startswith("the values of the fp32 masters match no order of the weights")
    for tensor, truth in case_of(name).model.items():
        assert_same(checkpoint[tensor].load(), truth, tensor)


def test_without_zero_masters_that_are_channels_last_are_left_out(tmp_path: Path) -> None:
    name = "zero0-bf16-llama-unfused-2ranks"
    directory = damage.copy_of(name, tmp_path)

    def stride(content: damage.Content) -> None:
        for group in content["optimizer"]["fp32_groups"]:
            group[:] = [t.t().contiguous().t() if t.dim() == 2 else t for t in group]

    damage.edit(directory / "mp_rank_00_model_states.pt", stride)
    checkpoint = open_checkpoint(directory)
    (remark,) = checkpoint.remarks
    assert "channels last" in remark
    for tensor, truth in case_of(name).model.items():
        assert_same(checkpoint[tensor].load(), truth, tensor)


def test_training_in_fp32_without_zero_keeps_one_copy() -> None:
    checkpoint = opened("zero0-fp32-llama-2ranks")
    assert {weight.master for weight in checkpoint.weights.values()} == {None}
    assert {weight.kind for weight in checkpoint.weights.values()} == {"parameter"}


def test_masters_of_swapped_ranks_are_doubted_and_found_out(tmp_path: Path) -> None:
    """Saved under their own names, as by a run whose ranks were numbered otherwise."""
    directory = damage.copy_of("zero2-bf16-llama-3ranks", tmp_path)
    swapped = damage.optim_files(directory)[:2]
    damage.swap(*swapped)
    for path in swapped:
        damage.as_saved_here(path)
    checkpoint = open_checkpoint(directory)
    assert checkpoint.doubts == ("the recorded slice mappings of group 0 contradict its order",)
    with pytest.raises(DamagedCheckpoint, match="is not its 16-bit weight") as caught:
        check_masters(checkpoint, check_all_masters=False, workers=1)
    assert caught.value.exit_code == 4
    assert "slice mappings" in caught.value.fact
    assert "--weights model" in str(caught.value)


def test_an_older_tag_is_read_when_it_is_asked_for() -> None:
    case = case_of("zero2-bf16-llama-two-saves-2ranks")
    older = open_checkpoint(case.path, tag="global_step2")
    from safetensors.torch import load_file

    masters = load_file(case.directory / "truth-global_step2" / "masters.safetensors")
    assert older.step == 2
    for name, truth in masters.items():
        assert_same(older[name].load(), truth, name)
    assert any(not torch.equal(masters[name], case.masters[name]) for name in masters)


def test_record_headers_are_read_with_their_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later they would be read one after the other, which a store takes long for."""
    shards = open_shards(
        names_in(ZERO / "zero3-bf16-olmo2-chat-2ranks" / "checkpoint" / "global_step120")
    )
    monkeypatch.setattr(torch_file, "data_start", None)
    groups = [group for optim in shards.optims for group in optim.flat_groups]
    assert len(groups) == 2
    assert all(group.byte_offset % 64 == 0 for group in groups)
