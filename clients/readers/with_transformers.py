"""A client: transformers, with PEFT for adapters, of whatever versions the environment has."""

from __future__ import annotations

from typing import Any

import torch
from jobs import Answer, generated_by_transformers, serve
from transformers import AutoModelForCausalLM, AutoTokenizer


def read(case: dict[str, Any]) -> Answer:
    """Load a model, or its base and its adapter."""
    # The keyword is torch_dtype in transformers 4 and 5 alike; 5 prefers dtype.
    loaded: Any = AutoModelForCausalLM.from_pretrained(case["directory"], torch_dtype=torch.float32)
    if case["adapter"]:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, case["adapter"])
    tokenizer = AutoTokenizer.from_pretrained(case["adapter"] or case["directory"])
    return generated_by_transformers(loaded.eval(), tokenizer, case["question"])


if __name__ == "__main__":
    serve(read, "transformers", "peft", "tokenizers")
