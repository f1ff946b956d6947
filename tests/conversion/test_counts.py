"""What a conversion costs that can be counted: bytes read and written, requests, buffers, imports."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import ckpt_tools
from ckpt_tools.storage.places import LOCAL
from ckpt_tools.tensors import gather
from ckpt_tools.writing import bytes as writer

CASE = Path(__file__).parents[2] / "fixtures" / "zero" / "zero3-bf16-olmo2-chat-2ranks"
WORKERS = 2


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts of the requests of the mover, and of what it writes."""
    counts: Counter[str] = Counter()
    read, write, close = gather._read, writer.Outputs.write, gather.Gatherer.close

    def reading(file: Any, request: Any, into: memoryview) -> None:
        counts["requests"] += 1
        counts["read"] += len(into)
        read(file, request, into)

    def writing(self: Any, file: int, data: memoryview, offset: int) -> None:
        counts["writes"] += 1
        counts["written"] += len(data)
        write(self, file, data, offset)

    def closing(self: Any) -> None:
        counts["scratch"] = max(counts["scratch"], len(self._scratch))
        close(self)

    monkeypatch.setattr(gather, "_read", reading)
    monkeypatch.setattr(writer.Outputs, "write", writing)
    monkeypatch.setattr(gather.Gatherer, "close", closing)
    return counts


def converted(out: Path, **options: Any) -> dict[str, Any]:
    return ckpt_tools.consolidate(
        CASE / "checkpoint",
        out,
        config=CASE / "hf",
        tokenizer=CASE / "hf",
        check_all_masters=False,
        workers=WORKERS,
        **options,
    ).to_json()


@pytest.mark.parametrize(("dtype", "itemsize"), [("bf16", 2), ("fp32", 4)])
def test_each_byte_is_moved_once(
    tmp_path: Path, counted: Counter[str], dtype: str, itemsize: int
) -> None:
    report = converted(tmp_path / "out", dtype=dtype)
    parameters = report["parameters"]
    moved = report["bytes_read"]
    # Gaps of at most 64 KiB between two runs of a file are read too; here they are the paddings of ranks.
    assert 4 * parameters <= moved < 4 * parameters * 1.02
    assert counted["written"] == itemsize * parameters
    # Two files, one run of neighbours in each, in each block.
    assert counted["writes"] == 1
    assert counted["requests"] <= 2 + 2
    assert counted["scratch"] <= WORKERS * LOCAL.nbytes


@pytest.mark.slow
def test_looking_imports_no_torch(tmp_path: Path) -> None:
    """`inspect`, `verify` of the structure and `diff` without common tensors read headers and metadata alone.

    Only verify imports numpy. A difference of common tensors needs torch: the count sees an import.
    """
    converted(tmp_path / "out", dtype="bf16")
    others = {"a": (2, 2), "b": (2, 3), "c": (2, 2)}
    for name, shape in others.items():
        save_file({"weight": torch.zeros(shape)}, tmp_path / f"{name}.safetensors")
    a, b, c = (str(tmp_path / f"{name}.safetensors") for name in others)
    program = (
        "import contextlib, sys\n"
        "from ckpt_tools.cli import cli\n"
        "def loaded_by(*arguments):\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        cli.main(arguments, standalone_mode=False)\n"
        "    return sorted({'torch', 'numpy', 'transformers'} & sys.modules.keys())\n"
        f"inspect = loaded_by('inspect', {str(CASE / 'checkpoint')!r})\n"
        f"diff = loaded_by('diff', {a!r}, {b!r})\n"
        f"verify = loaded_by('verify', {str(tmp_path / 'out')!r})\n"
        f"read = loaded_by('diff', {a!r}, {c!r})\n"
        "print('loaded:', inspect, diff, verify, 'torch' in read)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ
    )
    assert run.stdout.splitlines()[-1] == "loaded: [] [] ['numpy'] True"
