"""What every test needs: no network, and where the shipped checkpoints are."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import hypothesis
import pytest

from tests.support.answers import share_answers
from tests.support.warm import warm_children

# Before anything imports huggingface_hub, which reads them once. Child processes inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# No test depends on what another run left; tests of the cache name a directory of their own.
os.environ["CKPT_TOOLS_CACHE"] = "off"
share_answers()
# pytest-xdist sets it for its workers; what is printed would depend on their number.
os.environ.pop("COLUMNS", None)

# A shell's nohup lets this process ignore SIGHUP, and a command that it starts goes on after one. Tests send
# the signal to commands as a terminal starts them. A handler of Python keeps this process alive, and is set
# back in a child.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

# By default an example may take 200 ms, which it does where other processes have the processor; generating
# examples has a limit of time too. The same examples in every run give the same result in every run.
hypothesis.settings.register_profile(
    "ckpt-tools",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("ckpt-tools")

# Tests leave little behind that only the collector finds, and it looks through all that pytest has collected:
# a twentieth of the processor.
gc.set_threshold(100_000, 50, 100)

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The directory of shipped checkpoints; tests read it and never write there."""
    return FIXTURES


def pytest_collection(session: pytest.Session) -> None:
    """Let each process of pytest-xdist import another part of the tests first, where all are to be run.

    pytest compiles a module for whoever imports it first, and keeps it for the others. In a fresh clone the
    processes would compile the same module side by side, each of them all of the tests.
    """
    if session.config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    home = Path(__file__).parent
    found = sorted(path.relative_to(home.parent) for path in home.rglob("test_*.py"))
    first = number * len(found) // processes
    for path in found[first:] + found[:first]:
        # What fails here fails again, and is reported, where pytest imports it.
        with contextlib.suppress(Exception, pytest.skip.Exception):
            import_module(".".join(path.with_suffix("").parts))


@pytest.fixture(scope="session", autouse=True)
def _quick_answers() -> Iterator[None]:
    with warm_children():
        yield
