"""Requests that fail: the output is right, or the run stops with the reason; it is never wrong."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from ckpt_tools import consolidate, inspect
from ckpt_tools.errors import CkptError, DamagedCheckpoint, StoreFailed
from ckpt_tools.storage import patience
from ckpt_tools.storage.remote import failures, ranges
from tests.conftest import FIXTURES
from tests.support.remote.web import Asked, Web, serving

SOURCE = FIXTURES / "zero" / "zero3-bf16-olmo2-chat-2ranks"
SHOWN = "model.safetensors"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "_SHORTEST_PAUSE", 0.001)
    monkeypatch.setattr(failures, "_LONGEST_PAUSE", 0.002)


@pytest.fixture(autouse=True)
def _read_as_large_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file is read at once: no request would fail after the first of each file."""
    for name in ("_SMALL_BYTES", "_HEAD_BYTES", "_TAIL_BYTES"):
        monkeypatch.setattr(ranges, name, 4 << 10)


def convert(web: Web, out: Path) -> bytes:
    consolidate(f"{web.url}/checkpoint", out, weights_only=True)
    return (out / SHOWN).read_bytes()


def outcome(web: Web, out: Path, truth: bytes) -> str:
    try:
        data = convert(web, out)
    except DamagedCheckpoint as error:
        clean = "changed while it was read" in error.fact and not out.exists()
        return "stopped" if clean else str(error)
    return "right" if data == truth else "wrong"


def rewritten(path: Path) -> None:
    """The file of another save: the same size, other bytes and another time."""
    data = path.read_bytes()
    path.write_bytes(bytes(byte ^ 1 for byte in data))
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("truth") / "out"
    consolidate(SOURCE / "checkpoint", out, weights_only=True)
    return (out / SHOWN).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["drop", "503", "429", "truncate"])
def test_a_transient_failure_of_every_other_request_is_repeated(
    kind: str, truth: bytes, tmp_path: Path
) -> None:
    with serving(SOURCE, fault=lambda asked: kind if asked.number % 2 == 0 else None) as web:
        assert convert(web, tmp_path / "out") == truth
    assert len(web.asked) > 12


def test_an_object_that_changes_stops_the_run(tmp_path: Path) -> None:
    copied = tmp_path / "source"
    shutil.copytree(SOURCE, copied)
    last = "optim_states.pt"

    def fault(asked: Asked) -> str | None:
        # After its metadata was read.
        return "change" if asked.path.endswith(last) and asked.start > 0 else None

    with (
        serving(copied, fault=fault, change=rewritten) as web,
        pytest.raises(DamagedCheckpoint, match="changed while it was read") as raised,
    ):
        convert(web, tmp_path / "out")
    assert raised.value.exit_code == 4
    assert raised.value.where is not None and raised.value.where.startswith(f"{web.url}/")
    assert not (tmp_path / "out").exists()


def test_a_store_that_goes_silent_ends_the_run_in_time(tmp_path: Path) -> None:
    patience.be_patient(0.05)
    try:
        with (
            serving(SOURCE, fault=lambda asked: "drop" if asked.number > 3 else None) as web,
            pytest.raises(StoreFailed, match=r"did not answer within 0\.05 seconds"),
        ):
            convert(web, tmp_path / "out")
    finally:
        patience.be_patient(1800.0)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_no_fault_makes_a_wrong_output(truth: bytes, tmp_path: Path) -> None:
    """With STORES=1 a hundred faults, otherwise 10."""
    ended = []
    count = 100 if os.environ.get("STORES") else 10
    for seed in range(count):
        chance = random.Random(seed)
        kind = ("drop", "503", "429", "truncate", "change")[seed % 5]
        at = chance.randrange(12)
        copied = tmp_path / f"source-{seed}"
        shutil.copytree(SOURCE, copied)
        fault = lambda asked, at=at, kind=kind: kind if asked.number == at else None  # noqa: E731
        with serving(copied, fault=fault, change=rewritten) as web:
            ended.append(outcome(web, tmp_path / f"out-{seed}", truth))
        assert ended[-1] == "right" or (kind, ended[-1]) == ("change", "stopped"), (seed, kind)
        shutil.rmtree(copied)
    assert ended.count("right") >= count * 4 // 5
    assert "stopped" in ended


def test_a_server_that_refuses_says_so_without_another_attempt(tmp_path: Path) -> None:
    with serving(tmp_path) as web, pytest.raises(CkptError) as raised:
        inspect(f"{web.url}/none")
    assert raised.value.exit_code == 3
