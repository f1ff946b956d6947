"""A sample of `make fuzz`: the same inputs in every run, which take 60 seconds of processor time in all.

The counts are those that take this time on a processor of 2023; nothing is measured while the tests run.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path

import pytest

from ckpt_tools.errors import CkptError
from tests.fuzz.mutation import mutated
from tests.fuzz.targets import FINISHED, TARGETS, Fixture, fixtures, seeds

# The inputs of a part, and the parts, of which several may run at a time.
SAMPLES = {
    "unpickler": (4_000, 3),
    "torch_zip": (2_500, 3),
    "safetensors_header": (12_500, 2),
    "dcp_metadata": (500, 2),
    "weight_index": (3_000, 1),
}
PARTS = [(target, part) for target in TARGETS for part in range(SAMPLES[target][1])]


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
@pytest.mark.parametrize(("target", "part"), PARTS)
def test_any_bytes_end_with_an_error_of_ours(target: str, part: int, tmp_path: Path) -> None:
    generator = random.Random(f"{target} {part}")
    inputs = seeds(target)
    changed = (mutated(generator.choice(inputs), generator) for _ in range(SAMPLES[target][0]))
    for data in chain(inputs, changed):
        with kept(data, tmp_path):
            TARGETS[target](data, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2))
def test_any_change_of_a_checkpoint_ends_with_an_error_of_ours(part: int, tmp_path: Path) -> None:
    generator = random.Random(f"fixtures {part}")
    for source in islice(fixtures(), part, None, 2):
        copy = Fixture(source, tmp_path)
        for _ in range(5):
            file = generator.choice(copy.small)
            data = mutated(file.read_bytes(), generator)
            with kept(data, tmp_path):
                copy.try_with(file, data)
        shutil.rmtree(copy.path)


@pytest.mark.slow
def test_any_change_of_a_finished_directory_ends_with_a_verdict(tmp_path: Path) -> None:
    generator = random.Random("finished")
    copy = Fixture(FINISHED, tmp_path, finished=True)
    for _ in range(1_250):
        file = generator.choice(copy.small)
        data = mutated(file.read_bytes(), generator)
        with kept(data, tmp_path):
            copy.try_with(file, data)
