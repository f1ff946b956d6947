"""Wrapper segments go, and children that only bear a wrapper's name stay."""

from __future__ import annotations

import pytest
import torch

from ckpt_tools.transforms.prefixes import strip_wrappers
from tests.support.readers.contract import FIXTURES, Case


def stripped(*names: str) -> list[str]:
    result = strip_wrappers(names)
    return [result.names[name] for name in names]


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(2, 3)
        self.rest = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))


NAMES = list(Net().state_dict())


@pytest.mark.parametrize(
    "wrap",
    [
        torch.nn.DataParallel,
        torch.compile,
        lambda net: torch.compile(torch.nn.DataParallel(net)),
        lambda net: torch.nn.DataParallel(torch.compile(net)),
        lambda net: torch.nn.DataParallel(torch.nn.DataParallel(net)),
    ],
    ids=["DataParallel", "compile", "compile of DataParallel", "DataParallel of compile",
         "DataParallel twice"],
)  # fmt: skip
def test_what_torch_wraps_around_a_model_is_taken_off(wrap: object) -> None:
    names = list(wrap(Net()).state_dict())  # type: ignore[operator]
    assert names != NAMES
    assert stripped(*names) == NAMES


def test_a_compiled_child_is_unwrapped_where_it_is() -> None:
    net = Net()
    net.rest = torch.compile(net.rest)  # type: ignore[assignment]
    names = list(net.state_dict())
    assert "rest._orig_mod.0.weight" in names
    result = strip_wrappers(names)
    assert list(result.names.values()) == NAMES
    assert result.removed == {"rest._orig_mod.": len(NAMES) - 2}


def test_activation_checkpointing_is_taken_off() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

    net = Net()
    net.first = CheckpointWrapper(net.first)  # type: ignore[assignment]
    raw = [name for name, _ in torch.nn.Module.named_parameters(net)]
    assert any("_checkpoint_wrapped_module" in name for name in raw)
    assert "first.weight" in stripped(*raw)


def test_fsdp_segments_are_taken_off_at_any_depth() -> None:
    assert stripped(
        "_fsdp_wrapped_module.a._fsdp_wrapped_module.w", "_fsdp_wrapped_module.b.w"
    ) == ["a.w", "b.w"]


def test_what_was_taken_off_is_told_with_its_count() -> None:
    result = strip_wrappers(["module._orig_mod.a", "module._orig_mod.b"])
    assert result.removed == {"module.": 2, "_orig_mod.": 2}
    assert result.names == {"module._orig_mod.a": "a", "module._orig_mod.b": "b"}


def test_names_without_wrappers_are_left_alone() -> None:
    result = strip_wrappers(NAMES)
    assert (list(result.names.values()), result.removed) == (NAMES, {})


def test_a_child_called_module_beside_others_is_real() -> None:
    assert stripped("module.weight", "head.weight") == ["module.weight", "head.weight"]


def test_a_child_called_orig_mod_beside_others_is_real() -> None:
    names = ("a._orig_mod.weight", "a.other.weight")
    assert stripped(*names) == list(names)


def test_a_child_called_module_further_in_is_real() -> None:
    names = ("model.module.weight", "model.module.bias")
    assert stripped(*names) == list(names)


def test_a_word_that_only_begins_like_a_wrapper_is_real() -> None:
    names = ("module_list.0.weight", "_orig_module.weight", "modules.w")
    assert stripped(*names) == list(names)


@pytest.mark.parametrize("name", ["module", "_orig_mod", "a._orig_mod"])
def test_a_parameter_with_a_wrappers_name_is_real(name: str) -> None:
    assert stripped(name) == [name]


@pytest.mark.parametrize("names", [("x._orig_mod.w", "x.w"), ("module.a", "a")])
def test_two_names_never_become_one(names: tuple[str, str]) -> None:
    assert stripped(*names) == list(names)


def test_no_names_are_no_trouble() -> None:
    assert strip_wrappers([]).names == {}


# Real checkpoints.


@pytest.mark.parametrize(
    ("name", "removed"),
    [
        ("zero2-bf16-llama-compiled-2ranks", "_orig_mod."),
        ("zero3-bf16-llama-under-module-2ranks", "module."),
    ],
)
def test_a_wrapped_checkpoint_gets_the_names_of_a_plain_one(name: str, removed: str) -> None:
    wrapped, plain = (
        Case(FIXTURES / "zero" / name),
        Case(FIXTURES / "zero" / "zero1-bf16-llama-2ranks"),
    )
    result = strip_wrappers(list(wrapped.open()))
    assert result.removed == {removed: len(wrapped.model)}
    assert set(result.names.values()) == set(plain.model)


def test_real_children_with_wrappers_names_are_left_alone() -> None:
    case = Case(FIXTURES / "zero" / "zero2-bf16-real-child-names-2ranks")
    names = list(case.open())
    assert any("module." in name for name in names)
    assert any("_orig_mod." in name for name in names)
    result = strip_wrappers(names)
    assert (list(result.names.values()), result.removed) == (names, {})


def test_each_of_many_layers_can_be_wrapped() -> None:
    """All wrappers are found in one pass: one pass for each would take hours."""
    names = [f"layers.{i}._orig_mod.{end}" for i in range(20_000) for end in ("w", "b")]
    result = strip_wrappers(names)
    assert [*result.names.values()] == [name.replace("._orig_mod", "") for name in names]
    assert result.removed == {f"layers.{i}._orig_mod.": 2 for i in range(20_000)}


def test_a_wrapper_within_a_wrapped_model_is_named_without_the_outer_one() -> None:
    result = strip_wrappers(["module.a._orig_mod._orig_mod.w", "module.module.b"])
    assert [*result.names.values()] == ["a.w", "module.b"]
    assert result.removed == {"module.": 2, "a._orig_mod.": 1}
