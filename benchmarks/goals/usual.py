"""The usual way from a ZeRO checkpoint to a directory: zero_to_fp32.py, from_pretrained, save_pretrained.

python usual.py CHECKPOINT OUT
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def main(checkpoint: Path, out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        single = Path(scratch, "fp32")
        script = [sys.executable, str(checkpoint / "zero_to_fp32.py"), str(checkpoint), str(single)]
        subprocess.run([*script, "--safe_serialization"], check=True)
        shutil.copy(checkpoint / "hf" / "config.json", single)

        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(single, dtype=torch.bfloat16)
        model.save_pretrained(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
