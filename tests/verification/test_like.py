"""A directory is compared with another one of the same model: what changes the computation is an error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckpt_tools import consolidate
from ckpt_tools.errors import UsageError
from ckpt_tools.verification import Problem, like, like_child, verify
from tests.conftest import FIXTURES
from tests.support.verification.directories import answer_here, copy_of, edit_json

SOURCE = FIXTURES / "zero" / "zero3-bf16-olmo2-chat-2ranks"
LIKE = SOURCE / "hf"


def write_plain(directory: Path) -> Path:
    """A finished directory without a manifest, so that only ``like`` can say what was changed."""
    consolidate(SOURCE / "checkpoint", directory, config=LIKE, generation_config="none", card=False)
    (directory / "ckpt_tools_manifest.json").unlink()
    return directory


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    answer_here(monkeypatch)
    monkeypatch.setattr(
        like, "ask_any", lambda _, asked: [like_child.filled(each) for each in json.loads(asked)]
    )
    return copy_of(write_plain, tmp_path / "directory")


def problems(directory: Path, other: Path = LIKE) -> list[Problem]:
    return list(verify(directory, like=other).problems)


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / "config.json", lambda data: data.update(changes))


def tokenizer(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / "tokenizer.json", change)


def settings(**changes: Any) -> Callable[[Path], None]:
    file = "tokenizer_config.json"
    return lambda directory: edit_json(directory / file, lambda data: data.update(changes))


def reverse_merges(data: dict[str, Any]) -> None:
    data["model"]["merges"].reverse()


def exchange_entries(data: dict[str, Any]) -> None:
    vocabulary = data["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def move_added_tokens(data: dict[str, Any]) -> None:
    data["added_tokens"][0]["id"] += 1


def add_a_normalizer(data: dict[str, Any]) -> None:
    data["normalizer"] = {"type": "Lowercase"}


def change_the_template(directory: Path) -> None:
    path = directory / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "user"))


def remove_the_template(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink()


DAMAGES: list[tuple[str, str, str, Callable[[Path], None]]] = [
    ("config-differs", "rms_norm_eps is 0.5", "error", config(rms_norm_eps=0.5)),
    ("config-differs", 'hidden_act is "gelu"', "error", config(hidden_act="gelu")),
    ("config-differs", "max_position_embeddings is 7", "error", config(max_position_embeddings=7)),
    ("config-differs", "eos_token_id is 17", "error", config(eos_token_id=17)),
    ("config-differs", "unheard_of is 1", "error", config(unheard_of=1)),
    ("tokenizer-differs", "merges", "error", tokenizer(reverse_merges)),
    ("tokenizer-differs", "2 entries of the vocabulary", "error", tokenizer(exchange_entries)),
    ("tokenizer-differs", "1 entries of the added", "error", tokenizer(move_added_tokens)),
    ("tokenizer-differs", "its normalizer", "error", tokenizer(add_a_normalizer)),
    ("chat-template-differs", "its text differs", "error", change_the_template),
    ("chat-template-differs", "there is no chat template", "error", remove_the_template),
]


@pytest.mark.parametrize(("kind", "fact", "severity", "damage"), DAMAGES)
def test_what_changes_the_computation_is_found(
    good: Path, kind: str, fact: str, severity: str, damage: Callable[[Path], None]
) -> None:
    damage(good)

    (problem,) = problems(good)

    assert (problem.kind, problem.severity) == (kind, severity)
    assert fact in problem.detail


FREE = [
    lambda directory: None,
    config(dtype="bfloat16", use_cache=False, transformers_version="9.9", _name_or_path="mine"),
    config(attention_dropout=0.5),
    settings(name_or_path="mine", model_max_length=7),
]


@pytest.mark.parametrize("change", FREE)
def test_what_says_who_wrote_a_file_may_differ(good: Path, change: Callable[[Path], None]) -> None:
    change(good)

    assert problems(good) == []


def test_merges_may_be_written_in_either_form(good: Path) -> None:
    def other_form(data: dict[str, Any]) -> None:
        merges = data["model"]["merges"]
        flat = [" ".join(m) if isinstance(m, list) else m.split(" ") for m in merges]
        assert merges
        data["model"]["merges"] = flat

    tokenizer(other_form)(good)

    assert problems(good) == []


def test_a_changed_generation_config_is_a_warning(good: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(LIKE, tmp_path / "like"))
    (other / "generation_config.json").write_text('{"temperature": 0.5, "eos_token_id": 3}')
    (good / "generation_config.json").write_text('{"temperature": 9.0, "eos_token_id": 3}')

    (problem,) = problems(good, other)

    assert (problem.kind, problem.severity) == ("generation-differs", "warning")
    assert "temperature is 9.0, and 0.5" in problem.detail


def test_code_of_another_repository_is_an_error_with_and_without_like(good: Path) -> None:
    config(auto_map={"AutoModelForCausalLM": "somebody/else--modeling.X"})(good)

    found = [p for p in verify(good).problems if p.kind == "code-of-another-repository"]
    assert [(p.severity, p.file) for p in found] == [("error", "config.json")]
    assert {p.kind for p in problems(good)} == {"code-of-another-repository", "config-differs"}


def test_code_that_like_names_as_well_is_a_warning(good: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(LIKE, tmp_path / "like"))
    named = config(auto_map={"AutoModelForCausalLM": "owner/name--modeling.X"})
    named(good)
    named(other)

    (problem,) = problems(good, other)

    assert (problem.kind, problem.severity) == ("code-of-another-repository", "warning")


def test_a_directory_without_config_is_refused(good: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.json") as caught:
        verify(good, like=tmp_path)

    assert caught.value.path == tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("renamed", [{"torch_dtype": "bfloat16"}, {"layer_types": None}])
def test_transformers_fills_in_what_versions_write_differently(
    tmp_path: Path, renamed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child process itself; keys that another version renamed or left out are no difference."""
    answer_here(monkeypatch)
    directory = copy_of(write_plain, tmp_path / "directory")
    config(**renamed)(directory)
    edit_json(directory / "config.json", lambda data: data.pop("attention_bias", None))

    assert problems(directory) == []
