"""A check is one module: a made-up one, dropped among the checks, is carried out and shown."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckpt_tools import verification
from ckpt_tools.verification import KINDS, verify

# What somebody would add: no tensor may have a name with a capital letter.
CHECK = '''
"""Owns the rule of lower case."""

from ckpt_tools.verification.problem import Kind

ORDER = 25
KINDS = {"name-capital": Kind("warning", "a name with a capital letter")}


def check(run):
    for name, entry in run.directory.tensors.items():
        if name != name.lower():
            run.findings.add("name-capital", f"{name} has a capital", file=entry.file, tensor=name)
    run.findings.checked.append("lower case")
'''


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    tensors = {"lower": torch.ones(2), "Upper": torch.ones(2)}
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model"


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The module lies in a directory of its own that belongs to the package of checks."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "capitals.py").write_text(CHECK)
    monkeypatch.setattr(verification, "__path__", [*verification.__path__, str(tmp_path / "more")])
    verification.checks.cache_clear()
    yield
    verification.checks.cache_clear()
    del sys.modules["ckpt_tools.verification.capitals"]
    del verification.capitals  # type: ignore[attr-defined]
    del KINDS["name-capital"]


@pytest.mark.usefixtures("added")
def test_it_is_carried_out_at_its_place(directory: Path) -> None:
    found = verify(directory)

    (problem,) = [p for p in found.problems if p.kind == "name-capital"]
    assert (problem.severity, problem.file, problem.tensor) == (
        "warning",
        "model.safetensors",
        "Upper",
    )
    assert "lower case" in found.checked
    assert KINDS["name-capital"].meaning == "a name with a capital letter"


def test_without_the_module_nobody_minds(directory: Path) -> None:
    found = verify(directory)

    assert "name-capital" not in {problem.kind for problem in found.problems}
    assert "lower case" not in found.checked


@pytest.mark.slow
def test_the_command_line_needs_the_one_file_and_no_edit(directory: Path, tmp_path: Path) -> None:
    """A copy of the package with one file more."""
    package = Path(verification.__file__).parents[1]
    copy = tmp_path / "site" / "ckpt_tools"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "verification" / "capitals.py").write_text(CHECK)

    done = subprocess.run(
        [sys.executable, "-m", "ckpt_tools", "verify", str(directory), "--format=json"],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    (report,) = json.loads(done.stdout)["directories"]
    assert "name-capital" in {problem["kind"] for problem in report["problems"]}
