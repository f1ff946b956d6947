"""A client: CTranslate2, which reads what its converter for transformers makes of a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ctranslate2
from ctranslate2.converters import TransformersConverter
from jobs import LONGEST, Answer, chat_of, serve
from transformers import AutoTokenizer


def read(case: dict[str, Any]) -> Answer:
    """Convert, load, and generate until the end token that the converter found in the directory."""
    if case["adapter"]:
        return {"failure": "its converter has no adapters"}
    output = str(Path(case["scratch"]) / "ctranslate2")
    TransformersConverter(case["directory"]).convert(output, force=True)
    tokenizer = AutoTokenizer.from_pretrained(case["directory"])
    _, prompt = chat_of(tokenizer, case["question"])
    generator = ctranslate2.Generator(output, compute_type="float32", intra_threads=1)
    (result,) = generator.generate_batch(
        [tokenizer.convert_ids_to_tokens(prompt)],
        max_length=LONGEST,
        include_prompt_in_result=False,
        return_end_token=True,
    )
    return {"prompt": prompt, "tokens": list(result.sequences_ids[0])}


if __name__ == "__main__":
    serve(read, "ctranslate2", "transformers")
