"""Bytes of a store that are cast stay in the memory in which they arrive, in requests as long as it likes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.storage.naming import as_path
from ckpt_tools.storage.remote import failures
from ckpt_tools.storage.remote.ranges import REMOTE
from ckpt_tools.tensors.catalogue import FlatRange, Fragment, Stored, Tensor
from ckpt_tools.tensors.checksums import ReadLog
from ckpt_tools.tensors.derived import cast
from ckpt_tools.tensors.dtypes import BFLOAT16, FLOAT32
from ckpt_tools.tensors.gather import Gatherer
from ckpt_tools.tensors.requests import Slice
from tests.support.remote.web import Asked, Web, serving

# Two requests, of which the second is short.
TRUTH = torch.arange((REMOTE.nbytes + 4096) // 4, dtype=torch.float32) / 7
FILE = "weights.bin"
RANGES = [(0, REMOTE.nbytes), (REMOTE.nbytes, TRUTH.nbytes)]


@pytest.fixture(autouse=True)
def _file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "_SHORTEST_PAUSE", 0.001)
    (tmp_path / FILE).write_bytes(TRUTH.numpy().tobytes())


def there(web: Web) -> Tensor:
    """The tensor in the store."""
    fragment = Fragment(as_path(f"{web.url}/{FILE}"), 0, FlatRange(0, TRUTH.numel()))
    web.asked.clear()
    return Stored(FLOAT32, tuple(TRUTH.shape), [fragment])


def ranges_of(web: Web) -> list[tuple[int, int]]:
    return sorted((asked.start, asked.stop) for asked in web.asked)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_what_is_asked_for_early_is_asked_for_once(dtype: object, tmp_path: Path) -> None:
    log = ReadLog()
    with serving(tmp_path) as web, Gatherer(log) as gatherer:
        tensor = there(web) if dtype is FLOAT32 else cast(there(web), BFLOAT16)
        buffer = bytearray(tensor.nbytes)
        slices = (Slice(tensor, 0, tensor.numel, 0),)
        gatherer.begin(buffer, slices)
        for request in gatherer._begun[id(slices)].requests:
            assert request.arriving is not None
            request.arriving.result()
        assert ranges_of(web) == RANGES
        assert not any(buffer)
        gatherer.fill(buffer, slices)
        assert ranges_of(web) == RANGES
        assert not gatherer._scratch
    truth = TRUTH if dtype is FLOAT32 else TRUTH.bfloat16()
    assert torch.equal(torch.frombuffer(buffer, dtype=truth.dtype), truth)
    ((start, stop, _),) = log.runs(log.files[0])
    assert (start, stop) == (0, TRUTH.nbytes)


def test_every_range_demands_the_version_that_was_seen_first(tmp_path: Path) -> None:
    """A store that checks it sends no bytes of another version."""
    with serving(tmp_path) as web:
        assert torch.equal(cast(there(web), BFLOAT16).load(), TRUTH.bfloat16())
        (version,) = {asked.version for asked in web.asked}
    assert version is not None


def test_an_answer_that_breaks_off_is_asked_for_again(tmp_path: Path) -> None:
    begun: set[int] = set()

    def fault(asked: Asked) -> str | None:
        if asked.start in begun:
            return None
        begun.add(asked.start)
        return "truncate"

    with serving(tmp_path) as web:
        tensor = there(web)
        web.fault = fault
        assert torch.equal(cast(tensor, BFLOAT16).load(), TRUTH.bfloat16())
    assert ranges_of(web) == [each for each in RANGES for _ in range(2)]


def test_a_file_that_changes_between_two_answers_is_refused(tmp_path: Path) -> None:
    """The rest would be of another save."""

    def save_again(path: Path) -> None:
        another = path.with_name("another")
        another.write_bytes(bytes(TRUTH.nbytes))
        another.replace(path)  # at once, as a store does

    def fault(asked: Asked) -> str | None:
        return "change" if asked.start else None

    with serving(tmp_path, change=save_again) as web:
        tensor = there(web)
        web.fault = fault
        with pytest.raises(DamagedCheckpoint, match="changed while it was read"):
            tensor.load()
