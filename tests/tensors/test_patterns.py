"""Patterns that a checkpoint states: what `re` finds, in bounded time."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from ckpt_tools.errors import DamagedCheckpoint, UnsupportedLayout
from ckpt_tools.hub.adapter_config import AdapterConfig
from ckpt_tools.readers.deepspeed.tensor_parallel import SliceRecord
from ckpt_tools.tensors import patterns
from ckpt_tools.tensors.patterns import Allowance, Patterns

NAMES = [
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.11.self_attn.q_proj.weight",
    "modelXlayers.1.self_attn.q_proj.weight",
    "12.mlp.dense_4h_to_h.weight",
    "a{i}b",
    "axxb",
    "",
]
PATTERNS = [
    rf"^{re.escape(NAMES[0])}$",
    NAMES[0],
    r"\d+.mlp.dense_4h_to_h.weight",
    r".*\.(?:q_proj|v_proj)\.weight",
    r"(?i)MODEL.*",
    r"a{i}b",
    r"^(?!.*mlp).*weight$",
    r"model\.layers\.1{1,2}\.",
    r"",
]
FILE = Path("model_states.pt")


@pytest.mark.parametrize("whole", [False, True])
def test_a_pattern_matches_what_re_matches(whole: bool) -> None:
    for pattern in PATTERNS:
        ours = Patterns({pattern: True}, Allowance(FILE), whole=whole)
        theirs = re.compile(pattern)
        for name in NAMES:
            found = theirs.fullmatch(name) if whole else theirs.match(name)
            assert (ours.first(name) is not None) == (found is not None), (pattern, name)


def test_the_first_pattern_that_matches_has_the_value() -> None:
    exact = rf"^{re.escape(NAMES[0])}$"
    for values in ({exact: 1, "model": 2}, {"model": 2, exact: 1}, {exact: 1}, {"x": 3, exact: 1}):
        expected = next(v for pattern, v in values.items() if re.match(pattern, NAMES[0]))
        assert Patterns(values, Allowance(FILE)).first(NAMES[0]) == expected


def test_a_pattern_that_takes_without_end_is_refused_and_all_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    allowance = Allowance(FILE)
    slow, plain = Patterns({"(a|aa)+$": 1}, allowance), Patterns({"a": 1}, allowance)
    assert plain.first("a") == 1

    for _ in range(2):
        with pytest.raises(UnsupportedLayout, match="comparing its patterns with names") as caught:
            slow.first("a" * 60 + "!")
        assert caught.value.path == FILE
    with pytest.raises(UnsupportedLayout):
        plain.first("a")


def test_the_time_of_all_comparisons_is_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count()
    monkeypatch.setattr(patterns.time, "thread_time", lambda: float(next(clock)))
    allowance = Allowance(FILE)
    first, second = Patterns({"a": 1}, allowance), Patterns({"b": 2}, allowance)

    # Each takes a second, and so does the compilation of each pattern.
    assert [first.first("a"), second.first("b"), first.first("x")] == [1, 2, None]
    with pytest.raises(UnsupportedLayout):
        second.first("b")


SLOW = "(a|aa)+$"
NAME = "a" * 60 + "!"


@pytest.mark.parametrize(
    "compare",
    [
        lambda: AdapterConfig({"rank_pattern": {SLOW: 2}, "r": 1}).rank(NAME),
        lambda: AdapterConfig({"target_modules": SLOW}).targets(NAME),
        lambda: SliceRecord({"tp_replicated_parameter_patterns": [SLOW]}, FILE).pieces(
            NAME, [(4,)]
        ),
        lambda: SliceRecord({"affine_map": {"params": {SLOW: {}}}}, FILE).pieces(NAME, [(4,)]),
    ],
    ids=["rank_pattern", "target_modules", "patterns of slices", "affine map"],
)
def test_every_pattern_of_a_checkpoint_is_bounded(
    compare: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    with pytest.raises(UnsupportedLayout, match="comparing its patterns with names"):
        compare()


@pytest.mark.parametrize("pattern", ["(", "a{99999999999}", "(" * 5_000 + ")" * 5_000, 5, None])
def test_what_is_no_regular_expression_is_damage(pattern: str) -> None:
    with pytest.raises(DamagedCheckpoint, match="not a regular expression"):
        Patterns({pattern: True}, Allowance(FILE))
