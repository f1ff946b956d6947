"""Threads are waited for after an error, and not after an interruption."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest

from ckpt_tools.tensors.threads import pool, read_each
from tests.support.waiting import LONGEST_SECONDS, wait_until

SCRIPT = """
from ckpt_tools.cli.signals import end_on_signals, leave_at_once
from ckpt_tools.tensors.threads import {name}

end_on_signals()
try:
    {call}
except KeyboardInterrupt:
    leave_at_once(130)
except SystemExit as end:
    leave_at_once(end.code)
"""
FOREVER = """
import os
open(os.environ["BEGUN"], "w").close()
open(os.environ["NEVER"]).read()
"""
SIGNALS = [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143)]


def test_an_interruption_does_not_wait_for_a_thread_that_works() -> None:
    never = threading.Event()

    def interrupted() -> None:
        with pool(1) as threads:
            threads.submit(never.wait)
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    finally:
        never.set()


def test_an_error_waits_for_threads_and_cancels_what_is_not_begun() -> None:
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    later: list[Future[None]] = []

    def work() -> None:
        begun.set()
        go_on.wait()
        ended.set()

    def failed() -> None:
        with pool(1) as threads:
            threads.submit(work)
            later.append(threads.submit(work))
            begun.wait()
            later[0].add_done_callback(lambda _: go_on.set())
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        failed()
    assert ended.is_set()
    assert later[0].cancelled()


@pytest.mark.parametrize(("number", "status"), SIGNALS)
@pytest.mark.parametrize(
    ("name", "call"),
    [("load_torch", "load_torch()"), ("casting_on_one_core", "casting_on_one_core().__enter__()")],
)
def test_a_signal_ends_a_run_whose_import_of_torch_never_ends(
    tmp_path: Path, number: signal.Signals, status: int, name: str, call: str
) -> None:
    (tmp_path / "torch.py").write_text(FOREVER)
    os.mkfifo(tmp_path / "never")
    here = Path(__file__).resolve().parents[2]
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{here}",
        "BEGUN": str(tmp_path / "begun"),
        "NEVER": str(tmp_path / "never"),
    }
    script = SCRIPT.format(name=name, call=call)
    run = subprocess.Popen([sys.executable, "-c", script], env=environment)
    try:
        wait_until((tmp_path / "begun").exists, run)
        run.send_signal(number)
        assert run.wait() == status
    finally:
        run.kill()


def test_hangups_that_nohup_ignores_stay_ignored() -> None:
    script = (
        "import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN);"
        "from ckpt_tools.cli.signals import end_on_signals; end_on_signals();"
        "os.kill(os.getpid(), signal.SIGHUP); print('went on')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "went on\n"


def test_many_files_are_read_at_once_in_order_and_without_collecting_garbage() -> None:
    meeting = threading.Barrier(4, timeout=LONGEST_SECONDS)

    def read(number: int) -> tuple[int, bool]:
        meeting.wait()
        return -number, gc.isenabled()

    assert gc.isenabled()
    assert read_each(read, range(8)) == [(-number, False) for number in range(8)]
    assert read_each(abs, [-1]) == [1]
    assert gc.isenabled()


def test_the_first_file_that_is_refused_is_the_error() -> None:
    with pytest.raises(ZeroDivisionError):
        read_each(lambda number: 1 // number if number < 5 else [][number], range(9))
    assert gc.isenabled()
