"""What each rank runs in the tests: a list of conversions, one after the other, by the library.

One torchrun serves many cases, because starting one takes longer than they do. Usage:
``driver.py cases.json``, a list of ``{"function", "arguments", "options"}``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import ckpt_tools
from ckpt_tools.errors import CkptError
from ckpt_tools.ranks import from_environment


def main(path: str) -> None:
    ranks = from_environment(60)
    for case in json.loads(Path(path).read_text()):
        function = getattr(ckpt_tools, case["function"])
        try:
            report = function(*case["arguments"], ranks=ranks, **case["options"])
            said = {"bytes_read": report.bytes_read, "output": str(report.output)}
        except CkptError as error:
            said = {"error": type(error).__name__, "fact": error.fact}
        print(f"rank {os.environ['RANK']}: {json.dumps(said)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)
