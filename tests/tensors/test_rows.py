"""``tensor[rows]``: torch's own rows, and no byte of the others is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ckpt_tools import open_checkpoint
from ckpt_tools.tensors import rows as rows_module
from ckpt_tools.tensors.catalogue import Tensor
from ckpt_tools.tensors.derived import cast
from ckpt_tools.tensors.dtypes import BFLOAT16
from ckpt_tools.tensors.gather import Gatherer
from tests.conftest import FIXTURES
from tests.tensors.test_gather import columns, in_file

# A slice with a negative step is not an index of torch.
INDICES = [
    0,
    -1,
    slice(2, 5),
    slice(None),
    slice(5, 2),
    slice(0, 7, 3),
    slice(-2, None),
    [4, 0, -1, 4],
    [],
    (slice(1, 4), 2),
    (3, slice(0, 2)),
    ([1, 2], slice(None, None, 2)),
    torch.tensor([5, 0, -2]),
    torch.tensor(3),
    np.array([2, 2]),
    (np.int64(4), slice(1, 3)),
]
TRUTH = torch.arange(7 * 4, dtype=torch.float32).view(7, 4)


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_rows_are_those_of_torch(tmp_path: Path, index: object) -> None:
    for stored in (in_file(tmp_path / "whole.bin", TRUTH, pad=3), columns(tmp_path, TRUTH)):
        for tensor, truth in (
            (stored, TRUTH),
            (cast(stored, BFLOAT16), TRUTH.bfloat16()),
        ):
            found = tensor[index]  # type: ignore[index]
            wanted = truth[index]  # type: ignore[index]
            assert found.dtype == wanted.dtype and found.shape == wanted.shape
            assert torch.equal(found, wanted)


def test_a_negative_step_turns_the_rows(tmp_path: Path) -> None:
    assert torch.equal(in_file(tmp_path / "a.bin", TRUTH)[::-2], TRUTH.flip(0)[::2])


def test_only_the_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Gatherer] = []

    def remembered() -> Gatherer:
        made.append(Gatherer())
        return made[-1]

    monkeypatch.setattr(rows_module, "Gatherer", remembered)
    tensor = in_file(tmp_path / "a.bin", torch.zeros(1000, 50))
    assert tensor[10:12].shape == (2, 50)

    assert [gatherer.bytes_read for gatherer in made] == [2 * 50 * 4]


@pytest.mark.parametrize(
    ("index", "error"), [(7, IndexError), (-8, IndexError), ([0, 9], IndexError)]
)
def test_a_row_that_does_not_exist(tmp_path: Path, index: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="there is no row"):
        in_file(tmp_path / "a.bin", TRUTH)[index]  # type: ignore[index]


@pytest.mark.parametrize(
    "index",
    [True, [True, False], torch.ones(7, dtype=torch.bool), np.array(True), None, "a", 1.5, ...],
    ids=str,
)
def test_what_is_no_row(tmp_path: Path, index: object) -> None:
    with pytest.raises(TypeError):
        in_file(tmp_path / "a.bin", TRUTH)[index]  # type: ignore[index]


def test_a_number_has_no_rows(tmp_path: Path) -> None:
    with pytest.raises(IndexError, match="no rows"):
        in_file(tmp_path / "a.bin", torch.tensor(1.0))[0]


def _kinds(kind: type[Tensor]) -> list[type[Tensor]]:
    return [each for below in kind.__subclasses__() for each in (below, *_kinds(below))]


def test_every_kind_of_tensor_is_shown_by_its_facts(tmp_path: Path) -> None:
    import ckpt_tools.conversion.api  # noqa: F401

    stored = in_file(tmp_path / "secret.bin", TRUTH)

    assert repr(stored) == "<float32 tensor of shape [7, 4], 112 bytes>"
    assert repr(stored.dtype) == repr(torch.float32) and stored.dtype == torch.float32
    ours = [kind for kind in _kinds(Tensor) if kind.__module__.startswith("ckpt_tools.")]
    assert len(ours) > 6
    assert {kind.__repr__ for kind in ours} == {Tensor.__repr__}


def test_a_checkpoint_is_a_table_in_a_notebook() -> None:
    checkpoint = open_checkpoint(FIXTURES / "zero" / "zero3-bf16-olmo2-chat-2ranks" / "checkpoint")

    page = checkpoint._repr_html_()

    assert page.count("<tr>") == 1 + 25
    assert "<td>model.embed_tokens.weight</td><td>parameter</td><td>[379, 24]</td>" in page
    assert "DeepSpeed ZeRO-3, 25 tensors, step 120, 2 ranks" in page


def test_names_do_not_become_markup(tmp_path: Path) -> None:
    torch.save({"<script>alert(1)</script>": torch.zeros(2)}, tmp_path / "state.bin")

    page = open_checkpoint(tmp_path / "state.bin")._repr_html_()

    assert "&lt;script&gt;" in page and "<script>" not in page
