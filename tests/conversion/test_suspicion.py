"""A pickle that names what no framework writes is converted, because nothing runs, and that is said."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest

from ckpt_tools import consolidate
from ckpt_tools.analysis.inspection import inspect
from ckpt_tools.errors import CkptError, UnsafePickle
from ckpt_tools.readers.containers import suspicion
from ckpt_tools.readers.containers.restricted_pickle import unpickle
from ckpt_tools.readers.containers.torch_file import TorchFile
from tests.cli.test_consolidate import run
from tests.conftest import FIXTURES
from tests.support import damage
from tests.support.hostile import CALLS, call, name, splice, value

FIXTURE = "zero2-bf16-llama-3ranks"


@pytest.fixture
def attacked(tmp_path: Path) -> Path:
    directory = damage.copy_of(FIXTURE, tmp_path)
    path = directory / "mp_rank_00_model_states.pt"
    splice(path, "client_state", CALLS["os.system by REDUCE"](tmp_path / "canary"))
    return path


def test_it_is_a_warning_that_names_file_and_function(attacked: Path, tmp_path: Path) -> None:
    report = consolidate(attacked.parent, tmp_path / "out", weights_only=True)

    (warning,) = [text for text in report.warnings if "no known framework" in text]
    assert warning.startswith(f"{attacked}: ")
    assert "os.system" in warning
    assert not (tmp_path / "canary").exists()


def test_strict_refuses_it(attacked: Path, tmp_path: Path) -> None:
    done = run("consolidate", attacked.parent, tmp_path / "out", "--weights-only", "--strict")

    assert done.exit_code == UnsafePickle.exit_code
    assert "os.system" in done.stderr
    assert not (tmp_path / "out").exists()


def test_inspect_lists_it(attacked: Path) -> None:
    assert inspect(attacked.parent).suspicious == {str(attacked): ["os.system"]}
    assert "suspicious" in run("inspect", attacked.parent).stdout


def test_a_file_that_was_replaced_is_not_suspected_any_more(attacked: Path) -> None:
    assert inspect(attacked.parent).suspicious
    attacked.write_bytes((damage.shards_of(FIXTURE) / attacked.name).read_bytes())

    assert inspect(attacked.parent).suspicious == {}


@pytest.mark.parametrize("attack", CALLS)
def test_every_attack_is_suspicious(attack: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    data = b"\x80\x04" + CALLS[attack](tmp_path / "canary") + b"."
    path.write_bytes(data)
    with contextlib.suppress(CkptError):
        unpickle(io.BytesIO(data), str(path))

    assert suspicion.suspicious([path], tmp_path)


def test_no_shipped_checkpoint_is_suspicious() -> None:
    pickles = [
        path
        for path in FIXTURES.rglob("*")
        if path.suffix in (".pt", ".bin", ".pth", ".pkl") or path.name.endswith(".metadata")
    ]
    for path in pickles:
        if path.name.endswith(".metadata"):
            unpickle(io.BytesIO(path.read_bytes()), str(path))
        else:
            TorchFile(path).load()

    assert len(pickles) > 200
    assert suspicion.suspicious(pickles, FIXTURES) == {}


@pytest.mark.parametrize(
    ("module", "named", "expected"),
    [
        ("__main__", "Config", True),
        ("__main__", "run", False),
        ("my.project", "Outer.Inner", True),
        ("my.project", "Outer.method", False),
        ("subprocess", "Popen", False),
        ("builtins", "eval", False),
        ("__builtin__", "object", True),
        ("torch", "load", False),
        ("torch.hub", "load", False),
        ("torch", "os.system", False),
        ("torch.nn.functional", "silu", True),
        ("torch.nn.functional", "boolean_dispatch.__globals__", False),
        ("numpy", "load", False),
        ("numpy._core.multiarray", "scalar", True),
        ("pathlib", "PosixPath", True),
        ("pathlib", "os.system", False),
    ],
)
def test_what_is_expected(module: str, named: str, expected: bool) -> None:
    assert suspicion.is_expected(module, named) == expected


def test_a_call_of_what_nobody_knows_is_listed_once(tmp_path: Path) -> None:
    path = tmp_path / "x"
    data = b"\x80\x02" + call(name("os", "system"), value("id")) * 2 + b"\x86."
    path.write_bytes(data)
    unpickle(io.BytesIO(data), str(path))

    assert suspicion.suspicious([path], tmp_path) == {str(path): ["os.system"]}
