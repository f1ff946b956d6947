"""A save takes the memory of its buffers, and not that of the model, which is many times as large."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.ranks.launching import ended, start
from tests.support.training.frameworks import ENVIRONMENT
from tests.support.training.peak import LAYERS

pytestmark = pytest.mark.slow

# Of a model with 200 million parameters, its largest tensors of 17 million.
WIDTH = 4096
# One thread: a block and a read buffer; and four answers of 4 MiB to others.
BOUND = 64 << 20


@pytest.mark.parametrize("framework", ["fsdp2", "zero3"])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, framework: str) -> None:
    command = ["-m", "tests.support.training.peak", tmp_path, framework, WIDTH]
    run = ended(start([*map(str, command)], ranks=2, environment=ENVIRONMENT))
    assert run.status == 0, run.stderr

    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert size > LAYERS * WIDTH**2 * 2
    for rank in (0, 1):
        told = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert told["grown"] < BOUND < size // 4
