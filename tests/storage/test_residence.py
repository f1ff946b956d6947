"""A file that came from the disk leaves the page cache after it was read; one that was there stays."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from ckpt_tools.storage import residence
from ckpt_tools.storage.places import LocalFile
from ckpt_tools.storage.residence import Residence, is_resident

MIB = 1 << 20
PAGES = 4 * MIB // os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def dropped(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The runs that are dropped: offset and bytes."""
    runs: list[tuple[int, int]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, offset, nbytes, advice: runs.append((offset, nbytes))
    )
    return runs


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x"
    path.write_bytes(bytes(4 * MIB))
    return path


def kernel(pages: int, failed: int = 0) -> Callable[[], SimpleNamespace]:
    """A kernel that has so many pages of every file in its cache."""

    def cachestat(number: object, fd: object, asked: object, found: object, flags: int) -> int:
        ctypes.cast(found, ctypes.POINTER(ctypes.c_uint64))[0] = pages  # type: ignore[arg-type]
        return failed

    return lambda: SimpleNamespace(syscall=cachestat)


def test_what_came_from_the_disk_is_dropped(
    path: Path, dropped: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residence, "_libc", kernel(0))
    files = Residence()
    first = files.open(path)
    # Other threads' reads put pages there; the first look counts.
    monkeypatch.setattr(residence, "_libc", kernel(PAGES))
    second = files.open(path)
    assert first.read_into(memoryview(bytearray(MIB)), 3 * MIB) == MIB
    assert second.read_into(memoryview(bytearray(MIB)), 0) == MIB
    assert second.read_into(memoryview(bytearray(1000)), 5) == 1000
    assert dropped == [(MIB, 3 * MIB), (0, MIB)]
    first.close()
    second.close()


def test_what_was_there_stays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residence, "_libc", kernel(PAGES // 2))
    assert type(Residence().open(path)) is LocalFile


def test_a_kernel_without_the_call_drops_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residence, "_libc", kernel(0, failed=-1))
    with path.open("rb") as stream:
        assert is_resident(stream.fileno())


def test_the_real_call_counts_pages(path: Path) -> None:
    with path.open("rb") as stream:
        found, every = residence._Cached(), residence._Range(0, 0)
        failed = residence._libc().syscall(
            ctypes.c_long(residence._CACHESTAT),
            ctypes.c_int(stream.fileno()),
            ctypes.byref(every),
            ctypes.byref(found),
            0,
        )
        assert failed or 0 <= found.resident <= PAGES
        assert isinstance(is_resident(stream.fileno()), bool)
