"""Converts the same tensors from a place that answers slowly, at fixed depths and at the one that is found.

python slow_place.py DIRECTORY
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ckpt_tools.storage.places import LOCAL, DirectoryPlace, FileFacts, Readable
from ckpt_tools.storage.pool import Pool
from ckpt_tools.tensors.catalogue import FlatRange, Fragment, Stored
from ckpt_tools.tensors.derived import cast
from ckpt_tools.tensors.dtypes import BFLOAT16, FLOAT32
from ckpt_tools.tensors.threads import load_torch
from ckpt_tools.writing.bytes import Outputs, lay_out, write
from ckpt_tools.writing.depth import Depth, Level, levels
from ckpt_tools.writing.layout import plan
from ckpt_tools.writing.units import Units
from goals.raw import add
from goals.slow import DELAY_SECONDS, DEPTHS, FOUND, NAME, REQUEST_BYTES, WORKERS

FILES, TENSORS = 8, 256
ROWS, WIDTH = 1024, 2048  # 8 MB a tensor, 1 MiB of it in each file


class Far:
    """A directory as a place that answers slowly and counts the requests that are under way."""

    label = "a far place"
    requests = LOCAL

    def __init__(self, root: Path) -> None:
        self._place = DirectoryPlace(root)
        self._lock = threading.Lock()
        self.now = self.most = 0

    def listing(self) -> Mapping[str, FileFacts]:
        return self._place.listing()

    def open(self, relative: str) -> Slow:
        return Slow(self, self._place.open(relative))

    def begin(self) -> None:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)

    def end(self) -> None:
        with self._lock:
            self.now -= 1


class Slow:
    """A file whose requests take their time."""

    def __init__(self, place: Far, file: Readable) -> None:
        self._place, self._file = place, file

    def read_into(self, view: memoryview, offset: int) -> int:
        self._place.begin()
        time.sleep(DELAY_SECONDS * max(len(view) / REQUEST_BYTES, 1))
        self._place.end()
        return self._file.read_into(view, offset)

    def close(self) -> None:
        self._file.close()


def measured(directory: Path) -> None:
    """Convert the same tensors at each depth."""
    load_torch()  # the first depth shall not pay for the import
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        root = Path(scratch, "source")
        root.mkdir()
        part = ROWS * WIDTH // FILES
        for number in range(FILES):
            with open(root / f"{number}", "wb") as file:
                file.truncate(part * TENSORS * 4)  # holes: the disk has no part in it
        for name in (*DEPTHS, FOUND):
            place = Far(root)
            pool = Pool(root, [place])
            tensors = {
                f"t{index:02}": cast(
                    Stored(
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
                    ),
                    BFLOAT16,
                )
                for index in range(TENSORS)
            }
            layout = plan(tensors)
            out = Path(scratch, "out")
            out.mkdir()
            lay_out(layout, out)
            units = Units(layout)
            fixed = DEPTHS.get(name)
            choice = levels(WORKERS, units.block_bytes, LOCAL) if fixed is None else [Level(*fixed)]
            # A few seconds each.
            few = len(units) if fixed is None else min(fixed[0] * fixed[1], 16) * len(units) // 16
            with Outputs(layout, out) as outputs:
                done = write(units, outputs, [range(few)], depth=Depth(choice))
            shutil.rmtree(out)
            rate = done.bytes_read / done.move_seconds
            print(f"depth {name}: {rate / 1e6:.0f} MB/s", file=sys.stderr)
            add(NAME, [{"contender": name, "rate": rate, "most": place.most}])


if __name__ == "__main__":
    measured(Path(sys.argv[1]))
