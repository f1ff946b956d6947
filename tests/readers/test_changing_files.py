"""Files that grow, shrink or are replaced while their metadata is read, or between that and a conversion."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckpt_tools import average, consolidate, merge_lora, open_checkpoint, readers
from ckpt_tools.errors import DamagedCheckpoint
from tests.conftest import FIXTURES

CHECKPOINTS = {
    "deepspeed": "zero/zero2-bf16-llama-3ranks/checkpoint",
    "torch-dcp": "dcp/fsdp2-model-3ranks/checkpoint",
    "rank-files": "rank_files/verl-fsdp2-bf16-2ranks/checkpoint",
    "accelerate": "accelerate/fsdp2-sharded-3ranks/checkpoint",
    "huggingface": "zero/zero2-bf16-llama-3ranks/truth",
}


def grown(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b"\0")


def shrunk(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replaced(path: Path) -> None:
    """By a file of the same size and time."""
    facts, content = path.stat(), path.read_bytes()
    other = path.with_name("other")
    other.write_bytes(content)
    os.utime(other, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    other.replace(path)


CHANGES = [grown, shrunk, replaced]


def copied(case: str, directory: Path) -> Path:
    copy = directory / "checkpoint"
    shutil.copytree(FIXTURES / case, copy)
    for path in copy.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return copy


def victim_of(location: Any) -> Path:
    """The largest file of a checkpoint."""
    files = readers.read(location).files
    return max(files, key=lambda path: files[path])


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_file_that_changes_while_metadata_is_read_is_the_reason(
    case: str, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = readers.locate(copied(CHECKPOINTS[case], tmp_path))
    victim, reader = victim_of(location), readers.readers()[location.format]
    read = reader.read
    change: list[Callable[[Path], None]] = []

    def changing(where: Any) -> Any:
        if when == "before":
            change[0](victim)
            return read(where)
        done = read(where)
        change[0](victim)
        return done

    monkeypatch.setattr(reader, "read", changing)
    for each in CHANGES:
        content = victim.read_bytes()
        change[:] = [each]
        with pytest.raises(DamagedCheckpoint, match="changed while they were read") as caught:
            readers.read(location)
        assert victim.name in caught.value.fact
        victim.write_bytes(content)


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_file_that_changed_after_it_was_opened_is_refused(case: str, tmp_path: Path) -> None:
    source, out = copied(CHECKPOINTS[case], tmp_path), tmp_path / "out"
    for change in CHANGES:
        opened = open_checkpoint(source)
        victim = victim_of(opened.location)
        content = victim.read_bytes()
        change(victim)
        with pytest.raises(DamagedCheckpoint, match="changed while they were read") as caught:
            consolidate(opened, out, weights_only=True)
        assert caught.value.path == victim
        assert not out.exists()
        victim.write_bytes(content)


@pytest.mark.parametrize("change", CHANGES)
def test_average_and_merge_lora_refuse_sources_that_change(
    change: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckpt_tools.writing import delivery

    zero = copied("zero/zero2-bf16-llama-3ranks/checkpoint", tmp_path / "zero")
    case = FIXTURES / "zero" / "zero3-bf16-olmo2-lora-2ranks"
    lora = copied("zero/zero3-bf16-olmo2-lora-2ranks/checkpoint", tmp_path / "lora")
    shares = delivery.write_shares
    victims = [victim_of(open_checkpoint(path).location) for path in (zero, lora)]

    def then(*arguments: Any) -> Any:
        done = shares(*arguments)
        for victim in victims:
            change(victim)
        return done

    monkeypatch.setattr(delivery, "write_shares", then)
    with pytest.raises(DamagedCheckpoint):
        average([zero, zero], tmp_path / "out", weights_only=True)
    with pytest.raises(DamagedCheckpoint):
        merge_lora(lora, tmp_path / "out", adapter_config=case / "hf", weights_only=True)
    assert not (tmp_path / "out").exists()
