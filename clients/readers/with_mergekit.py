"""A client: mergekit, whose result must be loadable and say the same.

The recipe has one model, because mergekit refuses one that is named twice.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from jobs import Answer, generated_by_transformers, serve
from transformers import AutoModelForCausalLM, AutoTokenizer

RECIPE = """merge_method: linear
dtype: float32
models:
  - {{model: {0}, parameters: {{weight: 1.0}}}}
"""


def read(case: dict[str, Any]) -> Answer:
    """Merge, and load the result."""
    scratch = Path(case["scratch"])
    directory = case["directory"] + (f"+{case['adapter']}" if case["adapter"] else "")
    (scratch / "recipe.yaml").write_text(RECIPE.format(directory))
    program = str(Path(sys.executable).with_name("mergekit-yaml"))
    command = [
        program,
        str(scratch / "recipe.yaml"),
        str(scratch / "merged"),
        "--lora-merge-cache",
        str(scratch),
    ]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError((ended.stderr.strip().splitlines() or ["no output"])[-1])
    merged: Any = AutoModelForCausalLM.from_pretrained(scratch / "merged", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(scratch / "merged")
    return generated_by_transformers(merged, tokenizer, case["question"])


if __name__ == "__main__":
    serve(read, "mergekit", "transformers")
