"""Answers are kept on disk, are used only while nothing that made them changed, and are never needed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from ckpt_tools.cli import caching
from ckpt_tools.errors import UsageError
from ckpt_tools.hub import reference
from ckpt_tools.hub.reference import adapters, describe, kept, process
from ckpt_tools.tensors.dtypes import BY_NAME
from tests.hub.test_reference import OLMOE

CHILD = "ckpt_tools.hub.reference.child"
QUESTION = json.dumps({"config": {"model_type": "made-up"}})


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where entries are written; nothing is known from earlier tests."""
    monkeypatch.setenv("CKPT_TOOLS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reference, "_answers", {})
    adapters._answers.cache_clear()
    yield tmp_path / "cache" / "answers"
    adapters._answers.cache_clear()


class Child:
    """In the place of child processes: answers with a file that it read, and counts the questions."""

    def __init__(self, source: Path) -> None:
        self.asked = 0
        self.source = source
        self.answer: dict[str, Any] = {}
        self.is_kept = True
        source.write_text("version = 1\n")

    def __call__(self, module: str, question: str, library: str = "") -> dict[str, Any]:
        self.asked += 1
        found = os.stat(self.source)
        files = [[str(self.source), found.st_size, found.st_mtime_ns]] if self.is_kept else []
        answer = {"model": {"number": self.asked}, "files": files} | self.answer
        if not self.is_kept:
            del answer["files"]
        return answer


@pytest.fixture
def children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Child:
    made = Child(tmp_path / "modeling.py")
    monkeypatch.setattr(process, "ask", made)
    return made


def number(question: str = QUESTION) -> int:
    return int(kept.ask(CHILD, question)["model"]["number"])


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process does."""
    monkeypatch.setattr(reference, "_answers", {})
    adapters._answers.cache_clear()


# -- what is kept ----------------------------------------------------------------------------------


def test_the_second_process_gets_the_same_model_without_a_child(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    first = describe(OLMOE), describe(OLMOE, like_names=names)
    forget(monkeypatch)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a child was started")

    monkeypatch.setattr(process, "run_child", fail)

    assert (describe(OLMOE), describe(OLMOE, like_names=names)) == first
    assert first[0] is not None
    assert first[0] != first[1]
    assert len(list(folder.iterdir())) == 2
    with pytest.raises(AssertionError, match="started"):
        describe(dict(OLMOE, num_experts=3))


@pytest.mark.slow
def test_what_peft_writes_is_kept_too(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    question = adapters.AdapterQuestion("default", config, {name: BY_NAME["float32"]}, False)
    first = adapters.describe_adapters(OLMOE, [question])
    assert first[0].failure is None
    forget(monkeypatch)
    monkeypatch.setattr(process, "run_child", None)

    assert adapters.describe_adapters(OLMOE, [question]) == first


@pytest.mark.parametrize(
    "config",
    [
        dict(OLMOE, num_experts_per_tok="two"),
        dict(OLMOE, architectures=["NoSuchModel"]),
    ],
    ids=["refused", "unknown"],
)
def test_a_failure_is_not_kept(folder: Path, config: dict[str, Any]) -> None:
    """It may be for want of a package."""
    with contextlib.suppress(UsageError):
        assert describe(config) is None
    assert not list(folder.iterdir())


def test_what_custom_code_answers_is_not_kept(tmp_path: Path, folder: Path) -> None:
    """Not even for a class of transformers: the question allows code from the directory."""
    assert describe(OLMOE, code_dir=tmp_path, trust_remote_code=True) is not None
    assert not list(folder.iterdir())


def test_the_child_names_what_it_imported() -> None:
    answer = process.ask(
        CHILD,
        json.dumps(
            {
                "config": OLMOE,
                "architecture": "OlmoeForCausalLM",
                "like_names": None,
                "code_dir": None,
                "trust_remote_code": False,
                "modules": None,
            }
        ),
    )

    names = {Path(path).name for path, _, _ in answer["files"]}
    assert {"child.py", "modeling_olmoe.py", "core_model_loading.py"} <= names
    assert all(
        (os.stat(p).st_size, os.stat(p).st_mtime_ns) == (s, m) for p, s, m in answer["files"]
    )


# -- when an entry is used -------------------------------------------------------------------------


def test_everything_that_makes_an_answer_is_in_its_key(
    children: Child, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert [number(), number()] == [1, 1]
    assert number(QUESTION + " ") == 2
    assert kept.ask("another.child", QUESTION)["model"]["number"] == 3
    with monkeypatch.context() as other:
        other.setattr(kept, "__version__", "0.0.0")
        assert number() == 4
    (tmp_path / "path" / "transformers-99.0.0.dist-info").mkdir(parents=True)
    with monkeypatch.context() as other:
        other.syspath_prepend(tmp_path / "path")
        assert number() == 5
    with monkeypatch.context() as other:
        other.setenv("PYTHONPATH", str(tmp_path))
        assert number() == 6
    assert number() == 1


def test_an_entry_ends_with_a_change_of_the_code_that_made_it(children: Child) -> None:
    assert number() == 1
    children.source.write_text("version = 2.0\n")
    assert [number(), number()] == [2, 2]
    children.source.unlink()
    children.source = children.source.with_name("other.py")
    children.source.write_text("")
    assert number() == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: content.replace(b'"number": 1', b'"number": 7'),
        lambda content: content.replace(b"\n", b" "),
        lambda content: sealed(b"[]"),
        lambda content: sealed(b"{}"),
        lambda content: sealed(b"not JSON"),
        lambda content: sealed(content.partition(b"\n")[2].replace(b'"key": "', b'"key": "0')),
        lambda content: sealed(
            content.partition(b"\n")[2].replace(b'"files": [[', b'"files": [[1, ')
        ),
    ],
)
def test_a_wrong_entry_is_ignored_and_written_anew(
    children: Child, folder: Path, damage: Any
) -> None:
    assert number() == 1
    (entry,) = folder.iterdir()
    good = entry.read_bytes()
    wrong = damage(good)
    assert wrong != good
    entry.write_bytes(wrong)

    assert [number(), number()] == [2, 2]


def sealed(body: bytes) -> bytes:
    """A body with its right digest."""
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def test_an_entry_under_the_name_of_another_is_not_used(children: Child, folder: Path) -> None:
    number()
    (first,) = folder.iterdir()
    content = first.read_bytes()
    number(QUESTION + " ")
    (second,) = set(folder.iterdir()) - {first}
    second.write_bytes(content)

    assert number(QUESTION + " ") == 3


# -- the directory ---------------------------------------------------------------------------------


def test_the_entries_are_for_their_owner_alone(children: Child, folder: Path) -> None:
    before = os.umask(0o002)
    try:
        number()
    finally:
        os.umask(before)
    (entry,) = folder.iterdir()
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (folder.parent, folder, entry)]
    assert modes == [0o700, 0o700, 0o600]

    folder.chmod(0o777)
    assert [number(), number()] == [2, 3], "others could have written the entry"


@pytest.mark.parametrize("value", ["off", ""])
def test_it_can_be_switched_off(
    children: Child, monkeypatch: pytest.MonkeyPatch, value: str, folder: Path, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CKPT_TOOLS_CACHE", value)
    assert [number(), number()] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["modeling.py"]
    monkeypatch.setenv("CKPT_TOOLS_CACHE", str(folder.parent))
    with kept.switched_off():
        assert number() == 3
    assert not folder.exists()
    assert [number(), number()] == [4, 4]


def test_a_command_switches_it_off_for_itself(children: Child, folder: Path) -> None:
    @click.command
    @caching.no_cache
    def command() -> None:
        click.echo(number())

    for arguments, printed in ([], 1), (["--no-cache"], 2), ([], 1):
        assert CliRunner().invoke(command, arguments).output == f"{printed}\n"


@pytest.mark.parametrize("home", ["/proc/no-home", None])
def test_it_is_not_needed(
    children: Child, monkeypatch: pytest.MonkeyPatch, home: str | None, tmp_path: Path
) -> None:
    """HOME may be absent, or on a disk that cannot be written."""
    monkeypatch.chdir(tmp_path)
    for name in ("CKPT_TOOLS_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    else:
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert [number(), number()] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["modeling.py"]


def test_by_default_it_lies_in_the_users_cache(
    children: Child, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CKPT_TOOLS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert [number(), number()] == [1, 1]
    assert len(list((tmp_path / "xdg" / "ckpt-tools" / "answers").iterdir())) == 1


def test_its_size_is_limited(
    children: Child, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """What was used last stays; so does what another process is writing, if it is not a day old."""
    folder.mkdir(parents=True, mode=0o700)
    for name, age in (("new", 0), ("old", 86400)):
        left = folder / f".unfinished-{name}"
        left.touch()
        os.utime(left, (left.stat().st_mtime - age,) * 2)
    monkeypatch.setattr(kept, "LIMIT_BYTES", 2500)
    children.answer = {"names": "n" * 500}
    for each in range(3):
        assert number(f"{QUESTION}{each}") == each + 1
        for path in folder.iterdir():
            if path.suffix:
                os.utime(path, (path.stat().st_mtime - 10,) * 2)
    assert number(f"{QUESTION}0") == 1
    assert number(f"{QUESTION}3") == 4

    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert ".unfinished-new" in sizes
    assert ".unfinished-old" not in sizes
    assert sum(sizes.values()) <= 2500
    assert number(f"{QUESTION}0") == 1
    assert number(f"{QUESTION}1") > 4
    children.answer = {"names": "n" * 5000}
    children.asked = 100
    assert [number("long"), number("long")] == [101, 102]


def test_many_writers_at_once_leave_whole_entries(children: Child, folder: Path) -> None:
    children.answer = {"names": "n" * 100_000}
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda _: number(), range(64)))

    assert all(1 <= each <= children.asked for each in found)
    (entry,) = folder.iterdir()
    digest, _, body = entry.read_bytes().partition(b"\n")
    assert hashlib.sha256(body).hexdigest().encode() == digest
