"""A rank that fails while all save ends the save everywhere and soon, and no output appears.

The ranks are started by hand: torchrun would end them all by itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ranks.launching import REPOSITORY, contents, free_port
from tests.training.failing import TIMEOUT_SECONDS
from tests.training.frameworks import ENVIRONMENT

RANKS = 3
# The others notice a lost rank when its heartbeats stop.
LIMIT_SECONDS = TIMEOUT_SECONDS + 15
START_SECONDS = 120

pytestmark = pytest.mark.slow


def run(out: Path, *arguments: object) -> list[tuple[int, dict[str, Any]]]:
    """Exit status and report of each rank."""
    shared = {
        **os.environ,
        **ENVIRONMENT,
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    command = [sys.executable, "-m", "tests.training.failing", str(out), *map(str, arguments)]
    ranks = [
        subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        told = [rank.communicate(timeout=START_SECONDS + LIMIT_SECONDS) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    lines = [out.strip().splitlines() for out, _ in told]
    for rank, said, (_, stderr) in zip(ranks, lines, told, strict=True):
        assert said or rank.returncode < 0, stderr
    return [
        (r.returncode, json.loads(said[-1]) if said else {})
        for r, said in zip(ranks, lines, strict=True)
    ]


@pytest.mark.parametrize("framework", ["fsdp2", "ddp"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_raises_ends_all_and_the_next_save_works(
    tmp_path: Path, framework: str, victim: int
) -> None:
    ended = run(tmp_path, framework, "raise", victim)

    for rank, (status, report) in enumerate(ended):
        assert status == 0
        assert report["seconds"] < 15
        assert "the victim's own error" in report["text"]
        assert report["error"] == ("ValueError" if rank == victim else "RankFailed")
    assert {path.name for path in tmp_path.iterdir()} == {"before", "after"}
    assert contents(tmp_path / "before") == contents(tmp_path / "after")


@pytest.mark.parametrize("framework", ["fsdp2", "ddp"])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_is_killed_ends_all(tmp_path: Path, framework: str, victim: int) -> None:
    ended = run(tmp_path, framework, "kill", victim)

    assert ended[victim][0] == -9
    for rank, (_, report) in enumerate(ended):
        if rank != victim:
            assert report["error"] == "RankFailed"
            assert report["seconds"] < LIMIT_SECONDS
    assert not (tmp_path / "failed").exists()
    if victim:  # nobody is left to tidy up after the leader
        assert {path.name for path in tmp_path.iterdir()} == {"before"}
