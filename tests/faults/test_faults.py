"""A sample of `make faults`: a run that is killed, and some kinds of fault. tests/ranks kills ranks."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ckpt_tools.errors import OutputFailed
from ckpt_tools.writing.bytes import write_all


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler builds the shim")
def test_kills_and_faults_leave_nothing_wrong() -> None:
    root = Path(__file__).resolve().parents[2]
    words = ["--kills", "1", "--faults", "4", "--ranks", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", *words],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kills, 4 faults, 0 ranks, 0 failures" in done.stdout


def test_a_disk_that_takes_no_bytes_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.pwrite", lambda *_: 0)

    with pytest.raises(OutputFailed, match="takes no bytes"):
        write_all(0, b"x", 0, tmp_path)
