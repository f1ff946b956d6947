"""The same tensor is found on both sides, whatever each side calls it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tools.model import matching
from ckpt_tools.model.matching import Side, alike, match, side_of
from ckpt_tools.readers.opening import open_weights
from ckpt_tools.tensors.catalogue import Catalogue, FlatRange, Fragment, Stored, Tensor
from ckpt_tools.tensors.checkpoint import Weight
from ckpt_tools.tensors.dtypes import FLOAT32
from tests.conftest import FIXTURES

ZERO, PEFT = FIXTURES / "zero", FIXTURES / "peft"
PLAIN = ZERO / "zero2-bf16-llama-3ranks"
TIED = ZERO / "zero3-bf16-qwen3-tied-2ranks"
WRAPPED = ZERO / "zero2-bf16-llama-compiled-2ranks"


def tensor(*shape: int) -> Stored:
    numel = torch.Size(shape).numel()
    return Stored(FLOAT32, shape, [Fragment(Path("/nowhere"), 0, FlatRange(0, numel))])


def catalogue(*names: str, **ties: str) -> Catalogue:
    held: dict[str, Tensor] = {name: tensor(2) for name in names}
    return Catalogue(held, ties)


@pytest.mark.parametrize(
    ("first", "second", "pairs", "only_first", "only_second"),
    [
        (catalogue("a", "b"), catalogue("b", "c"), {"b": ("b", "b")}, ["a"], ["c"]),
        # Both tie, and list the tensor under different names.
        (catalogue("a", b="a"), catalogue("b", a="b"), {"a": ("a", "b")}, [], []),
        # The second leaves the second name out, as a finished directory does.
        (catalogue("a", b="a"), catalogue("a"), {"a": ("a", "a")}, [], []),
        (catalogue("a", b="a"), catalogue("b"), {"b": ("a", "b")}, [], []),
        (catalogue("b"), catalogue("a", b="a"), {"b": ("b", "a")}, [], []),
        # The second holds values of its own under each name: both are looked at.
        (
            catalogue("a", b="a"),
            catalogue("a", "b"),
            {"a": ("a", "a"), "b": ("a", "b")},
            [],
            [],
        ),
        (
            catalogue("a", "b"),
            catalogue("b", a="b"),
            {"a": ("a", "b"), "b": ("b", "b")},
            [],
            [],
        ),
        (catalogue("a", b="a"), catalogue("c"), {}, ["a"], ["c"]),
        (catalogue(), catalogue("a"), {}, [], ["a"]),
    ],
)
def test_tensors_meet_by_any_of_their_names(
    first: Catalogue,
    second: Catalogue,
    pairs: dict[str, tuple[str, str]],
    only_first: list[str],
    only_second: list[str],
) -> None:
    found = match(first, second)

    expected = {name: (first[a], second[b]) for name, (a, b) in pairs.items()}
    assert found.pairs.keys() == expected.keys()
    assert all(a is x and b is y for (a, b), (x, y) in zip(
        found.pairs.values(), expected.values(), strict=True
    ))  # fmt: skip
    assert [*found.only_first] == only_first
    assert [*found.only_second] == only_second
    assert found.odd == len(only_first) + len(only_second)


def test_another_shape_is_odd() -> None:
    first, second = Catalogue({"a": tensor(2, 3)}), Catalogue({"a": tensor(3, 2)})

    assert match(first, second).odd == 1
    assert match(first, first).odd == 0


def test_a_training_checkpoint_has_masters_and_the_weights_that_they_train() -> None:
    side = side_of(open_weights(PLAIN / "checkpoint"), "A")

    truth = [load_file(PLAIN / "truth" / f"{copy}.safetensors") for copy in ("masters", "model")]
    for copy, expected in zip(side.copies, truth, strict=True):
        assert all(torch.equal(copy[name].load(), value) for name, value in expected.items())
        assert copy.keys() == expected.keys()
    assert side.kind == "state"
    one = side_of(open_weights(PLAIN / "checkpoint"), "A", "model")
    assert [c["model.norm.weight"].dtype.name for c in one.copies] == ["bfloat16"]
    (masters,) = side_of(open_weights(PLAIN / "checkpoint"), "A", "master").copies
    assert masters["model.norm.weight"].dtype == FLOAT32


def test_a_checkpoint_without_16_bit_weights_has_them_all_the_same() -> None:
    """ZeRO-3 files hold masters alone; rounded they are what the engine trained with."""
    side = side_of(open_weights(TIED / "checkpoint"), "A", "model")

    truth = load_file(TIED / "truth" / "model.safetensors")
    (copy,) = side.copies
    assert all(torch.equal(copy[name].load(), value) for name, value in truth.items())


def test_wrappers_are_off_and_said() -> None:
    side = side_of(open_weights(WRAPPED / "checkpoint"), "B")

    assert not any("_orig_mod" in name for name in side.copies[0])
    (note,) = side.notes
    assert note.startswith("B: stripped _orig_mod. from ")


def names_of(side: Side) -> set[str]:
    return {*side.copies[0]}


@pytest.mark.slow
def test_a_state_of_the_live_model_meets_its_hub_directory(tmp_path: Path) -> None:
    """Experts lie fused in training and one by one on the hub."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(PEFT / "fsdp2-qwen3-moe-experts" / "hf")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    hub = tmp_path / "hub"
    model.save_pretrained(hub)
    (tmp_path / "run").mkdir()
    save_file(model.state_dict(), tmp_path / "run" / "state.safetensors")

    run = side_of(open_weights(tmp_path / "run" / "state.safetensors"), "A")
    finished = side_of(open_weights(hub), "B")
    assert not names_of(finished) <= names_of(run)
    a, b = alike(run, finished)

    assert names_of(a) == names_of(b) == set(load_file(hub / "model.safetensors"))
    pairs = match(a.copies[0], b.copies[0]).pairs
    assert all(torch.equal(x.load(), y.load()) for x, y in pairs.values())
    assert a.notes == ("A: brought into the hub layout by the config of B",)
    assert b is finished
    b, a = alike(finished, run)
    assert names_of(a) == names_of(b)
    # A directory whose config is of another model helps nobody, and changes nothing.
    (hub / "config.json").write_text((PLAIN / "hf" / "config.json").read_text())
    assert alike(run, finished) == (run, finished)


@pytest.mark.parametrize(
    ("case", "folder"),
    [
        ("zero2-olmo2-dora", ""),
        ("fsdp2-olmo2-modules-to-save", ""),
        ("zero2-olmo2-prompt", ""),
        ("zero2-olmo2-new-tokens", ""),
        ("zero2-olmo2-loha", ""),
        ("zero3-qwen2-bias-fp32", ""),
        ("zero2-olmo2-two-adapters", "second"),
        ("zero2-olmo2-two-adapters", ""),
    ],
)
def test_a_state_with_an_adapter_meets_the_adapters_directory(case: str, folder: str) -> None:
    """The directory is what PEFT itself wrote."""
    run = side_of(open_weights(PEFT / case / "checkpoint"), "A")
    adapter = side_of(open_weights(PEFT / case / "truth" / "adapter" / folder), "B")

    assert adapter.kind == "adapter"
    a, b = alike(run, adapter)

    assert match(a.copies[0], b.copies[0]).odd == 0
    truth = load_file(PEFT / case / "truth" / "adapter" / folder / "adapter_model.safetensors")
    assert names_of(a) == names_of(b) == {*truth}
    assert all(
        torch.equal(a.copies[1][name].load(), value.to(a.copies[1][name].dtype.torch))
        for name, value in truth.items()
    )
    assert a.notes[-1] == "A: only the adapter is compared, because B is an adapter"


def test_an_adapter_of_another_name_is_met_if_it_is_the_only_one(tmp_path: Path) -> None:
    case = PEFT / "fsdp2-olmo2-named-adapter"
    (source,) = (case / "truth" / "adapter").rglob("adapter_model.safetensors")
    shutil.copytree(source.parent, tmp_path / "elsewhere")
    run = side_of(open_weights(case / "checkpoint"), "A")

    a, b = alike(run, side_of(open_weights(tmp_path / "elsewhere"), "B"))

    assert match(a.copies[0], b.copies[0]).odd == 0


def test_weights_that_are_kept_are_not_made_of_the_masters(tmp_path: Path) -> None:
    """Where the two differ, which is damage that `consolidate` refuses, each is shown as it is."""
    save_file({"x": torch.ones(2), "y": torch.full((2,), 3.0)}, tmp_path / "x.safetensors")
    opened = open_weights(tmp_path / "x.safetensors")
    x, y = (opened.weights[name].model for name in "xy")
    both = replace(opened, weights={"x": Weight("parameter", (2,), FLOAT32, master=x, model=y)})

    master, model = side_of(both, "A").copies

    assert torch.equal(master["x"].load(), torch.ones(2))
    assert torch.equal(model["x"].load(), torch.full((2,), 3.0))


def test_names_stay_where_others_fit_no_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that holds names of the model in memory, though its config is the hub's."""
    run = Side("A", (catalogue("a", "b", "c"),), Path(), "state")
    finished = Side("B", (catalogue("a", "b"),), Path(), "model")
    monkeypatch.setattr(matching, "in_hub_layout", lambda *_: catalogue("x", "y", "z"))
    assert alike(run, finished) == (run, finished)

    monkeypatch.setattr(matching, "in_hub_layout", lambda *_: catalogue("a", "b"))
    assert names_of(alike(run, finished)[0]) == {"a", "b"}
    assert names_of(alike(finished, run)[1]) == {"a", "b"}


def test_without_an_adapter_nothing_is_renamed() -> None:
    run = side_of(open_weights(PLAIN / "checkpoint"), "A")
    adapter = side_of(open_weights(PEFT / "zero2-olmo2-lora" / "truth" / "adapter"), "B")

    assert alike(run, adapter) == (run, adapter)


def test_two_finished_sides_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "in_hub_layout", lambda *_: catalogue("a"))
    sides = [Side(name, (catalogue(name),), Path(), "model") for name in "ab"]

    assert alike(*sides) == tuple(sides)
