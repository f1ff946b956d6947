"""Owns the check that transformers or PEFT can load the directory and run the model.

A child process (``loading_child.py``) does the work. This module judges its answers or its death. An adapter
is loaded onto its base, if the base is on this machine.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ckpt_tools.hub.adapter_config import NAME as ADAPTER_CONFIG
from ckpt_tools.hub.reference.process import INSTALLED_BY, failure_of, is_installed, run_child
from ckpt_tools.storage.naming import as_path
from ckpt_tools.storage.regular import content_of
from ckpt_tools.verification.adapter_base import find_base
from ckpt_tools.verification.container import Entry
from ckpt_tools.verification.directory import CONFIG, Directory
from ckpt_tools.verification.problem import Findings
from ckpt_tools.verification.run import LOAD_SECONDS, Run

ORDER = 70
# Loading may hold the weights in fp32 beside what it reads; generation takes little.
_LEAST_MEMORY, _MEMORY_A_BYTE = 16 << 30, 8
_WEIGHTS = (".safetensors", ".bin")
_STEPS = {
    "load": ("load-failed", "loading"),
    "forward": ("forward-failed", "a forward pass"),
    "generation": ("generation-failed", "a short generation"),
}


@dataclass(frozen=True)
class Limits:
    """What loading may take.

    Attributes:
        seconds: time, and processor time of each thread.
        memory: bytes; None for some gigabytes and a multiple of the weights.
    """

    seconds: float = LOAD_SECONDS
    memory: int | None = None

    def memory_for(self, *directories: Path | None) -> int:
        """The bytes of memory for the models of some directories."""
        if self.memory is not None:
            return self.memory
        files = [file for each in directories if each is not None for file in each.iterdir()]
        sizes = [
            file.stat().st_size for file in files if file.suffix in _WEIGHTS and file.is_file()
        ]
        return _LEAST_MEMORY + _MEMORY_A_BYTE * sum(sizes)


def check(run: Run) -> None:
    """Load the directory, if that was asked for."""
    base = run.request.base
    if run.request.load:
        limits = Limits(run.request.load_seconds, run.request.load_memory)
        check_loading(run.directory, run.findings, None if base is None else as_path(base), limits)


def check_loading(
    directory: Directory, findings: Findings, base: Path | None = None, limits: Limits | None = None
) -> None:
    """Load the model or the adapters, run a forward pass on a few tokens, and generate a few.

    It needs the memory of the model and runs on the CPU.

    Args:
        directory: the directory, its weights and configs read.
        findings: takes the problems.
        base: the base model of the adapters. If None, the name in ``adapter_config.json`` is used.
        limits: what it may take.
    """
    limits = limits or Limits()
    if directory.tensors or directory.config is not None:
        _load_model(directory, findings, limits)
    for folder, tensors in directory.adapters.items():
        _load_adapter(directory, folder, tensors, base, findings, limits)
    if not (directory.tensors or directory.config is not None or directory.adapters):
        findings.skipped.append("loading (the directory holds no model or adapter)")


def _load_model(directory: Directory, findings: Findings, limits: Limits) -> None:
    config = directory.config
    if config is None:
        findings.skipped.append("loading (there is no readable config)")
        return
    question = {
        "directory": os.fspath(directory.path.resolve()),
        "base": None,
        "trust_remote_code": directory.trust_remote_code,
    }
    custom = "auto_map" in config and not directory.trust_remote_code
    memory = limits.memory_for(directory.path)
    _judge(question, "transformers", CONFIG, custom, findings, replace(limits, memory=memory))


def _load_adapter(
    directory: Directory,
    folder: str,
    tensors: Mapping[str, Entry],
    base: Path | None,
    findings: Findings,
    limits: Limits,
) -> None:
    if not is_installed("peft"):
        install = f'pip install "{INSTALLED_BY["peft"]}"'
        findings.skipped.append(f"loading (the package `peft` is not installed: {install})")
        return
    path = directory.path / folder
    file = f"{folder}/{ADAPTER_CONFIG}".lstrip("/")
    try:
        named = json.loads(content_of(path / ADAPTER_CONFIG)).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        findings.skipped.append(f"loading ({file} cannot be read)")
        return
    found = find_base(path, {"base_model_name_or_path": named}, base)
    if found is None:
        findings.skipped.append(
            f"loading (the base {str(base or named)!r} is not a directory of a model on this machine)"
        )
        return
    question = {
        "directory": os.fspath(path.resolve()),
        "base": os.fspath(found.resolve()),
        "trust_remote_code": directory.trust_remote_code,
        "rows": _rows(
            tensors, r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|shared)\.weight$"
        ),
        "labels": _rows(tensors, r"(^|\.)(score|classifier)\.weight$"),
    }
    memory = limits.memory_for(path, found)
    _judge(question, "peft", file, False, findings, replace(limits, memory=memory))


def _rows(tensors: Mapping[str, Entry], pattern: str) -> int | None:
    """Rows of the first matrix of an adapter whose name matches."""
    fitting = (entry.shape for name, entry in tensors.items() if re.search(pattern, name))
    return next((shape[0] for shape in fitting if len(shape) == 2), None)


def _judge(
    question: Mapping[str, Any],
    library: str,
    file: str,
    is_custom: bool,
    findings: Findings,
    limits: Limits,
) -> None:
    """Ask the child, and judge each step."""
    try:
        child = run_child(
            "ckpt_tools.verification.loading_child",
            json.dumps(question),
            timeout=limits.seconds,
            threads=os.cpu_count() or 1,
            memory=limits.memory_for(),
        )
    except subprocess.TimeoutExpired:
        findings.skipped.append(
            f"loading (it did not end within {limits.seconds:.0f} seconds; --load-seconds allows more)"
        )
        return
    except OSError as error:
        findings.skipped.append(f"loading (no process can be started: {error})")
        return
    steps = [json.loads(line) for line in child.stdout.splitlines()]
    done = [
        _STEPS[step["step"]][1] for step in steps if _went_well(step, file, is_custom, findings)
    ]
    if child.returncode:
        _judge_death(child, steps, file, findings)
    if done:
        findings.checked.append(f"{', '.join(done)} with {library}")


def _went_well(step: Mapping[str, Any], file: str, is_custom: bool, findings: Findings) -> bool:
    """Judge a step. Returns whether it succeeded."""
    kind, title = _STEPS[step["step"]]
    if "skipped" in step:
        findings.skipped.append(f"{title} ({_first_line(step['skipped'])})")
    elif "unknown" in step and is_custom:
        findings.skipped.append(f"{title} (custom code needs --trust-remote-code)")
    elif "unknown" in step:
        findings.add(kind, step["unknown"], file=file)
    elif "failure" in step:
        mismatched = "size mismatch" in step["failure"]
        findings.add(
            "load-mismatched" if mismatched else kind,
            f"{title} fails: {_failure(step['failure'])}",
            file=file,
        )
    elif step["step"] == "load":
        _judge_keys(step, findings)
        return True
    elif step["step"] == "forward":
        for name in step["not_finite"]:
            findings.add(
                "forward-not-finite",
                f"{name} of a forward pass on a few tokens has NaN or infinity ({step['tensors'][name]})",
                hint="Run ckpt-tools verify --read-data to find weights that are not finite.",
            )
        return True
    elif step["tokens"] < 1:
        findings.add(kind, "a generation of a few tokens gave none", file=file)
    else:
        return True
    return False


def _judge_keys(step: Mapping[str, Any], findings: Findings) -> None:
    for name in step["missing"]:
        findings.add(
            "load-missing-keys", "it is in no file: loading made up random values", tensor=name
        )
    for name in step["unexpected"]:
        findings.add("load-unexpected-keys", "the loaded model has no place for it", tensor=name)
    for name, held, wanted in step["mismatched"]:
        findings.add(
            "load-mismatched",
            f"its shape is {held}, the model needs {wanted}: loading used random values",
            tensor=name,
        )


def _judge_death(
    child: subprocess.CompletedProcess[str],
    steps: Iterable[Mapping[str, Any]],
    file: str,
    findings: Findings,
) -> None:
    over = {step["step"] for step in steps}
    left = [text for name, text in _STEPS.items() if name not in over]
    if not left:
        return
    kind, title = left[0]
    if child.returncode > 0:
        findings.skipped.append(f"{title} ({failure_of(child)})")
        return
    killed = child.returncode == -signal.SIGKILL
    findings.add(
        kind,
        f"{title} ends the process with {signal.Signals(-child.returncode).name}"
        + (", as when memory runs out" if killed else ""),
        file=file,
        hint="Try it on a machine with more memory." if killed else None,
    )


def _failure(text: str) -> str:
    """The first line of an error message; also the next line if the first is only a title."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "no reason is given")
