"""An attribute of a catalogue: its names lose the path, and tensors that it shares come along."""

from __future__ import annotations

import pytest

from ckpt_tools.errors import AttributeNotFound
from ckpt_tools.tensors.catalogue import Catalogue, Stored
from ckpt_tools.tensors.dtypes import FLOAT32
from ckpt_tools.transforms.subset import attributes, take_attribute


def catalogue(*names: str, ties: dict[str, str] | None = None) -> Catalogue:
    return Catalogue({name: Stored(FLOAT32, (0,), ()) for name in names}, ties)


def test_names_lose_the_path_and_keep_their_order() -> None:
    whole = catalogue("policy.b", "value.b", "policy.a.weight")

    assert list(take_attribute(whole, "policy")) == ["b", "a.weight"]


def test_a_name_that_only_begins_alike_is_left_out() -> None:
    assert list(take_attribute(catalogue("policy.a", "policy_old.a"), "policy")) == ["a"]


def test_a_dotted_path_goes_deeper() -> None:
    whole = catalogue("module.policy.model.a", "module.policy.v_head.a")

    assert list(take_attribute(whole, "module.policy.model")) == ["a"]


def test_a_tensor_listed_under_another_attribute_comes_along() -> None:
    whole = catalogue("policy.a", "value.head", ties={"value.a": "policy.a"})

    part = take_attribute(whole, "value")

    assert set(part) == {"head", "a"}
    assert part["a"] is whole["policy.a"]


def test_names_tied_within_stay_tied() -> None:
    whole = catalogue(
        "policy.a", "value.head", ties={"policy.b": "policy.a", "value.x": "policy.a"}
    )

    assert dict(take_attribute(whole, "policy").ties) == {"b": "a"}


def test_two_names_for_one_tensor_elsewhere_become_one_tensor_here() -> None:
    whole = catalogue("policy.a", "value.head", ties={"value.x": "policy.a", "value.y": "policy.a"})

    part = take_attribute(whole, "value")

    assert set(part) == {"head", "x"}
    assert dict(part.ties) == {"y": "x"}


def test_an_attribute_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(AttributeNotFound) as caught:
        take_attribute(catalogue("policy.a", "policy.b", "value.a"), "actor")

    assert caught.value.choices == {"policy": 2, "value": 1}
    assert caught.value.exit_code == 2


def test_attributes_under_one_wrapper_are_listed_with_it() -> None:
    assert attributes(catalogue("module.policy.a", "module.value.a")) == {
        "module.policy": 1,
        "module.value": 1,
    }
