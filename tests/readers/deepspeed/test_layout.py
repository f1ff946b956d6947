"""The arithmetic of ZeRO layouts: metadata that does not add up is refused, tensor by tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tools import open_checkpoint
from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.readers.deepspeed.layout import group_shapes
from tests.support import damage

STAGE_2 = "zero2-bf16-llama-3ranks"
STAGE_3 = "zero3-bf16-llama-7ranks"


def test_param_shapes_are_groups_or_one_mapping() -> None:
    shapes = {"w": torch.Size([2, 3])}
    assert group_shapes([shapes, {}], Path("f")) == [{"w": (2, 3)}, {}]
    assert group_shapes(shapes, Path("f")) == [{"w": (2, 3)}]


@pytest.mark.parametrize("shapes", [None, 7, "text", [None], [["w"]]])
def test_param_shapes_of_another_kind_are_refused(shapes: Any) -> None:
    with pytest.raises(DamagedCheckpoint, match="param_shapes are missing or malformed"):
        group_shapes(shapes, Path("f"))


# Real files whose numbers were changed.


def first_group(content: damage.Content) -> Any:
    return content["param_shapes"][0]


def grow(content: damage.Content, rows: int) -> None:
    """Let the last parameter and its weight have more rows, or fewer, than the optimizer kept."""
    group = first_group(content)
    name = next(reversed(group))
    shape = (group[name][0] + rows, *group[name][1:])
    group[name] = torch.Size(shape)
    if content["module"][name].numel():
        content["module"][name] = torch.zeros(shape, dtype=torch.bfloat16)


def refusal(
    fixture: str, tmp_path: Path, change: Callable[[damage.Content], Any], rank: int = -1
) -> Any:
    """What is said after a change to rank 0's model file, or to a rank's optimizer file."""
    directory = damage.copy_of(fixture, tmp_path)
    files = damage.model_files(directory)[:1] if rank < 0 else [damage.optim_files(directory)[rank]]
    damage.edit(files[0], change)
    with pytest.raises(DamagedCheckpoint) as caught:
        open_checkpoint(directory)
    assert caught.value.exit_code == 4
    return caught.value


def test_a_parameter_beyond_the_partitions_is_named(tmp_path: Path) -> None:
    error = refusal(STAGE_2, tmp_path, lambda c: grow(c, 1))
    assert error.fact.startswith("it ends at element ")
    assert error.tensor == "lm_head.weight"
    assert error.hint == "The file of a rank belongs to another save, or is truncated."


def test_partitions_that_hold_more_than_the_parameters_are_refused(tmp_path: Path) -> None:
    error = refusal(STAGE_2, tmp_path, lambda c: grow(c, -1))
    assert "elements more than the parameters need" in error.fact


@pytest.mark.parametrize(("surplus", "accepted"), [(5, True), (6, False)])
def test_as_much_as_alignment_explains_may_be_left_of_the_partitions(
    tmp_path: Path, surplus: int, accepted: bool
) -> None:
    """DeepSpeed fills up to a multiple of twice the ranks: of three ranks at most five elements."""

    def shorten(content: damage.Content) -> None:
        group = first_group(content)
        name = next(reversed(group))
        shape = (group[name].numel() - surplus,)
        group[name] = torch.Size(shape)
        content["module"][name] = torch.zeros(shape, dtype=torch.bfloat16)

    if accepted:
        directory = damage.copy_of(STAGE_2, tmp_path)
        damage.edit(damage.model_files(directory)[0], shorten)
        assert open_checkpoint(directory)["lm_head.weight"].pieces
    else:
        error = refusal(STAGE_2, tmp_path, shorten)
        assert f"hold {surplus} elements more than the parameters need" in error.fact


@pytest.mark.parametrize("key", ["start", "numel"])
def test_a_recorded_fragment_that_is_not_where_the_order_puts_it_is_doubted(
    tmp_path: Path, key: str
) -> None:
    def move(content: damage.Content) -> None:
        mappings = content["optimizer_state_dict"]["param_slice_mappings"][0]
        address = mappings["model.norm.weight"]
        setattr(address, key, getattr(address, key) + 1)

    directory = damage.copy_of(STAGE_2, tmp_path)
    for path in damage.optim_files(directory):
        with contextlib.suppress(KeyError):
            damage.edit(path, move)

    assert open_checkpoint(directory).doubts == (
        "the recorded slice mappings of group 0 contradict its order",
    )


def test_a_partition_cut_short_is_refused(tmp_path: Path) -> None:
    def cut(content: damage.Content) -> None:
        groups = content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
        groups[0] = groups[0][:-1].clone()

    error = refusal(STAGE_2, tmp_path, cut, rank=0)
    assert error.fact.startswith("it ends at element ")


def test_a_sub_group_that_ends_before_a_parameter_names_it(tmp_path: Path) -> None:
    error = refusal(STAGE_3, tmp_path, lambda c: grow(c, 1))
    assert error.fact == "sub-group 0 ends before it"
    assert error.tensor == "lm_head.weight"


def test_sub_groups_that_hold_more_than_the_parameters_are_refused(tmp_path: Path) -> None:
    error = refusal(STAGE_3, tmp_path, lambda c: first_group(c).popitem())
    assert "elements a rank more than the parameters need" in error.fact
    assert error.hint == "The model files and the optimizer files belong to different saves."


def test_a_rank_with_a_sub_group_of_another_length_is_named(tmp_path: Path) -> None:
    def cut(content: damage.Content) -> None:
        groups = content["optimizer_state_dict"]["fp32_flat_groups"]
        groups[0] = groups[0][:-1].clone()

    error = refusal(STAGE_3, tmp_path, cut, rank=3)
    assert "its sub-groups have [" in error.fact
    assert error.path.name == "bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt"


def test_ranks_with_masters_of_different_dtypes_are_refused(tmp_path: Path) -> None:
    def halve(content: damage.Content) -> None:
        groups = content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
        groups[0] = groups[0].to(torch.bfloat16)

    assert refusal(STAGE_2, tmp_path, halve, rank=1).fact == "the ranks' partitions differ in dtype"


def test_a_rank_with_sub_groups_of_another_dtype_is_refused(tmp_path: Path) -> None:
    def halve(content: damage.Content) -> None:
        groups = content["optimizer_state_dict"]["fp32_flat_groups"]
        groups[0] = groups[0].to(torch.bfloat16)

    error = refusal(STAGE_3, tmp_path, halve, rank=1)
    assert error.fact == "the dtypes of its sub-groups differ from those of rank 0"


def test_a_shape_that_is_not_that_of_the_weight_is_refused(tmp_path: Path) -> None:
    def turn(content: damage.Content) -> None:
        group = first_group(content)
        group["lm_head.weight"] = torch.Size(reversed(group["lm_head.weight"]))

    error = refusal(STAGE_2, tmp_path, turn)
    assert error.tensor == "lm_head.weight"
    assert "in `module` and" in error.fact


def test_more_groups_of_parameters_than_of_masters_are_refused(tmp_path: Path) -> None:
    error = refusal(STAGE_2, tmp_path, lambda c: c["param_shapes"].append({"x": torch.Size([1])}))
    assert error.fact == "1 flat groups for 2 groups of parameters"


def test_alignment_paddings_of_another_number_are_refused(tmp_path: Path) -> None:
    error = refusal(
        "zero2-bf16-llama-aligned-3ranks",
        tmp_path,
        lambda c: c["optimizer_state_dict"]["param_alignment_paddings"][0].pop(),
        rank=0,
    )
    assert "alignment paddings for " in error.fact


def test_a_frozen_slice_that_a_rank_lacks_is_named(tmp_path: Path) -> None:
    directory = damage.copy_of("zero3-bf16-llama-frozen-3ranks", tmp_path)
    path = damage.model_files(directory)[2]
    damage.edit(path, lambda c: c["frozen_param_fragments"].pop("model.embed_tokens.weight"))
    with pytest.raises(DamagedCheckpoint, match="its frozen slice is missing") as caught:
        open_checkpoint(directory)
    assert (caught.value.path, caught.value.tensor) == (path, "model.embed_tokens.weight")


def test_frozen_slices_that_do_not_fill_the_tensor_are_refused(tmp_path: Path) -> None:
    directory = damage.copy_of("zero3-bf16-llama-frozen-3ranks", tmp_path)

    def cut(content: damage.Content) -> None:
        fragments = content["frozen_param_fragments"]
        name = "model.embed_tokens.weight"
        fragments[name] = fragments[name][:-40].clone()

    damage.edit(damage.model_files(directory)[1], cut)
    with pytest.raises(DamagedCheckpoint):
        open_checkpoint(directory)


@pytest.mark.parametrize("stage", [2, 3])
def test_tied_parameters_that_were_left_out_together_are_both_absent(
    stage: int, tmp_path: Path
) -> None:
    """A LoRA run on a tied model, saved without its frozen parameters: the tie is recorded all the same."""

    if stage == 3:
        directory = damage.copy_of("zero3-bf16-qwen3-tied-frozen-2ranks", tmp_path)
    else:
        directory = damage.copy_of("zero2-bf16-llama-frozen-2ranks", tmp_path)
        damage.edit(
            damage.model_files(directory)[0],
            lambda c: c.update(shared_params={"alias": "model.embed_tokens.weight"}),
        )
    for path in damage.model_files(directory):
        damage.edit(path, leave_out_frozen)
    checkpoint = open_checkpoint(directory)
    alias = "lm_head.weight" if stage == 3 else "alias"
    assert {alias, "model.embed_tokens.weight"}.isdisjoint(checkpoint)
    assert dict(checkpoint.catalogue().ties) == {}
    assert checkpoint.remarks == (f"second names of parameters that were not saved: {alias}",)


def leave_out_frozen(content: damage.Content) -> None:
    for name in (*content["frozen_param_shapes"], "lm_head.weight"):
        if name not in content["param_shapes"][0]:
            content["module"].pop(name, None)
    content["frozen_param_shapes"] = content["frozen_param_fragments"] = None


def test_a_master_whose_weight_is_not_in_the_module_is_refused(tmp_path: Path) -> None:
    for fixture in (STAGE_2, STAGE_3):
        error = refusal(fixture, tmp_path, lambda c: c["module"].pop("model.norm.weight"))
        assert (error.fact, error.tensor) == (
            "it has a master, but is missing in `module`",
            "model.norm.weight",
        )
