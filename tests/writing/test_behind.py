"""Written bytes are sent to the disk at once, and few of them are on the way."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ckpt_tools.errors import OutputFailed
from ckpt_tools.writing import behind
from ckpt_tools.writing.behind import Behind
from ckpt_tools.writing.layout import plan
from tests.writing.test_bytes import on_disk, write_all

WRITE, WAIT = 2, 7
Call = tuple[int, int, int]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The calls of sync_file_range and of posix_fadvise (-1), in order."""
    made: list[Call] = []

    def sync_range(fd: int, offset: int, nbytes: int, flags: int) -> bool:
        made.append((flags, offset, nbytes))
        return True

    monkeypatch.setattr(behind, "sync_range", sync_range)
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, offset, nbytes, advice: made.append((-1, offset, nbytes))
    )
    return made


def answering(number: int) -> Callable[..., int]:
    def call(*_: object) -> int:
        ctypes.set_errno(number)
        return -1

    return call


def test_only_a_window_is_on_the_way(
    tmp_path: Path, calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(behind, "WINDOW_BYTES", 200)
    path = tmp_path / "x"
    path.write_bytes(bytes(400))
    one = Behind(path)
    for offset in range(0, 400, 100):
        one.wrote(offset, 100)
    one.synced()
    one.close()
    assert calls == [
        (WRITE, 0, 100),
        (WRITE, 100, 100),
        (WRITE, 200, 100),
        (WAIT, 0, 100),
        (-1, 0, 100),
        (WRITE, 300, 100),
        (WAIT, 100, 100),
        (-1, 100, 100),
        (-1, 0, 0),
    ]


def test_every_byte_of_a_write_is_sent_and_every_file_is_dropped(
    tmp_path: Path, calls: list[Call]
) -> None:
    values = torch.arange(300_000, dtype=torch.float32)
    layout = plan(
        on_disk(tmp_path / "source", {"a": values, "b": -values}), max_shard_size=1_500_000
    )
    (tmp_path / "out").mkdir()
    write_all(layout, tmp_path / "out", workers=2)
    assert len(layout.files) == 2
    assert sum(nbytes for flags, _, nbytes in calls if flags == WRITE) == layout.tensor_bytes
    assert calls[-2:] == [(-1, 0, 0)] * 2


def test_an_error_of_the_disk_ends_the_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = plan(on_disk(tmp_path / "source", {"x": torch.ones(1000)}))
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(
        behind, "_libc", lambda: SimpleNamespace(sync_file_range=answering(errno.EIO))
    )
    with pytest.raises(OutputFailed, match="Input/output error"):
        write_all(layout, tmp_path / "out")


@pytest.mark.parametrize(
    "libc", [SimpleNamespace(), SimpleNamespace(sync_file_range=answering(errno.ENOSYS))]
)
def test_a_system_without_the_call_writes_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, libc: SimpleNamespace
) -> None:
    values = torch.arange(1000, dtype=torch.float32)
    layout = plan(on_disk(tmp_path / "source", {"x": values}))
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(behind, "_libc", lambda: libc)
    write_all(layout, tmp_path / "out")
    assert (tmp_path / "out" / layout.files[0].name).read_bytes().endswith(values.numpy().tobytes())
