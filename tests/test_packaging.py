"""What is installed: the distributions, and the commands where PEFT and accelerate are absent or broken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import FIXTURES

ROOT = FIXTURES.parent
PEFT = FIXTURES / "peft"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution and the wheel, built from a copy by the backend that pyproject.toml names."""
    root = tmp_path_factory.mktemp("build")
    for name in (
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "constraints.txt",
    ):
        shutil.copy(ROOT / name, root)
    shutil.copytree(
        ROOT / "ckpt_tools", root / "ckpt_tools", ignore=shutil.ignore_patterns("__pycache__")
    )
    (root / "tests").mkdir()
    (root / "tests" / "test_x.py").write_text("")
    script = "import setuptools.build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True, capture_output=True)
    return root / "dist"


def test_the_distributions_hold_the_package_and_no_tests(distributions: Path) -> None:
    (source,), (wheel,) = distributions.glob("*.tar.gz"), distributions.glob("*.whl")
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "ckpt_tools").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as held:
        names = {name for name in held.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in held.namelist() if name.endswith("/METADATA"))
        text = held.read(metadata).decode()
    assert names == wanted
    with tarfile.open(source) as held:
        files = {name.partition("/")[2] for name in held.getnames()}
    assert wanted <= files
    assert not [name for name in files if name.startswith(("tests", "fixtures"))]
    always = [
        line
        for line in text.splitlines()
        if line.startswith("Requires-Dist") and "extra" not in line
    ]
    assert not [line for line in always if "peft" in line or "accelerate" in line]
    assert "Project-URL: Documentation" in text


# Runs command lines in one process, and prints what each one printed.
_PROGRAM = textwrap.dedent(
    """
    import json, sys
    from click.testing import CliRunner
    from ckpt_tools.cli import cli

    answers = []
    for words in json.load(sys.stdin):
        done = CliRunner().invoke(cli, words)
        answers.append([done.exit_code, done.output, repr(done.exception)])
    json.dump(answers, sys.stdout)
    """
)


def answers(commands: list[list[Any]], first: Path) -> list[tuple[int, str, str]]:
    """What each command does where ``first`` is looked into before the installed packages."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        input=json.dumps([[str(word) for word in words] for words in commands]),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(first)},
    )
    return [tuple(answer) for answer in json.loads(done.stdout)]


def test_without_peft_and_accelerate_the_commands_run(tmp_path: Path) -> None:
    """Absent as an environment without the extras has them: an import fails, and nothing is found."""
    absent = "import sys\nsys.modules['peft'] = sys.modules['accelerate'] = None\n"
    (tmp_path / "sitecustomize.py").write_text(absent)
    lora, ia3 = PEFT / "zero2-olmo2-lora", PEFT / "zero2-olmo2-ia3"
    adapter = lora / "truth" / "adapter"

    inspected, extracted, refused, merged, verified, loaded, difference = answers(
        [
            ["inspect", lora / "checkpoint"],
            [
                *("extract-lora", lora / "checkpoint", tmp_path / "lora"),
                *("--config", lora / "hf", "--adapter-config", adapter),
            ],
            [
                *("extract-lora", ia3 / "checkpoint", tmp_path / "ia3", "--config", ia3 / "hf"),
                *("--adapter-config", ia3 / "truth" / "adapter"),
            ],
            [
                *("merge-lora", lora / "checkpoint", tmp_path / "merged"),
                *("--config", lora / "hf", "--adapter-config", adapter),
            ],
            ["verify", tmp_path / "lora"],
            ["verify", tmp_path / "lora", "--load", "--base", tmp_path / "merged"],
            ["diff", tmp_path / "lora", adapter],
        ],
        tmp_path,
    )

    assert inspected[0] == 0, inspected
    assert extracted[0] == 0, extracted
    assert "PEFT was not asked: the package `peft` is not installed" in extracted[1]
    assert 'pip install "ckpt-tools[peft]"' in extracted[1]
    assert refused[0] == 5, refused
    assert "the package `peft` is not installed" in refused[1]
    assert 'Install it with pip install "ckpt-tools[peft]".' in refused[1]
    assert merged[0] == 0, merged
    assert verified[0] == 0, verified
    assert "whether PEFT has the type LORA" in verified[1]
    assert loaded[0] == 0, loaded
    assert "the package `peft` is not installed: pip install" in " ".join(loaded[1].split())
    assert difference[0] == 0, difference


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"peft/__init__.py": "raise RuntimeError('half an installation')"},
            "half an installation",
        ),
        (
            {"peft/__init__.py": "", "peft/utils/peft_types.py": "class PeftType(:\n"},
            "cannot import name",
        ),
        ({"peft.py": "raise ImportError('an old file')"}, "an old file"),
    ],
    ids=["fails", "half", "a file"],
)
def test_a_broken_peft_is_not_the_fault_of_the_directory(
    files: dict[str, str], said: str, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / "first" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "first" / name).write_text(text)
    lora = PEFT / "zero2-olmo2-lora"
    adapter = tmp_path / "adapter"
    shutil.copytree(lora / "truth" / "adapter", adapter)

    structure, loaded = answers(
        [
            ["verify", adapter, "--json"],
            ["verify", adapter, "--load", "--base", lora / "truth" / "merged", "--json"],
        ],
        tmp_path / "first",
    )

    for status, output, error in (structure, loaded):
        assert error in ("None", "SystemExit(0)"), (status, output, error)
        (directory,) = json.loads(output)["directories"]
        assert directory["unchecked"] is None, directory
        assert not [p for p in directory["problems"] if p["severity"] == "error"], directory
    assert said in loaded[1]
