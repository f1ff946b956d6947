"""Owns the client's side of a job: cases from one JSON file, an answer for each as a line of another.

A line is written as soon as it is known, so that a client that dies leaves the answers before it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

LONGEST = 40
Answer = dict[str, Any]


def serve(read: Callable[[dict[str, Any]], Answer], *packages: str) -> None:
    """Answer every case of the job: the prompt's token ids and those generated, or why there are none.

    Args:
        read: loads a case and generates from it.
        packages: the distributions whose versions the table states.
    """
    job = json.loads(Path(sys.argv[1]).read_text())
    with open(sys.argv[2], "w", encoding="utf-8") as answers:
        stated = {package: version(package) for package in packages}
        answers.write(json.dumps({"versions": stated}) + "\n")
        for case in job["cases"]:
            try:
                answer = read(case)
            except Exception as error:
                answer = {"failure": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps({"case": case["name"], **answer}) + "\n")
            answers.flush()


def chat_of(tokenizer: Any, question: str) -> tuple[str, list[int]]:
    """The prompt as text and as ids, by the chat template of a tokenizer of transformers."""
    said = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text, list(ids)


def generated_by_transformers(model: Any, tokenizer: Any, question: str) -> Answer:
    """Greedy generation by ``generate``, with the directory's own generation config."""
    import torch

    text, prompt = chat_of(tokenizer, question)
    with torch.no_grad():
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=LONGEST)[0].tolist()
    tokens = whole[len(prompt) :]
    return {"text": text, "prompt": prompt, "tokens": tokens, "said": tokenizer.decode(tokens)}
