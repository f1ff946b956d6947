"""Key maps: names of a pipeline's numbered layers become those of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ckpt_tools import open_checkpoint
from ckpt_tools.errors import UsageError
from ckpt_tools.tensors.catalogue import Catalogue, FlatRange, Fragment, Stored
from ckpt_tools.tensors.dtypes import FLOAT32
from ckpt_tools.transforms.key_map import key_map
from tests.conftest import FIXTURES
from tests.support.readers.contract import assert_same

ROOT = FIXTURES.parent

LLAMA = {
    "0.weight": "model.embed_tokens.weight",
    "{last-1}.weight": "model.norm.weight",
    "{last}.weight": "lm_head.weight",
    "{n}.*": "model.layers.{n-1}.*",
}


def catalogue(*names: str, **ties: str) -> Catalogue:
    tensors = {
        name: Stored(FLOAT32, (1,), [Fragment(Path("file"), 4 * at, FlatRange(0, 1))])
        for at, name in enumerate(names)
    }
    return Catalogue(tensors, ties)


def renamed(rules: object, held: Catalogue) -> dict[str, int]:
    """The new names, each with the number of the tensor that it is now the name of."""
    made = key_map(rules).apply(held)
    offsets = {}
    for name in (*made, *made.ties):
        (move,) = made[made.ties.get(name, name)].moves(0, 1)
        offsets[name] = move.offset // 4
    return offsets


def test_numbers_are_shifted_and_the_first_rule_that_fits_counts() -> None:
    held = catalogue("0.weight", "1.mlp.up.weight", "12.mlp.up.weight", "13.weight", "14.weight")
    assert renamed(LLAMA, held) == {
        "model.embed_tokens.weight": 0,
        "model.layers.0.mlp.up.weight": 1,
        "model.layers.11.mlp.up.weight": 2,
        "model.norm.weight": 3,
        "lm_head.weight": 4,
    }


def test_one_tensor_may_get_several_names() -> None:
    rules = {"tied_modules.embed.*": ["embed.*", "head.*"], "*": "*"}
    held = catalogue("tied_modules.embed.weight", "1.weight")
    made = key_map(rules).apply(held)
    assert set(made) == {"embed.weight", "1.weight"}
    assert dict(made.ties) == {"head.weight": "embed.weight"}


def test_null_leaves_a_tensor_out() -> None:
    assert renamed({"{n}.inv_freq": None, "*": "m.*"}, catalogue("3.inv_freq", "3.w")) == {
        "m.3.w": 1
    }


def test_second_names_keep_to_their_tensor() -> None:
    made = key_map({"*": "m.*"}).apply(catalogue("a", b="a"))
    assert dict(made.ties) == {"m.b": "m.a"}


def test_dots_and_brackets_are_letters_in_a_pattern() -> None:
    with pytest.raises(UsageError, match="no rule of the key map fits 0xweight"):
        renamed({"0.weight": "w"}, catalogue("0xweight"))


@pytest.mark.parametrize(
    ("rules", "fact"),
    [
        ([], "a key map is a JSON object"),
        ({}, "a key map is a JSON object"),
        ({"0.weight": 3}, "gives neither a name, nor names, nor null"),
        ({"0.weight": ["a", 3]}, "gives neither a name, nor names, nor null"),
        ({"0.weight": "model.{n}.weight"}, "whose n is not in the pattern"),
        ({"0.weight": "model.*"}, r"whose \* is not in the pattern"),
        ({"*.*": "*"}, r"has more than one \*"),
        ({"{n}.*": "weight"}, "gives two tensors the name weight"),
        ({"0.a": "a"}, "no rule of the key map fits 1.a"),
    ],
)
def test_what_is_no_key_map_or_does_not_fit_is_refused(rules: object, fact: str) -> None:
    with pytest.raises(UsageError, match=fact) as caught:
        renamed(rules, catalogue("0.a", "1.a"))
    assert caught.value.hint


# Rows of query and key projections for another order of the rotary embedding.


def documented() -> dict[str, Any]:
    """The key map for torchtitan in docs/formats.md."""
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8").split("### torchtitan")[1]
    rules = json.loads(text.split("```json")[1].split("```")[0])
    assert isinstance(rules, dict)
    return rules


def test_the_documented_map_of_torchtitan_gives_what_its_own_adapter_gives() -> None:
    """The truth is the state that ``to_hf`` of torchtitan's adapter returned in the run."""
    fixture = FIXTURES / "dcp" / "torchtitan-2ranks"
    config = json.loads((fixture / "hf" / "config.json").read_text())
    names = key_map(documented()).with_numbers(config.get)
    stored = open_checkpoint(fixture / "checkpoint", tag="step-2").catalogue()
    made = names.apply(names.reordered(stored))
    truth = load_file(fixture / "truth" / "hf.safetensors")
    assert set(made) == set(truth)
    for name, value in truth.items():
        assert_same(made[name].load(), value, name)
    plain = key_map({"*": "*"}).reordered(stored)
    assert [*plain.values()] == [*stored.values()]


@pytest.mark.parametrize(
    ("rules", "number", "fact"),
    [
        ({"*": {"name": "*"}}, None, "an object without"),
        ({"*": {"name": "*", "rope_heads": 0}}, None, "an object without"),
        ({"*": {"name": "*", "rope_heads": 2, "more": 1}}, None, "an object without"),
        ({"*": {"name": "*", "rope_heads": "heads"}}, None, "there is no config"),
        ({"*": {"name": "*", "rope_heads": "heads"}}, "four", "which is 'four'"),
        ({"*": {"name": "*", "rope_heads": 2}}, None, "its 1 rows are not those of 2 heads"),
        ({"*": {"name": "*", "rows": "vocab_size"}}, None, "there is no config"),
        ({"*": {"name": "*", "rows": "vocab_size"}}, 2, "it has 1 rows, and the key map keeps 2"),
        ({"*": {"name": "*", "rows": -1}}, None, "keeps -1"),
    ],
)
def test_heads_and_rows_that_do_not_fit_are_refused(
    rules: object, number: object, fact: str
) -> None:
    def carry_out() -> None:
        names = key_map(rules)
        names = names if number is None else names.with_numbers(lambda _: number)
        names.reordered(catalogue("w"))

    with pytest.raises(UsageError, match=fact) as caught:
        carry_out()
    assert caught.value.hint
