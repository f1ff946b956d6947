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


@pytest.mark.parametrize(("framework", "raising", "killed"), [("fsdp2", 0, 2), ("ddp", 1, 0)])
def test_a_rank_that_raises_or_is_killed_ends_all_and_the_next_save_works(
    tmp_path: Path, framework: str, raising: int, killed: int
) -> None:
    ended = run(tmp_path, framework, raising, killed)

    for rank, (status, reports) in enumerate(ended):
        assert "the victim's own error" in reports[0]["text"]
        assert reports[0]["error"] == ("ValueError" if rank == raising else "RankFailed")
        if rank == killed:
            assert (status, reports[1:]) == (-9, [])
        else:
            assert reports[1]["error"] == "RankFailed"
    assert contents(tmp_path / "before") == contents(tmp_path / "after")
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"before", "after"}
    assert not names & {"raise", "kill"}
    if killed:  # nobody is left to tidy up after the leader
        assert names == {"before", "after"}
