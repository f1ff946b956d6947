"""What a state is called as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt_tools.errors import UsageError
from ckpt_tools.model.state import main_dtype
from ckpt_tools.tensors.catalogue import FlatRange, Fragment, Stored
from ckpt_tools.tensors.dtypes import BFLOAT16, BY_NAME, FLOAT32, DType


def tensor(dtype: DType, numel: int) -> Stored:
    fragments = [Fragment(Path("file"), 0, FlatRange(0, numel))] if numel else []
    return Stored(dtype, (numel,), fragments)


def test_the_dtype_is_that_of_most_elements_and_not_of_most_tensors() -> None:
    norms = {f"norm.{number}": tensor(FLOAT32, 4) for number in range(5)}
    assert main_dtype({**norms, "w": tensor(BFLOAT16, 100)}) == BFLOAT16
    assert main_dtype({**norms, "w": tensor(BFLOAT16, 19)}) == FLOAT32


def test_integers_do_not_count_and_tensors_without_elements_do() -> None:
    counters = {"steps": tensor(BY_NAME["int64"], 1000)}
    assert main_dtype({**counters, "w": tensor(BFLOAT16, 1)}) == BFLOAT16
    assert main_dtype({**counters, "w": tensor(FLOAT32, 0)}) == FLOAT32
    with pytest.raises(UsageError, match="no floating-point tensor"):
        main_dtype(counters)
