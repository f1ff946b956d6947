"""DeepSpeed's function under its own name: the same answer where it has one, the truth where it has not."""

from __future__ import annotations

import inspect
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tools import get_fp32_state_dict_from_zero_checkpoint as ours
from ckpt_tools.errors import CkptError, NotACheckpoint, UsageError
from tests.test_end_to_end import CASES, Case, cast, different, every

# Read when deepspeed is imported, which otherwise looks for a GPU.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

CURRENT = [case for case in CASES if case.facts["deepspeed_version"] == "0.19.8"]
STAGE_0 = [case for case in CURRENT if case.facts["stage"] == 0]
BF16_OPTIMIZER = [case for case in CURRENT if case.facts["optimizer_wrapper"] == "BF16_Optimizer"]
# Frozen parameters of ZeRO-1 are in `module` alone, where DeepSpeed's function does not look.
FROZEN_1 = [
    case
    for case in CURRENT
    if case.facts["stage"] == 1
    and case.facts["frozen"]
    and not case.facts["frozen_excluded"]
    and case not in BF16_OPTIMIZER
]
# Files without a zip, and a class of the training script in the pickle.
UNLOADABLE = [case for case in CURRENT if "legacy" in case.path.name or "object" in case.path.name]
WORKING = [
    case for case in CURRENT if case not in (*STAGE_0, *BF16_OPTIMIZER, *FROZEN_1, *UNLOADABLE)
]


@pytest.fixture(scope="module")
def theirs() -> Callable[..., Any]:
    zero_to_fp32 = pytest.importorskip("deepspeed.utils.zero_to_fp32")
    function = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint
    assert callable(function)
    return function


def widened(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """DeepSpeed leaves frozen parameters and 16-bit masters in 16 bits, in an "fp32" state dict."""
    return cast(state, torch.float32)


def truth(case: Case) -> dict[str, torch.Tensor]:
    """Every name as fp32, second names included where the files tell them."""
    state = case.held(case.model() | case.masters())
    ties = case.facts["tied"]
    if case.facts["stage"] == 3 and "no record of tied names" in case.facts["note"]:
        return widened({name: tensor for name, tensor in state.items() if name not in ties})
    return widened(state | {alias: state[kept] for alias, kept in ties.items()})


def test_the_signature_is_deepspeeds(theirs: Callable[..., Any]) -> None:
    def plain(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.default, p.kind) for p in parameters]

    assert plain(ours) == plain(theirs)


@every(WORKING)
def test_where_deepspeeds_works_ours_says_the_same(case: Case, theirs: Callable[..., Any]) -> None:
    expected = theirs(str(case.checkpoint))

    found = ours(str(case.checkpoint))

    assert isinstance(found, OrderedDict)
    assert different(found, truth(case)) == []
    # It takes tensors without elements for one another, with each other's shape.
    unlike = different(found, widened(expected))
    assert [name for name in unlike if found[name].numel()] == []


@every([case for case in WORKING if case.facts["frozen"] and not case.facts["frozen_excluded"]])
def test_frozen_parameters_can_be_left_out(case: Case, theirs: Callable[..., Any]) -> None:
    expected = theirs(str(case.checkpoint), exclude_frozen_parameters=True)

    found = ours(str(case.checkpoint), exclude_frozen_parameters=True)

    assert different(found, widened(expected)) == []
    assert not found.keys() & set(case.facts["frozen"])
    assert found.keys() < ours(str(case.checkpoint)).keys()


@every([case for case in WORKING if case.facts["tied"]])
def test_tied_names_are_one_tensor(case: Case, theirs: Callable[..., Any]) -> None:
    for state in (theirs(str(case.checkpoint)), ours(case.checkpoint)):
        for alias, kept in case.facts["tied"].items():
            assert state[alias].data_ptr() == state[kept].data_ptr()
    assert len(ours(case.checkpoint, exclude_frozen_parameters=False)) == len(case.model())


@every(WORKING[::7])
def test_lazy_mode_reads_when_it_is_told_to(case: Case, theirs: Callable[..., Any]) -> None:
    expected = theirs(str(case.checkpoint), lazy_mode=True)

    found = ours(case.checkpoint, lazy_mode=True)

    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert not isinstance(tensor, torch.Tensor)
        assert tuple(tensor.shape) == tuple(expected[name].shape)
        assert tensor.dtype == torch.float32
    read = {name: tensor.contiguous() for name, tensor in found.items()}
    assert different(read, widened({n: t.contiguous() for n, t in expected.items()})) == []


def test_a_tag_chooses_the_save(theirs: Callable[..., Any]) -> None:
    (case,) = [case for case in CURRENT if len(case.facts["tags"]) > 1]
    newest = ours(case.checkpoint)
    for tag in case.facts["tags"]:
        expected = theirs(str(case.checkpoint), tag=tag)
        assert different(ours(case.checkpoint, tag), expected) == []
        assert different(ours(case.checkpoint / tag), expected) == []
        assert (different(newest, expected) == []) == (tag == case.facts["tags"][-1])


@every(STAGE_0)
def test_stage_0_works_here_and_not_there(case: Case, theirs: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="'NoneType' object is not iterable"):
        theirs(str(case.checkpoint))

    assert different(ours(case.checkpoint), truth(case)) == []


@every(BF16_OPTIMIZER)
def test_bf16_optimizer_works_here_and_not_there(case: Case, theirs: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="is not a zero checkpoint"):
        theirs(str(case.checkpoint))

    assert different(ours(case.checkpoint), truth(case)) == []


@every(FROZEN_1)
def test_frozen_parameters_of_zero_1_are_here_and_not_there(
    case: Case, theirs: Callable[..., Any]
) -> None:
    lost = set(case.model()) - set(theirs(str(case.checkpoint)))

    assert lost == set(case.facts["frozen"])
    assert different(ours(case.checkpoint), truth(case)) == []


@every(UNLOADABLE)
def test_what_deepspeed_cannot_load_is_read(case: Case, theirs: Callable[..., Any]) -> None:
    with pytest.raises((RuntimeError, AttributeError), match=r"mmap can only|Can't get attribute"):
        theirs(str(case.checkpoint))

    assert different(ours(case.checkpoint), truth(case)) == []


@every([case for case in CASES if case not in CURRENT])
def test_old_checkpoints_are_read(case: Case) -> None:
    assert different(ours(case.checkpoint), truth(case)) == []


def test_failures_are_our_errors(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint):
        ours(tmp_path)
    with pytest.raises(UsageError, match="no checkpoint with the tag"):
        ours(WORKING[0].checkpoint, tag="global_step999")
    assert issubclass(NotACheckpoint, CkptError)
