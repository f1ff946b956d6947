"""`inspect` of files that are no files, and of names without end."""

from __future__ import annotations

import json
import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ckpt_tools.analysis.inspection import inspect
from ckpt_tools.errors import CkptError


def safetensors(*names: str) -> bytes:
    held = {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}
    header = json.dumps(held).encode()
    return struct.pack("<Q", len(header)) + header


@pytest.fixture(autouse=True)
def ends() -> Iterator[None]:
    """A pipe that nobody writes to would be waited for without end."""

    def fail(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", ["config.json", "trainer_state.json"])
def test_a_pipe_or_device_beside_weights_is_not_read(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors("w"))
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")

    assert not inspect(tmp_path).problems


def test_a_pipe_as_config_of_ranks_is_damage(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1)}, tmp_path / "model_world_size_1_rank_0.pt")
    os.mkfifo(tmp_path / "fsdp_config.json")

    assert any("not a regular file" in problem for problem in inspect(tmp_path).problems)


@pytest.mark.parametrize("name", ["." * 200_000, "base_model.model." * 3_000 + "lora_A.weight"])
def test_a_name_of_many_parts_is_refused(name: str, tmp_path: Path) -> None:
    """Each of its parts would be kept with all parts before it."""
    (tmp_path / "model.safetensors").write_bytes(safetensors(name))

    try:
        problems = inspect(tmp_path).problems
    except CkptError as error:
        problems = [str(error)]
    assert any("parts; names of up to 256 are read" in problem for problem in problems)


def test_a_name_of_as_many_parts_as_are_allowed_is_read(tmp_path: Path) -> None:
    names = [".".join(["a"] * 255 + [str(i)]) for i in range(3)]
    (tmp_path / "model.safetensors").write_bytes(safetensors(*names))

    assert not inspect(tmp_path).problems
