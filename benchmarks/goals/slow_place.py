"""Converts the same tensors from a place that answers slowly, with 1 to 64 requests at a time.

python slow_place.py DIRECTORY
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from ckpt_tools.storage.places import DirectoryPlace, FileFacts, Readable, Requests
from ckpt_tools.storage.pool import Pool
from ckpt_tools.tensors.catalogue import FlatRange, Fragment, Stored
from ckpt_tools.tensors.dtypes import FLOAT32
from ckpt_tools.writing.bytes import Outputs, lay_out, write
from ckpt_tools.writing.layout import plan
from ckpt_tools.writing.units import Units
from goals.raw import add
from goals.slow import DELAY_SECONDS, DEPTHS, NAME, REQUEST_BYTES, WORKERS

FILES, TENSORS = 8, 64
ROWS, WIDTH = 1024, 2048  # 8 MB a tensor, 1 MiB of it in each file


class Slow:
    """A file whose requests take their time."""

    def __init__(self, file: Readable) -> None:
        self._file = file

    def read_into(self, view: memoryview, offset: int) -> int:
        time.sleep(DELAY_SECONDS)
        return self._file.read_into(view, offset)

    def close(self) -> None:
        self._file.close()


class Far:
    """A directory as a place that answers slowly, and states how many requests it likes at a time."""

    def __init__(self, root: Path, depth: int) -> None:
        self._place = DirectoryPlace(root)
        self.label = "a far place"
        self.requests = Requests(REQUEST_BYTES, 64 << 10, depth, WORKERS)

    def listing(self) -> Mapping[str, FileFacts]:
        return self._place.listing()

    def open(self, relative: str) -> Slow:
        return Slow(self._place.open(relative))


def measured(directory: Path) -> None:
    """Convert the same tensors at each depth."""
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        root = Path(scratch, "source")
        root.mkdir()
        part = ROWS * WIDTH // FILES
        for number in range(FILES):
            torch.randn(part * TENSORS).numpy().tofile(root / f"{number}")
        for depth in DEPTHS:
            place = Far(root, depth)
            pool = Pool(root, [place])
            tensors = {
                f"t{index:02}": Stored(
                    FLOAT32,
                    (ROWS, WIDTH),
                    [
                        Fragment(
                            pool.path(f"{number}"),
                            index * part * 4,
                            FlatRange(number * part, (number + 1) * part),
                        )
                        for number in range(FILES)
                    ],
                )
                for index in range(TENSORS)
            }
            layout = plan(tensors)
            out = Path(scratch, f"out{depth}")
            out.mkdir()
            lay_out(layout, out)
            units = Units(layout)
            with Outputs(layout, out) as outputs:
                done = write(units, outputs, [range(len(units))], requests=place.requests)
            shutil.rmtree(out)
            rate = done.bytes_read / done.move_seconds
            print(f"depth {depth}: {rate / 1e6:.0f} MB/s", file=sys.stderr)
            add(NAME, [{"contender": f"{depth}", "rate": rate}])


if __name__ == "__main__":
    measured(Path(sys.argv[1]))
