"""A save takes the memory of its buffers, whatever the size of the model: measured on two sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.ranks.launching import ended, start
from tests.support.training.frameworks import ENVIRONMENT
from tests.support.training.peak import LAYERS

pytestmark = pytest.mark.slow

# Of a model with 50 million parameters and one with 200 million, largest tensors of 4 and 17 million.
WIDTHS = [2048, 4096]
# One thread: a block and a read buffer; and four answers of 4 MiB to others.
BOUND = 64 << 20


@pytest.mark.parametrize("framework", ["fsdp2", "zero3"])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, framework: str) -> None:
    for width in WIDTHS:
        out = tmp_path / str(width)
        out.mkdir()
        command = ["-m", "tests.support.training.peak", out, framework, width]
        run = ended(start([*map(str, command)], ranks=2, environment=ENVIRONMENT))
        assert run.status == 0, run.stderr

        size = (out / "large" / "model.safetensors").stat().st_size
        assert size > LAYERS * width**2 * 2
        for rank in (0, 1):
            told = json.loads((out / f"rank{rank}.json").read_text())
            print(framework, width, told, size)
            assert told["grown"] < BOUND < size // 1.5
