"""Damage to the set of shards: what a person is told, for each kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tools import open_checkpoint
from ckpt_tools.conversion.masters import check_masters
from ckpt_tools.errors import CkptError, DamagedCheckpoint, UnsafePickle
from tests.support import damage
from tests.support.readers.contract import Case, assert_same
from tests.support.sampled import sampled

STAGE_1 = "zero1-bf16-llama-2ranks"
STAGE_2 = "zero2-bf16-llama-3ranks"
STAGE_3 = "zero3-bf16-llama-7ranks"
TWO_SAVES = "zero2-bf16-llama-two-saves-2ranks"
MODEL = "mp_rank_00_model_states.pt"
APART = "Keep only the files of one save in this directory, and move the others away."
ELSEWHERE = (
    "If the run saved to node-local storage, they are on the other machines: copy the folder of every "
    "machine here, or pass it with --also DIR."
)
WHOLE = "The 16-bit weights are whole: --weights model takes them."


def refusal(directory: Path) -> CkptError:
    """What a person is told; every refusal names a place under the checkpoint and a next step."""
    with pytest.raises(CkptError) as caught:
        open_checkpoint(directory).catalogue("master")
    error = caught.value
    assert error.path is not None
    assert error.path == directory or error.path.parent == directory
    assert error.hint
    assert error.fact in str(error)
    assert error.hint in str(error)
    return error


def damaged(directory: Path) -> DamagedCheckpoint:
    error = refusal(directory)
    assert type(error) is DamagedCheckpoint
    assert error.exit_code == 4
    return error


# Missing files.


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    directory = damage.copy_of(STAGE_2, tmp_path)
    name = damage.drop_rank(directory, 1)
    error = damaged(directory)
    assert error.fact == "1 of 3 optim_states files are missing: rank 1"
    assert error.missing == (name,)
    assert error.hint == f"{WHOLE} Expected {name}. {ELSEWHERE}"


def test_many_missing_ranks_are_named_as_ranges(tmp_path: Path) -> None:
    directory = damage.copy_of(STAGE_3, tmp_path)
    names = tuple(damage.drop_rank(directory, rank) for rank in (0, 2, 3, 4, 6))
    error = damaged(directory)
    assert error.fact == "5 of 7 optim_states files are missing: ranks 0, 2-4, 6"
    assert error.missing == names
    assert f"Expected {names[0]} and so on." in str(error)


def test_a_missing_model_file_of_stage_3_with_frozen_slices_is_named(tmp_path: Path) -> None:
    directory = damage.copy_of("zero3-bf16-llama-frozen-3ranks", tmp_path)
    name = damage.drop_rank(directory, 1, "model")
    error = damaged(directory)
    assert error.fact == "1 of 3 model_states files are missing: rank 1"
    assert error.missing == (name,)
    assert error.hint == f"Expected {name}. {ELSEWHERE}"


@pytest.mark.parametrize("rank", [0, 5])
def test_a_missing_model_file_of_stage_3_is_remarked_where_nothing_is_frozen(
    rank: int, tmp_path: Path
) -> None:
    directory = damage.copy_of(STAGE_3, tmp_path)
    damage.drop_rank(directory, rank, "model")
    checkpoint = open_checkpoint(directory)
    (remark,) = checkpoint.remarks
    assert remark == (
        f"1 of 7 model files are missing (rank {rank}); no parameter is frozen, so they hold no weights"
    )
    case = Case(damage.ZERO / STAGE_3)
    assert set(checkpoint) == set(case.model)
    for tensor, truth in case.masters.items():
        assert_same(checkpoint[tensor].load(), truth, tensor)


def test_buffers_of_a_missing_first_rank_are_not_taken_from_another(tmp_path: Path) -> None:
    directory = damage.copy_of("zero3-bf16-buffers-5ranks", tmp_path)
    for path in damage.model_files(directory):
        damage.edit(path, lambda content: content.update(frozen_param_shapes=None))
    name = damage.drop_rank(directory, 0, "model")
    assert damaged(directory).missing == (name,)


def test_a_missing_last_rank_is_not_taken_for_a_smaller_run(tmp_path: Path) -> None:
    directory = damage.copy_of(STAGE_3, tmp_path)
    damage.drop_rank(directory, 6)
    damage.drop_rank(directory, 6, "model")
    assert damaged(directory).fact == "1 of 7 optim_states files are missing: rank 6"


def test_the_folder_of_one_machine_says_where_the_others_are(tmp_path: Path) -> None:
    directory = damage.copy_of(STAGE_3, tmp_path)
    for rank in range(4, 7):
        damage.drop_rank(directory, rank)
        damage.drop_rank(directory, rank, "model")
    error = damaged(directory)
    assert error.fact == "3 of 7 optim_states files are missing: ranks 4-6"
    assert ELSEWHERE in str(error)


@pytest.mark.parametrize("fixture", [STAGE_1, STAGE_2])
def test_a_missing_model_file_is_said_to_be_missing(fixture: str, tmp_path: Path) -> None:
    directory = damage.copy_of(fixture, tmp_path)
    (directory / MODEL).unlink()
    error = damaged(directory)
    assert (error.fact, error.hint) == (
        "a DeepSpeed checkpoint with no *_model_states.pt file, which has the names and shapes",
        ELSEWHERE,
    )


@pytest.mark.parametrize(("fixture", "stage"), [(STAGE_1, 1), (STAGE_2, 2), (STAGE_3, 3)])
def test_a_checkpoint_without_any_optimizer_file_says_what_they_hold(
    fixture: str, stage: int, tmp_path: Path
) -> None:
    directory = damage.copy_of(fixture, tmp_path)
    for path in damage.optim_files(directory):
        path.unlink()
    error = damaged(directory)
    held = "weights" if stage == 3 else "masters"
    assert error.fact == (
        f"a ZeRO-{stage} checkpoint without its optimizer files, which hold the {held}"
    )
    assert error.missing == ("zero_pp_rank_*_optim_states.pt",)
    assert error.hint == (ELSEWHERE if stage == 3 else f"{WHOLE} {ELSEWHERE}")


LEFT = ["zero1-bf16-llama-frozen-2ranks", STAGE_2, "zero2-bf16-qwen3-tied-2ranks",
        "zero1-bf16-llama-fp32-grad-accum-frozen-2ranks", "zero2-bf16-buffers-5ranks"]  # fmt: skip


@pytest.mark.parametrize("lost", ["all", "one"])
@pytest.mark.parametrize("fixture", LEFT)
def test_the_16_bit_weights_are_read_without_optimizer_files(
    fixture: str, lost: str, tmp_path: Path
) -> None:
    directory = damage.copy_of(fixture, tmp_path)
    for path in damage.optim_files(directory)[: 1 if lost == "one" else None]:
        path.unlink()
    checkpoint, case = open_checkpoint(directory), Case(damage.ZERO / fixture)
    assert dict(checkpoint.ties) == case.ties
    catalogue = checkpoint.catalogue("model")
    assert set(catalogue) | set(catalogue.ties) == set(case.model)
    for tensor, truth in case.model.items():
        assert_same(catalogue[tensor].load(), truth, tensor)
    kinds = {
        name: weight.kind for name, weight in checkpoint.weights.items() if case.model[name].numel()
    }
    assert {n for n, kind in kinds.items() if kind == "buffer"} == set(case.facts["buffers"])
    assert {n for n, kind in kinds.items() if kind == "frozen"} == set(case.facts["frozen"])
    for ask in (lambda: checkpoint.catalogue(), lambda: checkpoint["model.norm.weight"]):
        if "buffers" not in fixture:
            with pytest.raises(DamagedCheckpoint, match="--weights model takes them"):
                ask()


def test_masters_of_a_run_without_zero_are_lost_with_their_files_too(tmp_path: Path) -> None:
    """`BF16_Optimizer` writes optimizer files at stage 0; the model file shows that there were some."""
    fixture = "old-0.9.5-zero0-bf16-fp32-grad-accum"
    directory = damage.copy_of(fixture, tmp_path)
    for path in damage.optim_files(directory):
        path.unlink()
    error = damaged(directory)
    assert error.fact.startswith("a BF16_Optimizer checkpoint without its optimizer files")
    for tensor, truth in Case(damage.ZERO / fixture).model.items():
        assert_same(open_checkpoint(directory).catalogue("model")[tensor].load(), truth, tensor)


# Broken files.


@pytest.mark.parametrize("kind", ["optim", "model"])
def test_a_truncated_file_is_named(kind: str, tmp_path: Path) -> None:
    directory = damage.copy_of(STAGE_3, tmp_path)
    path = (damage.optim_files if kind == "optim" else damage.model_files)(directory)[3]
    damage.truncate(path, path.stat().st_size * 2 // 3)
    error = damaged(directory)
    assert error.path == path
    assert error.fact.startswith("not a complete torch file")
    assert error.hint is not None
    assert "Copy it anew" in error.hint


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    directory = damage.copy_of(STAGE_2, tmp_path)
    path = damage.optim_files(directory)[2]
    damage.truncate(path, 0)
    error = damaged(directory)
    assert (error.path, error.fact) == (path, "the file is empty")


def test_a_truncated_legacy_file_is_named(tmp_path: Path) -> None:
    directory = damage.copy_of("zero2-bf16-llama-legacy-torch-2ranks", tmp_path)
    path = damage.optim_files(directory)[1]
    damage.truncate(path, path.stat().st_size - 1)
    error = damaged(directory)
    assert error.path == path
    assert error.fact.endswith("is shorter than recorded")


def test_a_flipped_bit_in_the_metadata_is_noticed(tmp_path: Path) -> None:
    directory = damage.copy_of(STAGE_2, tmp_path)
    path = damage.optim_files(directory)[0]
    damage.flip(path, b"single_partition_of_fp32_groups")
    error = damaged(directory)
    assert error.path == path
    assert "CRC" in error.fact


def test_a_page_of_text_under_a_shards_name_is_refused(tmp_path: Path) -> None:
    directory = damage.copy_of(STAGE_2, tmp_path)
    path = damage.optim_files(directory)[0]
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(DamagedCheckpoint) as caught:
        open_checkpoint(directory)
    assert (caught.value.path, caught.value.fact) == (path, "not a file of torch.save")


# Files of another save.


def test_a_model_file_under_an_optimizer_files_name_is_refused(tmp_path: Path) -> None:
    directory = damage.copy_of(STAGE_2, tmp_path)
    path = damage.take_over(directory / MODEL, directory, damage.optim_files(directory)[1].name)
    error = damaged(directory)
    assert error.path == path
    assert error.fact.startswith(f"its content was saved as {MODEL}: ")
    damage.saved_anew(path)
    error = damaged(directory)
    assert (error.path, error.fact) == (path, "not an optimizer file of DeepSpeed")


def test_an_optimizer_file_under_a_model_files_name_is_refused(tmp_path: Path) -> None:
    directory = damage.copy_of(STAGE_2, tmp_path)
    path = damage.take_over(damage.optim_files(directory)[0], directory, MODEL)
    assert damaged(directory).fact.startswith("its content was saved as bf16_zero_pp_rank_0_")
    damage.saved_anew(path)
    assert damaged(directory).fact == "not a model file of DeepSpeed: `module` is missing"


def test_an_optimizer_file_of_another_step_is_named_with_its_step(tmp_path: Path) -> None:
    directory = damage.copy_of(TWO_SAVES, tmp_path)
    older = damage.shards_of(TWO_SAVES, "global_step2")
    path = damage.take_over(damage.optim_files(older)[1], directory)
    error = damaged(directory)
    assert error.fact == (
        "the files belong to different saves: they differ in optimizer step "
        f"(2.0 in {path.name}, 4.0 in the others)"
    )
    assert error.hint == APART


def test_a_model_file_of_another_step_is_doubted_and_found_out(tmp_path: Path) -> None:
    directory = damage.copy_of(TWO_SAVES, tmp_path)
    damage.take_over(damage.shards_of(TWO_SAVES, "global_step2") / MODEL, directory)
    checkpoint = open_checkpoint(directory)
    (doubt,) = checkpoint.doubts
    assert doubt.startswith("the optimizer counts 4 steps, the model file 2 (0 of them skipped)")
    assert doubt in checkpoint.remarks
    with pytest.raises(DamagedCheckpoint, match="is not its 16-bit weight") as caught:
        check_masters(checkpoint, check_all_masters=False, workers=1)
    assert doubt in caught.value.fact
    assert "Files of two saves lie together" in str(caught.value)


def test_steps_that_were_skipped_are_no_steps_of_the_optimizer(tmp_path: Path) -> None:
    """A loss scale that was too large: the engine counts the step, the optimizer does not take it."""
    directory = damage.copy_of("zero2-fp16-llama-2ranks", tmp_path)
    facts = open_checkpoint(directory)
    assert (facts.step, facts.details["skipped_steps"], facts.doubts) == (2, 0, ())

    damage.edit(
        damage.model_files(directory)[0],
        lambda content: content.update(global_steps=6, skipped_steps=4),
    )

    skipped = open_checkpoint(directory)
    assert (skipped.doubts, skipped.remarks) == ((), ())


def test_a_counter_of_a_group_that_is_never_advanced_is_no_step(tmp_path: Path) -> None:
    """Muon's group for Adam has ``step`` 0 for ever."""
    directory = damage.copy_of("zero2-bf16-llama-sgd-2ranks", tmp_path)
    for path in damage.optim_files(directory):
        damage.edit(
            path,
            lambda content: content["optimizer_state_dict"]["base_optimizer_state"]["param_groups"][
                0
            ].update(step=0),
        )
    checkpoint = open_checkpoint(directory)
    assert (checkpoint.doubts, checkpoint.remarks) == ((), ())


@pytest.mark.parametrize(("steps", "skipped"), [(500, 3), (1, 0)])
def test_model_files_of_another_step_are_remarked_under_stage_3(
    steps: int, skipped: int, tmp_path: Path
) -> None:
    directory = damage.copy_of(STAGE_3, tmp_path)
    counts = {"global_steps": steps, "skipped_steps": skipped}
    for path in damage.model_files(directory):
        damage.edit(path, lambda content: content.update(counts))
    (remark,) = open_checkpoint(directory).remarks
    told = f"the optimizer counts 2 steps, the model file {steps} ({skipped} of them skipped)"
    assert remark.startswith(told)


def test_a_model_file_of_another_step_is_found_out_under_stage_3(tmp_path: Path) -> None:
    directory = damage.copy_of(STAGE_3, tmp_path)
    path = damage.model_files(directory)[2]
    damage.edit(path, lambda content: content.update(global_steps=1))
    error = damaged(directory)
    assert error.fact == (
        f"the files belong to different saves: they differ in step (1 in {path.name}, 2 in the others)"
    )
    assert error.hint == APART


def test_files_of_a_larger_world_in_the_directory_are_found_out(tmp_path: Path) -> None:
    directory = damage.copy_of(STAGE_2, tmp_path)
    for path in damage.optim_files(damage.shards_of("zero2-bf16-buffers-5ranks"))[3:]:
        damage.take_over(path, directory)
    error = damaged(directory)
    assert error.fact.startswith("the files belong to different saves: they differ in world size")
    assert error.hint == APART


def test_a_rank_of_a_smaller_world_is_found_out(tmp_path: Path) -> None:
    directory = damage.copy_of(STAGE_2, tmp_path)
    source = damage.optim_files(damage.shards_of("zero2-bf16-llama-cpu-offload-2ranks"))[1]
    path = damage.take_over(source, directory)
    error = damaged(directory)
    assert error.fact.startswith("the files belong to different saves: they differ in world size")
    assert path.name in error.fact


def test_a_surplus_model_file_of_stage_3_is_named(tmp_path: Path) -> None:
    directory = damage.copy_of(STAGE_3, tmp_path)
    last = damage.model_files(directory)[-1]
    surplus = last.name.replace("rank_6_", "rank_7_")
    damage.take_over(last, directory, surplus)
    damage.as_saved_here(directory / surplus)
    error = damaged(directory)
    assert error.fact == "there are model_states files of rank 7, but the save had 7 ranks"


def test_a_surplus_rank_is_named(tmp_path: Path) -> None:
    directory = damage.copy_of(STAGE_2, tmp_path)
    last = damage.optim_files(directory)[2]
    surplus = last.name.replace("rank_2_", "rank_3_")
    damage.take_over(last, directory, surplus)
    damage.as_saved_here(directory / surplus)
    error = damaged(directory)
    assert error.fact == "there are optim_states files of rank 3, but the save had 3 ranks"
    assert error.path == directory / surplus
    assert error.hint == f"The files of ranks 0 to 2 belong together. Move these away: {surplus}."


@pytest.mark.parametrize("rank", [0, 2, 3])
def test_a_partition_of_another_length_is_named_with_those_that_belong_together(
    rank: int, tmp_path: Path
) -> None:
    directory = damage.copy_of("zero2-bf16-buffers-5ranks", tmp_path)
    paths = damage.optim_files(directory)

    def lengthen(held: damage.Content) -> None:
        groups = held["optimizer_state_dict"]["single_partition_of_fp32_groups"]
        groups[0] = torch.cat([groups[0], torch.zeros(64)])

    damage.edit(paths[rank], lengthen)
    error = damaged(directory)

    assert error.path == paths[rank]
    assert "These files belong together" in str(error.hint)
    assert paths[rank].name not in str(error.hint)
    assert all(path.name in str(error.hint) for path in paths if path != paths[rank])


def test_optimizer_files_of_another_world_beside_the_model_file_are_found_out(
    tmp_path: Path,
) -> None:
    directory = damage.copy_of(STAGE_2, tmp_path)
    other = damage.shards_of("zero2-bf16-llama-cpu-offload-2ranks")
    for path in damage.optim_files(directory):
        path.unlink()
    for path in damage.optim_files(other):
        damage.take_over(path, directory)
    error = damaged(directory)
    assert error.fact == f"{MODEL} states 3 ranks, the optimizer files state 2"
    assert error.hint == APART


def test_a_file_of_another_stage_is_found_out(tmp_path: Path) -> None:
    directory = damage.copy_of(TWO_SAVES, tmp_path)
    damage.take_over(damage.optim_files(damage.shards_of(STAGE_1))[1], directory)
    assert "they differ in ZeRO stage" in damaged(directory).fact


@pytest.mark.parametrize("fixture", [STAGE_2, STAGE_3, "zero3-fp16-llama-2ranks"])
def test_twins_with_and_without_a_prefix_are_files_of_two_saves(
    fixture: str, tmp_path: Path
) -> None:
    directory = damage.copy_of(fixture, tmp_path)
    path = damage.optim_files(directory)[1]
    other = damage.twin(path)
    error = damaged(directory)
    assert error.fact.startswith("one directory has files of two saves: ")
    assert path.name in error.fact
    assert other.name in error.fact
    assert error.fact.endswith("are both of rank 1")
    assert error.hint == APART


def test_model_files_of_two_stages_are_files_of_two_saves(tmp_path: Path) -> None:
    directory = damage.copy_of(STAGE_2, tmp_path)
    damage.take_over(damage.model_files(damage.shards_of(STAGE_3))[0], directory)
    assert damaged(directory).fact.startswith("one directory has files of two saves: ")


def test_a_model_file_of_stage_3_beside_optimizer_files_of_stage_2_is_found_out(
    tmp_path: Path,
) -> None:
    directory = damage.copy_of(STAGE_2, tmp_path)
    source = damage.model_files(damage.shards_of(STAGE_3))[1]
    damage.take_over(source, directory)
    error = damaged(directory)
    assert error.fact == "the model files are of ZeRO-3, the optimizer files of stage 2"


def test_the_same_training_with_another_optimizer_is_another_save(tmp_path: Path) -> None:
    directory = damage.copy_of(TWO_SAVES, tmp_path, "global_step2")
    source = damage.optim_files(damage.shards_of("zero2-bf16-llama-sgd-2ranks"))[1]
    damage.take_over(source, directory)
    assert damaged(directory).fact.startswith(
        "the files belong to different saves: they differ in "
    )


def test_a_model_file_of_another_model_does_not_fit_the_partitions(tmp_path: Path) -> None:
    directory = damage.copy_of("zero2-bf16-gpt2-2ranks", tmp_path)
    damage.take_over(damage.shards_of("zero2-bf16-qwen3-tied-2ranks") / MODEL, directory)
    error = damaged(directory)
    assert error.hint is not None
    assert "different saves" in error.hint


EDITS: dict[str, tuple[Callable[[damage.Content], Any], str]] = {
    "dp_world_size": (lambda c: c.update(dp_world_size=8), "world size (8 in"),
    "ds_version": (lambda c: c.update(ds_version="0.9.5"), "DeepSpeed version ('0.9.5' in"),
    "global_samples": (lambda c: c.update(global_samples=7), "number of samples (7 in"),
    "skipped_steps": (lambda c: c.update(skipped_steps=1), "number of skipped steps (1 in"),
    "ds_config": (
        lambda c: c["ds_config"].update(gradient_accumulation_steps=64),
        "training settings (ds_config) (",
    ),
}


@pytest.mark.parametrize("key", EDITS)
def test_what_every_model_file_states_is_compared(key: str, tmp_path: Path) -> None:
    change, told = EDITS[key]
    directory = damage.copy_of(STAGE_3, tmp_path)
    path = damage.model_files(directory)[4]
    damage.edit(path, change)
    error = damaged(directory)
    assert error.fact.startswith(f"the files belong to different saves: they differ in {told}")
    assert path.name in error.fact
    assert error.hint == APART


OPTIM_EDITS: dict[str, tuple[Callable[[damage.Content], Any], str]] = {
    "version": (lambda c: c.update(ds_version="0.9.5"), "DeepSpeed version"),
    "settings": (
        lambda c: c["ds_config"].update(train_batch_size=12345),
        "training settings (ds_config)",
    ),
    "hyperparameters": (
        lambda c: c["optimizer_state_dict"]["base_optimizer_state"]["param_groups"][0].update(
            lr=7.0
        ),
        "optimizer settings",
    ),
    "groups": (
        lambda c: c["optimizer_state_dict"]["single_partition_of_fp32_groups"].append(
            c["optimizer_state_dict"]["single_partition_of_fp32_groups"][0]
        ),
        "number of flat groups",
    ),
}


@pytest.mark.parametrize("key", OPTIM_EDITS)
def test_what_every_optimizer_file_states_is_compared(key: str, tmp_path: Path) -> None:
    change, told = OPTIM_EDITS[key]
    directory = damage.copy_of(STAGE_2, tmp_path)
    path = damage.optim_files(directory)[1]
    damage.edit(path, change)
    error = damaged(directory)
    assert error.fact.startswith(f"the files belong to different saves: they differ in {told}")
    assert path.name in error.fact


def test_saving_again_without_a_change_is_no_damage(tmp_path: Path) -> None:
    """That the edits above, not the saving, are what was found out."""
    directory = damage.copy_of(STAGE_2, tmp_path)
    for path in directory.iterdir():
        damage.edit(path, lambda content: None)
    checkpoint = open_checkpoint(directory)
    for name, truth in Case(damage.ZERO / STAGE_2).masters.items():
        assert_same(checkpoint[name].load(), truth, name)


# Files of other layouts.


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("layer_3_expert_0_mp_rank_00_model_states.pt", "not a file of an expert: "),
        ("expert_0_mp_rank_00_model_states.pt", "not a file of an expert: "),
        ("layer_00-model_00-model_states.pt", "files of a pipeline's layers, such as "),
        ("layer_00-model_states.pt", "files of a pipeline's layers, such as "),
        ("mp_rank_01_model_states.pt", "there are files of the model-parallel ranks [0, 1], "),
        (
            "zero_pp_rank_0_mp_rank_01_optim_states.pt",
            "there are files of the model-parallel ranks [0, 1]",
        ),
    ],
)
def test_files_of_another_layout_are_files_of_two_saves(
    name: str, fact: str, tmp_path: Path
) -> None:
    directory = damage.copy_of(STAGE_2, tmp_path)
    damage.saved_anew(damage.take_over(directory / MODEL, directory, name))
    error = damaged(directory)
    assert error.fact.startswith(fact)
    assert error.hint == APART


def test_a_pipeline_without_its_layers_is_said_to_be_one(tmp_path: Path) -> None:
    directory = damage.copy_of(STAGE_2, tmp_path)
    damage.edit(directory / MODEL, lambda content: content.update(module=None))
    error = damaged(directory)
    assert error.fact == "a pipeline without the files of its layers: its `module` is None"
    assert error.hint == ELSEWHERE


def test_masters_that_were_swapped_out_are_said_to_be_elsewhere(tmp_path: Path) -> None:
    directory = damage.copy_of(STAGE_3, tmp_path)
    path = damage.optim_files(directory)[0]
    damage.edit(path, lambda c: c["optimizer_state_dict"].pop("fp32_flat_groups"))
    error = damaged(directory)
    assert error.fact == "its fp32 groups are missing or are not tensors"
    assert "NVMe" in str(error)


@pytest.mark.parametrize("stage", [4, -1, "2", 1.5, [2]])
def test_a_stage_that_there_is_not_is_refused(stage: Any, tmp_path: Path) -> None:
    directory = damage.copy_of(STAGE_2, tmp_path)
    path = damage.optim_files(directory)[0]
    damage.edit(path, lambda c: c["optimizer_state_dict"].update(zero_stage=stage))
    with pytest.raises(DamagedCheckpoint, match=r"its zero_stage is .*, which is not a ZeRO stage"):
        open_checkpoint(directory)


# Values that no DeepSpeed writes, at every key that is looked at.

ODD: tuple[Any, ...] = (
    None,
    -7,
    10**30,
    0.5,
    "text",
    b"\x00",
    [],
    [None],
    ["a", 1],
    {},
    {1: 2},
    {"a": "b"},
)
SHARED_KEYS = ("global_steps", "dp_world_size", "ds_version", "skipped_steps", "global_samples")
MODEL_KEYS = (
    "module", "buffer_names", "param_shapes", "frozen_param_shapes", "frozen_param_fragments",
    "shared_params", "ds_config", "optimizer", *SHARED_KEYS,
)  # fmt: skip
OPTIM_KEYS = (
    "fp32_flat_groups", "single_partition_of_fp32_groups", "zero_stage", "partition_count",
    "group_paddings", "param_alignment_paddings", "param_slice_mappings", "base_optimizer_state",
    "optimizer_state_dict", "ds_version", "base_optimizer_state_step",
)  # fmt: skip


def is_refused_or_read_rightly(fixture: str, directory: Path) -> None:
    """No traceback, and whatever is still read is the truth."""
    case = Case(damage.ZERO / fixture)
    try:
        catalogue = open_checkpoint(directory).catalogue()
    except CkptError:
        return
    for name in catalogue:
        assert_same(catalogue[name].load(), case.masters.get(name, case.model[name]), name)


@pytest.mark.parametrize("key", sampled(MODEL_KEYS))
@pytest.mark.parametrize(
    "fixture", ["zero2-bf16-llama-frozen-2ranks", "zero3-bf16-qwen3-tied-frozen-2ranks"]
)
def test_an_odd_value_in_a_model_file_is_refused_or_does_no_harm(
    fixture: str, key: str, tmp_path: Path
) -> None:
    for number, value in enumerate(ODD):
        directory = damage.copy_of(fixture, tmp_path / str(number))
        damage.edit(damage.model_files(directory)[0], lambda c, v=value: c.update({key: v}))
        is_refused_or_read_rightly(fixture, directory)


@pytest.mark.parametrize("key", sampled(OPTIM_KEYS))
@pytest.mark.parametrize(
    "fixture", ["zero2-bf16-llama-frozen-2ranks", "zero3-bf16-qwen3-tied-frozen-2ranks"]
)
def test_an_odd_value_in_an_optimizer_file_is_refused_or_does_no_harm(
    fixture: str, key: str, tmp_path: Path
) -> None:
    for number, value in enumerate(ODD):
        directory = damage.copy_of(fixture, tmp_path / str(number))
        path = damage.optim_files(directory)[1]
        damage.edit(path, lambda c, v=value: c["optimizer_state_dict"].update({key: v}))
        is_refused_or_read_rightly(fixture, directory)


def test_metadata_that_does_not_fit_the_format_is_told_as_damage(tmp_path: Path) -> None:
    directory = damage.copy_of(STAGE_2, tmp_path)
    damage.edit(directory / MODEL, lambda c: c.update(param_shapes=[{"lm_head.weight": 7}]))
    error = damaged(directory)
    assert error.path == directory
    assert error.fact.startswith("its metadata does not have the form of deepspeed (TypeError: ")


def test_a_weight_built_by_code_is_told_as_unsafe(tmp_path: Path) -> None:
    directory = damage.copy_of(STAGE_2, tmp_path)
    damage.edit(directory / MODEL, lambda c: c["module"].update(odd=Path("x")))
    error = refusal(directory)
    assert isinstance(error, UnsafePickle)
    assert error.exit_code == 4
