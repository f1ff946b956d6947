"""Owns the check of tokenizer, chat template and generation config: the question to a child process.

The child (``tokenizer_child.py``) loads them; ``tokenizer.py`` and ``generation.py`` judge its answer.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

from ckpt_tools.hub.reference.process import failure_of, run_child
from ckpt_tools.verification.directory import Directory
from ckpt_tools.verification.generation import judge_generation, read_generation
from ckpt_tools.verification.problem import Findings
from ckpt_tools.verification.run import Run
from ckpt_tools.verification.tokenizer import SIGNS, judge_tokenizer, read_answer, read_tokenizer

ORDER = 60
IN_BACKGROUND = True  # a child process takes seconds
_TIMEOUT_SECONDS = 180

# The name of the input embedding in the models of transformers.
_EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|word_embeddings?|embed_in|shared|tok_embeddings|token_embedding"
    r"|embeddings?)\.weight$"
)


def check(run: Run) -> None:
    """Check tokenizer, chat template and generation config."""
    check_text(run.directory, run.findings)


def check_text(directory: Directory, findings: Findings) -> None:
    """Check tokenizer, chat template and generation config of a finished directory.

    It needs about a second: a child process imports transformers without torch.
    """
    files = read_tokenizer(directory, findings)
    texts = read_generation(directory, findings)
    rows = embedding_rows(directory)
    has_tokenizer = any(fnmatch(f, s) for f in directory.root_files for s in SIGNS)
    if not has_tokenizer:
        findings.skipped.append("tokenizer (there is none)")
    question = {
        "directory": os.fspath(directory.path.resolve()),
        "trust_remote_code": directory.trust_remote_code,
        "has_tokenizer": has_tokenizer and files is not None,
        "has_generation_config": texts.generation is not None,
        "rows": rows,
        "tokens": files.tokens if files is not None else [],
        "ids": sorted({stated.number for stated in texts.ids}),
        "template": files.processor_template if files is not None else None,
    }
    answer: Mapping[str, Any] = {}
    if question["has_tokenizer"] or question["has_generation_config"]:
        answer = _asked(question, findings)
    loaded = None
    if files is not None and answer.get("tokenizer") is not None:
        loaded = read_answer(answer["tokenizer"], directory, files, findings)
        if loaded is not None:
            judge_tokenizer(loaded, files, rows, findings)
            findings.checked.append("tokenizer")
    judge_generation(directory, texts, answer.get("generation"), loaded, rows, findings)


def embedding_rows(directory: Directory) -> int | None:
    """Rows of the input embedding, from the weights or the config; None if neither has them."""
    held = [
        entry.shape[0]
        for entry in directory.every_tensor
        if len(entry.shape) == 2 and _EMBEDDING.search(entry.name)
    ]
    if held:
        return max(held)
    config = directory.config or {}
    part = config.get("text_config")
    stated = config.get("vocab_size", part.get("vocab_size") if isinstance(part, dict) else None)
    return stated if isinstance(stated, int) else None


def _asked(question: Mapping[str, Any], findings: Findings) -> Mapping[str, Any]:
    """The child's answer; empty, with a finding, if there is none."""
    try:
        child = run_child(
            "ckpt_tools.verification.tokenizer_child",
            json.dumps(question),
            timeout=_TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        reason = f"transformers did not load it within {_TIMEOUT_SECONDS} seconds"
    except OSError as error:
        reason = f"no process can be started: {error}"
    else:
        if child.returncode == 0:
            answer: Mapping[str, Any] = json.loads(child.stdout)
            return answer
        if child.returncode < 0:
            name = signal.Signals(-child.returncode).name
            findings.add("tokenizer-unreadable", f"the process that loads it ended with {name}")
            return {}
        reason = failure_of(child)
    findings.skipped.append(f"tokenizer and generation config ({reason})")
    return {}
