"""The list of kinds is complete: each is said by a check, and each has a damage that brings it about."""

from __future__ import annotations

import ast
from pathlib import Path

from ckpt_tools.verification import KINDS
from ckpt_tools.verification import problem as listing
from tests.verification import (
    test_adapter,
    test_data,
    test_manifest,
    test_model,
    test_quantised,
    test_structure,
)

HOME = Path(listing.__file__).parent
DAMAGES = [
    *test_structure.DAMAGES,
    *test_model.DAMAGES,
    *test_quantised.DAMAGES,
    *test_adapter.DAMAGES,
    *test_manifest.STRUCTURE,
    *test_manifest.CHECKSUMS,
    *test_data.DAMAGES,
]
# Their kinds have tables of their own, in the tests of their names.
ELSEWHERE = {
    "against",
    "bitwise",
    "custom_code",
    "generation",
    "like",
    "like_tokenizer",
    "loading",
    "other_readers",
    "text",
    "tokenizer",
}


def kinds_said_in(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    texts = {node.value for node in nodes if isinstance(node, ast.Constant)}
    return {text for text in texts if isinstance(text, str)} & KINDS.keys()


def test_every_kind_is_said_by_a_check() -> None:
    modules = [path for path in HOME.glob("*.py") if path.name != "problem.py"]

    assert set().union(*map(kinds_said_in, modules)) == KINDS.keys()


def test_every_kind_has_a_damage_that_is_found() -> None:
    modules = [p for p in HOME.glob("*.py") if p.stem not in {"problem", *ELSEWHERE}]

    assert {damage.kind for damage in DAMAGES} == set().union(*map(kinds_said_in, modules))


def test_kinds_are_short_words_and_explained_in_a_line() -> None:
    for kind, (severity, meaning) in KINDS.items():
        assert kind == kind.lower() and len(kind) < 30 and " " not in kind
        assert severity in ("error", "warning")
        assert meaning and "\n" not in meaning and not meaning.endswith(".")
