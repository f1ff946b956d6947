"""Owns the verification of a finished directory: finds the checks, carries them out, returns a verdict.

The directory holds a model or adapters. A check is a module of this package; see
:mod:`ckpt_tools.verification.run`. A check does not stop at its first problem. The package shares no code
with the package that writes directories.
"""

from __future__ import annotations

import pkgutil
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from ckpt_tools.errors import UsageError
from ckpt_tools.ranks import Ranks
from ckpt_tools.storage.addresses import is_address
from ckpt_tools.storage.naming import as_path
from ckpt_tools.tensors.checkpoint import Checkpoint
from ckpt_tools.tensors.threads import pool
from ckpt_tools.verification.config import read_config
from ckpt_tools.verification.data import help_to_read
from ckpt_tools.verification.directory import list_directory, refuse_no_config
from ckpt_tools.verification.layout import read_weights
from ckpt_tools.verification.manifest import is_of_weights_alone, read_manifests
from ckpt_tools.verification.other_readers import READERS
from ckpt_tools.verification.problem import (
    KINDS,
    Findings,
    Kind,
    Problem,
    Severity,
    Verdict,
    ordered,
)
from ckpt_tools.verification.run import LOAD_SECONDS, Progress, Request, Run

__all__ = ["KINDS", "Findings", "Kind", "Problem", "Progress", "Severity", "Verdict", "verify"]


def verify(
    directory: str | Path,
    *,
    against: str | Path | Checkpoint | None = None,
    also: Sequence[str | Path] = (),
    read_data: bool = False,
    load: bool = False,
    load_seconds: float = LOAD_SECONDS,
    load_memory: int | None = None,
    base: str | Path | None = None,
    like: str | Path | None = None,
    trust_remote_code: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    readers: Sequence[str] = (),
) -> Verdict:
    """Check a finished directory.

    Args:
        directory: an output of ``save_pretrained``, PEFT or this package.
        against: the checkpoint to compare the tensors with, bit for bit.
        also: further folders with files of that checkpoint, such as copies from other machines.
        read_data: read every byte, and not only the structure.
        load: load the directory with transformers or PEFT, run a forward pass, and generate. This needs
            the memory of the model.
        load_seconds: when the process that loads is ended.
        load_memory: bytes of memory of that process; by default some gigabytes and 8 times the weights.
        base: the model that an adapter is for; by default the one that it names, where that is a
            directory.
        like: a directory of the same model, such as its base or the training run's own. Config, tokenizer
            and generation config are compared with it.
        trust_remote_code: whether custom code in the directory may be run, in a process of its own.
        workers: threads that read data; by default one for each processor, up to 16.
        progress: called with bytes done and bytes in all, while data is read.
        ranks: the ranks that make the same call together; they divide the bytes that are read.
        readers: what else must read the directory: ``transformers-4``, ``vllm``, ``sglang``, ``llama.cpp``,
            ``peft`` (its oldest supported version).

    Returns:
        All problems, what was checked, and what could not be checked.

    Raises:
        UsageError: there is no such directory or reader, ``like`` or ``base`` has no config, or ``also``
            names no folders of a checkpoint's path.
        CkptError: what to compare it with cannot be read, or another rank failed.
    """
    if also and (against is None or isinstance(against, Checkpoint)):
        raise UsageError(
            "--also is for --against: it names further folders of that checkpoint",
            hint="Pass --against with the path of the checkpoint, or leave out --also.",
        )
    if load and any(is_address(named) for named in (directory, base)):
        raise UsageError(
            "a directory in a store cannot be loaded with --load",
            path=directory,
            hint="Copy it into a folder of this machine for --load. All other checks read it where it lies.",
        )
    if like is not None:
        refuse_no_config("--like", like)
    if base is not None:
        refuse_no_config("--base", base)
    if unknown := [name for name in readers if name not in READERS]:
        raise UsageError(
            f"no rules for the reader {unknown[0]!r}",
            hint=f"There are rules for {', '.join(READERS)}.",
        )
    request = Request(
        against=against,
        also=also,
        read_data=read_data,
        load=load,
        load_seconds=load_seconds,
        load_memory=load_memory,
        base=base,
        like=like,
        trust_remote_code=trust_remote_code,
        workers=workers,
        progress=progress,
        ranks=ranks,
        readers=readers,
    )
    if ranks is None:
        return _verdict(as_path(directory), request)
    with ranks.session():
        if ranks.leads:
            verdict = _verdict(as_path(directory), request)
            ranks.put("verdict", verdict)
            return verdict
        if read_data:
            _help(as_path(directory), ranks, workers)
        found: Verdict = ranks.get("verdict")
        return found


class Check(Protocol):
    """A module that checks; :mod:`ckpt_tools.verification.run` says what it needs."""

    ORDER: int

    def check(self, run: Run) -> None:
        """Check the directory, and add to ``run.findings``."""


@cache
def checks() -> tuple[Check, ...]:
    """Every check of the package, in order. Their kinds of problems are added to ``KINDS``."""
    modules = [import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    found = [cast("Check", module) for module in modules if hasattr(module, "check")]
    for module in found:
        KINDS.update(getattr(module, "KINDS", {}))
    return tuple(sorted(found, key=lambda module: module.ORDER))


def _help(path: Path, ranks: Ranks, workers: int | None) -> None:
    """Read this rank's share. The leader finds the problems of the structure."""
    findings = Findings()
    found = list_directory(path, findings)
    read_weights(found, findings)
    help_to_read(found, read_manifests(found, findings), ranks, workers)


def _verdict(path: Path, request: Request) -> Verdict:
    started = time.monotonic()
    findings = Findings()
    found = list_directory(path, findings)
    found.trust_remote_code = request.trust_remote_code
    checkpoint = None if request.against is None else _opened(request.against, request.also)
    read_weights(found, findings)
    manifests = read_manifests(found, findings)
    read_config(found, findings, weights_alone=is_of_weights_alone(manifests))
    _carry_out(Run(request, found, findings, manifests, checkpoint))
    tensors = found.every_tensor
    return Verdict(
        path,
        ordered(findings.problems),
        tuple(findings.checked),
        tuple(findings.skipped),
        len(tensors),
        sum(entry.nbytes for entry in tensors),
        time.monotonic() - started,
    )


def _carry_out(run: Run) -> None:
    with pool() as threads:
        begun: dict[int, tuple[Findings, Future[None]]] = {}
        for number, module in enumerate(checks()):
            if getattr(module, "IN_BACKGROUND", False):
                own = replace(run, findings=Findings())
                begun[number] = (own.findings, threads.submit(module.check, own))
        for number, module in enumerate(checks()):
            if number in begun:
                findings, done = begun[number]
                done.result()
                run.findings.include(findings)
            else:
                module.check(run)


def _opened(checkpoint: str | Path | Checkpoint, also: Sequence[str | Path]) -> Checkpoint:
    if isinstance(checkpoint, Checkpoint):
        return checkpoint
    from ckpt_tools.readers.opening import open_weights
    from ckpt_tools.storage.folders import read_as_one

    return open_weights(read_as_one(as_path(checkpoint), also))
