"""A rank that fails while all save ends the save everywhere, and no output appears.

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

from tests.support.outputs import contents
from tests.support.ranks.launching import REPOSITORY, free_port
from tests.support.training.frameworks import ENVIRONMENT

RANKS = 3

pytestmark = pytest.mark.slow


def run(out: Path, *arguments: object) -> list[tuple[int, list[dict[str, Any]]]]:
    """Exit status and reports of each rank."""
    shared = {
        **os.environ,
        **ENVIRONMENT,
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    command = [
        sys.executable,
        "-m",
        "tests.support.training.failing",
        str(out),
        *map(str, arguments),
    ]
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
        told = [rank.communicate() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for _, (stdout, stderr) in zip(ranks, told, strict=True):
        assert stdout, stderr
    return [
        (rank.returncode, [json.loads(line) for line in stdout.splitlines() if line[0] == "{"])
        for rank, (stdout, _) in zip(ranks, told, strict=True)
    ]


def test_a_rank_that_raises_or_is_killed_ends_all_and_the_next_save_works(tmp_path: Path) -> None:
    raising, killed = {"ddp": 1, "fsdp2": 0}, 2

    ended = run(tmp_path, killed, *(f"{name}:{victim}" for name, victim in raising.items()))

    for rank, (status, reports) in enumerate(ended):
        raised, rest = reports[: len(raising)], reports[len(raising) :]
        for victim, report in zip(raising.values(), raised, strict=True):
            assert "the victim's own error" in report["text"]
            assert report["error"] == ("ValueError" if rank == victim else "RankFailed")
        if rank == killed:
            assert (status, rest) == (-9, [])
        else:
            assert [report["error"] for report in rest] == ["RankFailed"]
    for framework in raising:
        before, after = (tmp_path / f"{framework}-{when}" for when in ("before", "after"))
        assert contents(before) == contents(after)
    assert len(list(tmp_path.iterdir())) == 2 * len(raising)
