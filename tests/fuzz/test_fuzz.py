"""A sample of `make fuzz`: the same inputs in every run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from ckpt_tools.errors import CkptError
from tests.fuzz.mutation import mutated
from tests.fuzz.targets import FINISHED, TARGETS, Fixture, fixtures, seeds

COUNTS = {
    "unpickler": 3_000,
    "torch_zip": 2_000,
    "safetensors_header": 3_000,
    "dcp_metadata": 300,
    "weight_index": 300,
}


@contextmanager
def kept(data: bytes, tmp_path: Path) -> Iterator[None]:
    """Keep the input of a failure."""
    try:
        with suppress(CkptError):
            yield
    except Exception:
        (tmp_path / "finding").write_bytes(data)
        raise


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_any_bytes_end_with_an_error_of_ours(target: str, tmp_path: Path) -> None:
    generator = random.Random(target)
    inputs = seeds(target)
    for data in inputs:
        with kept(data, tmp_path):
            TARGETS[target](data, tmp_path)
    for _ in range(COUNTS[target]):
        data = mutated(generator.choice(inputs), generator)
        with kept(data, tmp_path):
            TARGETS[target](data, tmp_path)


@pytest.mark.slow
def test_any_change_of_a_checkpoint_ends_with_an_error_of_ours(tmp_path: Path) -> None:
    generator = random.Random("fixtures")
    for source in fixtures():
        copy = Fixture(source, tmp_path)
        for _ in range(2):
            file = generator.choice(copy.small)
            data = mutated(file.read_bytes(), generator)
            with kept(data, tmp_path):
                copy.try_with(file, data)


@pytest.mark.slow
def test_any_change_of_a_finished_directory_ends_with_a_verdict(tmp_path: Path) -> None:
    generator = random.Random("finished")
    copy = Fixture(FINISHED, tmp_path, finished=True)
    for _ in range(400):
        file = generator.choice(copy.small)
        data = mutated(file.read_bytes(), generator)
        with kept(data, tmp_path):
            copy.try_with(file, data)
