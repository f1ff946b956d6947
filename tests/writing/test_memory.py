"""What a model of many small tensors takes in memory, counted by the interpreter: not the kernel's pages."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

from ckpt_tools.readers.containers.safetensors_file import read_safetensors
from ckpt_tools.tensors.dtypes import FLOAT32
from ckpt_tools.writing.header import file_header

COUNT = 5_000


def test_a_tensor_of_a_header_takes_little_when_it_is_written_and_read(tmp_path: Path) -> None:
    """Headers as dictionaries take 1,100 bytes a tensor at the peak when written, and 1,800 when read."""
    path = tmp_path / "model.safetensors"
    layouts = {f"layers.{i}.weight": (FLOAT32, (16, 16)) for i in range(COUNT)}
    tracemalloc.start()
    try:
        header, _ = file_header(layouts, {"format": "pt"})
        written = tracemalloc.get_traced_memory()[1]
        with path.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + COUNT * 1024)
        del header
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        held = read_safetensors(path)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(held.tensors) == COUNT
    assert written < 450 * COUNT
    assert after - before < 400 * COUNT
    assert peak - before < 800 * COUNT
