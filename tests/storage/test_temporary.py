"""A temporary folder is gone when its process has ended, or when the next run has begun."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt_tools.cli.signals import end_on_signals, leave_at_once
from ckpt_tools.storage.temporary import PREFIX, TemporaryFolder, remove_all


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def in_a_child(work: Callable[[], None]) -> int:
    """The wait status of a forked process that does something and ends."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(99)
    return os.waitpid(child, 0)[1]


def kept_by(number: signal.Signals) -> None:
    """Make a folder with a file, and get a signal as a command does."""
    end_on_signals()
    folder = TemporaryFolder()
    (folder.path / "file").write_bytes(b"text")
    try:
        os.kill(os.getpid(), number)
    except SystemExit as end:
        leave_at_once(end.code)


def test_a_folder_is_removed_with_its_block_and_its_process(tmp_path: Path) -> None:
    with TemporaryFolder() as path:
        (path / "file").write_bytes(b"text")
        assert path.parent == tmp_path
    kept = TemporaryFolder()
    # A forked process does not remove what belongs to its parent.
    in_a_child(remove_all)
    assert list(tmp_path.iterdir()) == [kept.path]
    remove_all()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_a_command_leaves_no_folder(
    tmp_path: Path, number: signal.Signals
) -> None:
    assert os.waitstatus_to_exitcode(in_a_child(lambda: kept_by(number))) == 128 + number
    assert list(tmp_path.iterdir()) == []


def test_the_next_run_removes_what_a_killed_one_left_and_no_more(tmp_path: Path) -> None:
    living = TemporaryFolder()
    (tmp_path / f"{PREFIX}file").write_bytes(b"of somebody")
    assert in_a_child(lambda: kept_by(signal.SIGKILL)) == signal.SIGKILL
    (abandoned,) = (p for p in tmp_path.iterdir() if p.is_dir() and p != living.path)
    assert (abandoned / "file").exists()
    with TemporaryFolder():
        assert not abandoned.exists()
        assert living.path.is_dir()
        assert (tmp_path / f"{PREFIX}file").is_file()
    living.remove()
