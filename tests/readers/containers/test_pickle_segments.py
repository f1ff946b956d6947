"""Objects that are alike are passed at once, and nothing that a limit refuses is passed with them."""

from __future__ import annotations

import io
import pickle

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ckpt_tools.readers.containers.pickle_limits import Followed, follow
from ckpt_tools.readers.containers.pickle_segments import Segments
from tests.readers.containers.test_pickle_limits import shipped_pickles

ALIKE = 50


def entries(count: int) -> bytes:
    """What the metadata of a checkpoint has of so many tensors."""
    saved, places = {}, {}
    for i in range(count):
        name, size = f"layers.{i}.weight" + "x" * (i % 7), torch.Size([i * 40, 64])
        chunks = [ChunkStorageMetadata(torch.Size([0, 0]), size)]
        properties = TensorProperties(dtype=torch.bfloat16)
        saved[name] = TensorStorageMetadata(properties, size, chunks)
        places[MetadataIndex(name, size, i)] = _StorageInfo(f"__{i % 8}_0.distcp", i * 900, 900)
    return pickle.dumps((saved, places))


def facts(data: bytes) -> Followed | str:
    try:
        return follow(io.BytesIO(data))
    except (pickle.UnpicklingError, EOFError) as error:
        return repr(error)


def at_each_opcode(data: bytes, monkeypatch: pytest.MonkeyPatch) -> Followed | str:
    with monkeypatch.context() as patched:
        patched.setattr(Segments, "pass_on", lambda _, at, *rest: at)
        return facts(data)


def alike(found: Followed | str, expected: Followed | str) -> bool:
    if isinstance(found, str) or isinstance(expected, str):
        return found == expected
    return (
        found.odd_keys,
        found.data,
        found.is_odd,
        found.has_containers,
        sorted(found.shares),
    ) == (
        expected.odd_keys,
        expected.data,
        expected.is_odd,
        expected.has_containers,
        sorted(expected.shares),
    )


def test_most_of_the_metadata_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = 0
    pass_on = Segments.pass_on

    def counted(self: Segments, at: int, *rest: list[int]) -> int:
        nonlocal passed
        after = pass_on(self, at, *rest)
        passed += after - at
        return after

    data = entries(2000)
    expected = at_each_opcode(data, monkeypatch)
    monkeypatch.setattr(Segments, "pass_on", counted)

    assert alike(follow(io.BytesIO(data)), expected)
    assert passed > len(data) * 0.8


def test_every_shipped_pickle_has_the_same_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    for data in shipped_pickles():
        assert alike(facts(data), at_each_opcode(data, monkeypatch))


def test_a_truncated_or_changed_pickle_has_the_same_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    data = entries(60)
    for at in range(len(data) // 2, len(data), 41):
        changed = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        for each in (data[:at], changed):
            assert alike(facts(each), at_each_opcode(each, monkeypatch)), at


def objects(keys: list[int]) -> bytes:
    """Objects whose state has one key each, the value that the memo has at an index.

    Index 2 of the memo is a text, index 15 a tuple that expands to thousands of items.
    """
    nest = b"".join(bytes([*b"h", i, *b"h", i]) + b"\x86\x94" for i in range(3, 15))
    start = b"\x80\x04c__main__\nA\n\x94N\x94\x8c\x01k\x94N\x94" + nest
    each = b"j\0\0\0\0)\x81}(j%cK\x01ub"
    return start + b"".join(each.replace(b"%c", key.to_bytes(4, "little")) for key in keys) + b"."


@pytest.mark.parametrize("place", [ALIKE - 1, ALIKE - 4, ALIKE - 9])
def test_a_large_key_among_alike_objects_is_refused(place: int) -> None:
    keys = [2] * ALIKE
    assert list(follow(io.BytesIO(objects(keys))).shares).count(0) == ALIKE
    keys[place] = 15

    with pytest.raises(pickle.UnpicklingError, match="not a plain value, or too large"):
        follow(io.BytesIO(objects(keys)))


def test_what_an_object_shares_is_counted_among_alike_objects() -> None:
    """A value of the memo that is not plain has a further place wherever an object refers to it."""
    keys = [2] * ALIKE
    keys[-3] = 4  # a tuple of two

    # The next tuple has it twice.
    assert list(follow(io.BytesIO(objects(keys))).shares).count(4) == 3


def test_an_index_beyond_the_memo_among_alike_objects_is_refused() -> None:
    keys = [2] * ALIKE
    keys[-2] = 99

    with pytest.raises(pickle.UnpicklingError, match="an object that does not exist"):
        follow(io.BytesIO(objects(keys)))
