"""Which of two tied names is written, and when both are."""

from __future__ import annotations

from pathlib import Path

from ckpt_tools.tensors.catalogue import Catalogue, FlatRange, Fragment, Stored, Tensor
from ckpt_tools.tensors.dtypes import BFLOAT16
from ckpt_tools.transforms.prefixes import rename
from ckpt_tools.transforms.ties import Settled, settle_ties

EMBED, HEAD, NORM = "embed.weight", "head.weight", "norm.weight"
MODEL_TIES = {HEAD: EMBED}
NAMES = dict.fromkeys((EMBED, NORM, HEAD))


def tensor(offset: int, rows: int = 2) -> Stored:
    return Stored(BFLOAT16, (rows, 2), [Fragment(Path("f"), offset, FlatRange(0, rows * 2))])


A, B, C = tensor(0), tensor(100), tensor(200)


def settle(
    tensors: dict[str, Tensor],
    ties: dict[str, str] | None = None,
    *,
    model_ties: dict[str, str] | None = None,
    equal: bool | None = None,
) -> Settled:
    """``equal`` answers the question whether two tensors hold the same; None says it must not be asked."""

    def answer(a: Tensor, b: Tensor) -> bool:
        assert equal is not None, "asked though it is known"
        assert {id(a), id(b)} <= {id(t) for t in tensors.values()}
        return equal

    ties_of_model = MODEL_TIES if model_ties is None else model_ties
    settled = settle_ties(Catalogue(tensors, ties), ties_of_model, NAMES, answer)
    assert set(settled.catalogue.ties).isdisjoint(settled.catalogue)
    return settled


def told(settled: Settled) -> tuple[dict[str, Tensor], dict[str, str]]:
    return dict(settled.catalogue), dict(settled.catalogue.ties)


def test_a_tie_of_state_and_model_is_kept() -> None:
    settled = settle({EMBED: A, NORM: B}, {HEAD: EMBED})
    assert told(settled) == ({EMBED: A, NORM: B}, {HEAD: EMBED})
    assert (settled.untied, settled.duplicated) == ((), ())


def test_a_tensor_listed_under_the_other_name_is_listed_under_the_kept_one() -> None:
    settled = settle({HEAD: A, NORM: B}, {EMBED: HEAD})
    assert told(settled) == ({EMBED: A, NORM: B}, {HEAD: EMBED})
    assert list(settled.catalogue) == [EMBED, NORM]


def test_a_tensor_that_lies_only_under_the_left_out_name_gets_the_kept_one() -> None:
    assert told(settle({NORM: B, HEAD: A})) == ({NORM: B, EMBED: A}, {HEAD: EMBED})


def test_a_tensor_that_lies_only_under_the_kept_name_stays() -> None:
    assert told(settle({EMBED: A, NORM: B})) == ({EMBED: A, NORM: B}, {})


def test_two_tensors_of_the_same_values_are_written_once() -> None:
    settled = settle({EMBED: A, NORM: B, HEAD: C}, equal=True)
    assert told(settled) == ({EMBED: A, NORM: B}, {HEAD: EMBED})
    assert settled.untied == ()


def test_two_tensors_of_different_values_are_both_written() -> None:
    settled = settle({EMBED: A, NORM: B, HEAD: C}, equal=False)
    assert told(settled) == ({EMBED: A, NORM: B, HEAD: C}, {})
    assert settled.untied == (HEAD,)


def test_two_tensors_of_different_shapes_are_both_written_without_a_comparison() -> None:
    settled = settle({EMBED: A, HEAD: tensor(300, rows=3)})
    assert settled.untied == (HEAD,)


def test_names_tied_in_the_state_and_not_in_the_model_are_both_written() -> None:
    settled = settle({EMBED: A, NORM: B}, {HEAD: EMBED}, model_ties={})
    assert told(settled) == ({EMBED: A, NORM: B, HEAD: A}, {})
    assert settled.duplicated == (HEAD,)


def test_a_second_name_that_the_model_does_not_know_stays_a_second_name() -> None:
    settled = settle({EMBED: A}, {"value_head.embed.weight": EMBED})
    assert told(settled) == ({EMBED: A}, {"value_head.embed.weight": EMBED})
    assert settled.duplicated == ()


def test_four_names_of_one_tensor_end_under_the_kept_one() -> None:
    model_ties = {"b": EMBED, "c": EMBED, "d": EMBED}
    for listed in ("b", "c", "d", EMBED):
        ties = {name: listed for name in (*model_ties, EMBED) if name != listed}
        settled = settle({listed: A, NORM: B}, ties, model_ties=model_ties)
        assert told(settled) == ({EMBED: A, NORM: B}, model_ties), listed


def test_names_that_follow_a_merged_one_follow_it_further() -> None:
    model_ties = {HEAD: EMBED, "third": EMBED}
    settled = settle({EMBED: A, HEAD: C}, {"third": HEAD}, model_ties=model_ties, equal=True)
    assert told(settled) == ({EMBED: A}, {HEAD: EMBED, "third": EMBED})


def test_without_ties_anywhere_nothing_changes() -> None:
    settled = settle({EMBED: A, NORM: B, HEAD: C}, model_ties={})
    assert told(settled) == ({EMBED: A, NORM: B, HEAD: C}, {})


def test_renaming_keeps_order_and_ties() -> None:
    catalogue = Catalogue({"x.b": A, "x.a": B}, {"x.c": "x.b"})
    renamed = rename(catalogue, {"x.b": "b", "x.a": "a", "x.c": "c"})
    assert list(renamed) == ["b", "a"]
    assert dict(renamed) == {"b": A, "a": B}
    assert dict(renamed.ties) == {"c": "b"}
