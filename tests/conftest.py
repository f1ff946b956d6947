"""What every test needs: no network, and where the shipped checkpoints are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.warm import warm_children

# Before anything imports huggingface_hub, which reads them once. Child processes inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# On a busy machine an example takes longer than hypothesis' limit of 200 ms, and the same examples in every run
# give the same result in every run.
settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The directory of shipped checkpoints; tests read it and never write there."""
    return FIXTURES


@pytest.fixture(scope="session", autouse=True)
def _quick_answers() -> Iterator[None]:
    with warm_children():
        yield
