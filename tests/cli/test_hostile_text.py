"""Names from a checkpoint never become commands to a terminal, a workflow or a browser: in no command."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.test_consolidate import run
from tests.conftest import FIXTURES

ESCAPES = (
    "\x1b[2J\x1b]0;pwned\x07\r\n::error title=pwn::injected ##[group]x ##vso[task]x \x9b1m \u202e"
)
NAME = f"{ESCAPES}.a.weight"
HF = FIXTURES / "zero" / "zero3-bf16-olmo2-chat-2ranks" / "hf"
CHECKPOINT = HF.parent / "checkpoint"


def assert_harmless(text: str) -> None:
    """Nothing but printable characters and line ends, and no command of a workflow but our own."""
    for line in text.split("\n"):
        assert line.isprintable(), repr(line)
        assert not re.search(r"##\[|##vso\[", line), line
        if line.lstrip().startswith("::"):
            assert line.startswith(("::error file=", "::warning file=")), line
            assert "::error title=" not in line.partition("::")[2][:5]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose tensor has such a name, in a folder that has one too, and one of other values."""
    root = tmp_path_factory.mktemp("names") / ESCAPES.replace("/", "")
    for name, value in (("one", 1.0), ("other", 2.0)):
        (root / name).mkdir(parents=True)
        tensors = {NAME: torch.full((2, 2), value), "model.b": torch.ones(1)}
        save_file(tensors, root / name / "model.safetensors")
        config = {"model_type": ESCAPES, "architectures": ["Olmo2ForCausalLM", ESCAPES]}
        (root / name / "config.json").write_text(json.dumps(config))
    return root


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "one"],
        ["inspect", "one", "--json"],
        ["inspect", "nothing"],
        ["diff", "one", "other"],
        ["diff", "one", "other", "--format", "json"],
        ["diff", "one", "nothing"],
        ["consolidate", "one", "out"],
        ["consolidate", "one", "out", "--debug"],
        ["consolidate", "one", "out", "--weights-only", "--dry-run"],
        ["consolidate", "one", "out", "--json"],
        ["extract-attr", "one", "out", ESCAPES],
        ["extract-lora", "one", "out"],
        ["merge-lora", "one", "out"],
        ["average", "one", "other", "out"],
        ["verify", "one"],
        ["verify", "one", "--strict", "--format", "github"],
        ["verify", "one", "--format", "json"],
        ["verify", "one", "--format", "junit"],
        ["verify", "one", "--against", "other"],
    ],
    ids=" ".join,
)
def test_no_command_prints_them(words: list[str], hostile: Path) -> None:
    args = [
        str(hostile / word) if word in ("one", "other", "out", "nothing") else word
        for word in words
    ]

    done = run(*args)

    assert done.exit_code in (0, 1, 2, 3, 4, 5)
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert_harmless(done.stdout)
    assert_harmless(done.stderr)
    if "junit" in words:
        ElementTree.fromstring(done.stdout)
    if "json" in words[-1]:
        json.loads(done.stdout)


def test_a_card_holds_no_markup_from_a_checkpoint(tmp_path: Path) -> None:
    """Neither from the config nor from names of tensors and folders that its notes mention."""
    markup = "x\n\n# Heading\n<script>alert(1)</script>\n[a](javascript:b) ![c](d) | \x1b]0;pwn\x07"
    hf = tmp_path / "hf"
    shutil.copytree(HF, hf)
    config = json.loads((hf / "config.json").read_text())
    config["architectures"] = ["Olmo2ForCausalLM", markup]
    config["_name_or_path"] = "owner/x\n---\nlicense: evil"
    (hf / "config.json").write_text(json.dumps(config))

    done = run("consolidate", CHECKPOINT, tmp_path / "out", "--config", hf)

    assert done.exit_code == 0, done.output
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# Olmo2ForCausalLM\n" in card
    for part in ("Heading", "script", "javascript", "license", "\x1b"):
        assert part not in card
    assert load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("odd", ["text", 5, [5], {"a": 1}, [None], [["Olmo2ForCausalLM"]]])
def test_architectures_that_are_no_list_of_names_are_damage(odd: object, tmp_path: Path) -> None:
    config = json.loads((HF / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": odd}))

    done = run("consolidate", CHECKPOINT, tmp_path / "out", "--config", tmp_path)

    assert done.exit_code == 4
    assert "its `architectures` are not a list of names" in done.stderr
