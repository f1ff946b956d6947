"""A long answer is put in place while it arrives, and continued where it broke off."""

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
from tests.support.remote.web import Web, serving

# Two requests, of which the second is short.
TRUTH = torch.arange((REMOTE.nbytes + 4096) // 4, dtype=torch.float32) / 7
FILE = "weights.bin"


@pytest.fixture(autouse=True)
def _file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "_SHORTEST_PAUSE", 0.001)
    (tmp_path / FILE).write_bytes(TRUTH.numpy().tobytes())


def there(web: Web) -> Tensor:
    """The tensor in the store, as 16-bit numbers."""
    fragment = Fragment(as_path(f"{web.url}/{FILE}"), 0, FlatRange(0, TRUTH.numel()))
    return cast(Stored(FLOAT32, tuple(TRUTH.shape), [fragment]), BFLOAT16)


def test_a_request_is_as_long_as_the_store_likes_and_its_buffer_is_not(tmp_path: Path) -> None:
    log = ReadLog()
    with serving(tmp_path) as web, Gatherer(log) as gatherer:
        tensor = there(web)
        web.asked.clear()
        buffer = bytearray(tensor.nbytes)
        gatherer.fill(buffer, [Slice(tensor, 0, tensor.numel, 0)])
        held = len(gatherer._scratch)
    assert torch.equal(torch.frombuffer(buffer, dtype=torch.bfloat16), TRUTH.bfloat16())
    asked = sorted((asked.start, asked.stop) for asked in web.asked)
    assert asked == [(0, REMOTE.nbytes), (REMOTE.nbytes, TRUTH.nbytes)]
    assert held <= REMOTE.scratch_bytes
    ((start, stop, _),) = log.runs(log.files[0])
    assert (start, stop) == (0, TRUTH.nbytes)


def test_an_answer_that_broke_off_is_continued(tmp_path: Path) -> None:
    """What is in place stays there, and is not asked for again."""
    with serving(tmp_path) as web:
        tensor = there(web)
        web.asked.clear()
        web.fault = lambda asked: "truncate" if asked.start == 0 else None
        assert torch.equal(tensor.load(), TRUTH.bfloat16())
    again = [asked for asked in web.asked if 0 < asked.start < REMOTE.nbytes]
    # The part that was not complete is asked for again.
    assert [asked.stop for asked in again] == [REMOTE.nbytes]
    assert REMOTE.nbytes // 2 - REMOTE.part_bytes <= again[0].start <= REMOTE.nbytes // 2


def test_a_file_that_changes_between_two_answers_is_refused(tmp_path: Path) -> None:
    """The rest would be of another save."""

    def fault(asked: object) -> str:
        return "truncate" if len(web.asked) == 1 else "change"

    with serving(tmp_path, change=lambda path: path.write_bytes(bytes(TRUTH.nbytes))) as web:
        tensor = there(web)
        web.asked.clear()
        web.fault = fault
        with pytest.raises(DamagedCheckpoint, match="changed while it was read"):
            tensor.load()
