"""Owns the input of a check: the request, the directory, and the results of earlier checks.

A module of this package that has a function ``check`` is a check. ``verify`` finds it there and calls it::

    ORDER = 90  # its place among the checks
    KINDS = {"my-kind": Kind("warning", "one line that explains it")}  # kinds of its own, if any

    def check(run: Run) -> None:
        run.findings.add("my-kind", "the fact", file="config.json")

A module with ``IN_BACKGROUND = True`` starts first, in a thread. Its findings are added at its place. It does
not see results of other checks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt_tools.hub.reference import ReferenceModel
from ckpt_tools.ranks import Ranks
from ckpt_tools.tensors.checkpoint import Checkpoint
from ckpt_tools.verification.directory import Directory, Manifest
from ckpt_tools.verification.problem import Findings

# How long the process may take that loads a model.
LOAD_SECONDS = 3600.0
# Called with bytes done and bytes in all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """The arguments of :func:`ckpt_tools.verification.verify`, which documents them."""

    against: str | Path | Checkpoint | None = None
    also: Sequence[str | Path] = ()
    read_data: bool = False
    load: bool = False
    load_seconds: float = LOAD_SECONDS
    load_memory: int | None = None
    base: str | Path | None = None
    like: str | Path | None = None
    trust_remote_code: bool = False
    workers: int | None = None
    progress: Progress | None = None
    ranks: Ranks | None = None
    readers: Sequence[str] = ()


@dataclass
class Run:
    """One run of verify.

    Attributes:
        request: the arguments.
        directory: the directory; its headers and its config are read.
        findings: takes the problems.
        manifests: the manifests of the directory.
        checkpoint: the checkpoint of ``against``, opened.
        reference: the model of the config, if it is known; set by the check of the model.
    """

    request: Request
    directory: Directory
    findings: Findings
    manifests: Sequence[Manifest] = ()
    checkpoint: Checkpoint | None = None
    reference: ReferenceModel | None = None
