"""Several ranks read a directory together, and say of it what one says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import ckpt_tools
from ckpt_tools.verification.reading import share
from ckpt_tools.verification.scan import Piece
from tests.conftest import FIXTURES
from tests.support.ranks.launching import launch

CHAT = FIXTURES / "zero" / "zero3-bf16-olmo2-chat-2ranks"


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_piece_is_read_once_and_ranks_read_the_same_bytes(size: int) -> None:
    pieces = [Piece(f"file{i % 7}", 0, 1000 + 37 * (i % 11)) for i in range(3000)]

    shares = [share(pieces, rank, size) for rank in range(size)]

    assert [piece for part in shares for piece in part] == pieces
    nbytes = [sum(piece.nbytes for piece in part) for part in shares]
    assert max(nbytes) - min(nbytes) < 0.05 * max(nbytes)


@pytest.mark.slow
def test_ranks_find_what_one_process_finds(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ckpt_tools.consolidate(CHAT / "checkpoint", out, config=CHAT / "hf", max_shard_size="8KB")
    shard = sorted(out.glob("model-*.safetensors"))[2]
    content = bytearray(shard.read_bytes())
    content[-100] ^= 4
    shard.write_bytes(content)

    done = launch(["-m", "ckpt_tools", "verify", out, "--read-data", "--format", "json"], ranks=2)

    found: dict[str, Any] = json.loads(done.stdout)
    (told,) = found["directories"]
    alone = ckpt_tools.verify(out, read_data=True)
    assert [problem.kind for problem in alone.problems] == ["digest-mismatch"]
    assert told["problems"] == alone.to_json()["problems"]
    assert done.status != 0
