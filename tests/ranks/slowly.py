"""The command line with a slow disk: each block that is written takes a while, so that runs can be hit.

``slowly.py SECONDS COMMAND ...``
"""

from __future__ import annotations

import sys
import time
from typing import Any

from ckpt_tools.cli import main
from ckpt_tools.writing import bytes as write

write_block = write.Outputs.write


def write_slowly(*arguments: Any) -> None:
    write_block(*arguments)
    time.sleep(float(sys.argv[1]))


write.Outputs.write = write_slowly  # type: ignore[assignment, method-assign]
if __name__ == "__main__":
    main(sys.argv[2:])
