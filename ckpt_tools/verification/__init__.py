"""Reads a finished directory, a model's or an adapter's, and says everything that is wrong with it.

Owns the order of the checks. Each is a function that takes the directory and writes to
:class:`~ckpt_tools.verification.problem.Findings`; none stops at its first problem. It shares no code with
what writes directories, and must not know how a verdict is shown.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ckpt_tools.errors import UsageError
from ckpt_tools.ranks import Ranks
from ckpt_tools.tensors.checkpoint import Checkpoint
from ckpt_tools.verification.adapter import check_adapters
from ckpt_tools.verification.config import check_config, check_precision, read_config
from ckpt_tools.verification.data import Progress, check_data, help_to_read
from ckpt_tools.verification.directory import list_directory
from ckpt_tools.verification.layout import read_weights
from ckpt_tools.verification.loading import check_loading
from ckpt_tools.verification.manifest import check_manifests, is_of_weights_alone, read_manifests
from ckpt_tools.verification.model import check_model, written_ties
from ckpt_tools.verification.problem import (
    KINDS,
    Findings,
    Kind,
    Problem,
    Severity,
    Verdict,
    ordered,
)
from ckpt_tools.verification.text import check_text

__all__ = ["KINDS", "Findings", "Kind", "Problem", "Progress", "Severity", "Verdict", "verify"]


def verify(
    directory: str | Path,
    *,
    against: str | Path | Checkpoint | None = None,
    also: Sequence[str | Path] = (),
    read_data: bool = False,
    load: bool = False,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> Verdict:
    """Check a finished directory.

    Args:
        directory: what ``save_pretrained``, PEFT or this package left.
        against: a checkpoint that the tensors are compared with, bit for bit.
        also: further folders with files of that checkpoint: copies of what other machines hold.
        read_data: whether to read every byte, and not the structure alone.
        load: whether to load it with transformers or PEFT, call it and let it generate; that takes
            the memory of the model.
        base: the model that an adapter is for, to load it on; by default the one that it names, where
            that is a directory.
        trust_remote_code: whether custom code in the directory may be run, in a process of its own.
        workers: threads that read data; by default one for each processor, up to 16.
        progress: called with bytes done and bytes in all, while data is read.
        ranks: the ranks that make the same call together; they divide the bytes that are read.

    Returns:
        Everything that is wrong, what was checked, and what could not be.

    Raises:
        UsageError: there is no such directory, or ``also`` names no folders of a checkpoint's path.
        CkptError: what to compare it with cannot be read, or another rank failed.
    """
    if also and (against is None or isinstance(against, Checkpoint)):
        raise UsageError(
            "also names folders of the checkpoint that the directory is compared with, and none is named",
            hint="Name the path of that checkpoint with --against.",
        )
    options = _Options(
        against, also, read_data, load, base, trust_remote_code, workers, progress, ranks
    )
    if ranks is None:
        return _verdict(Path(directory), options)
    with ranks.session():
        if ranks.leads:
            verdict = _verdict(Path(directory), options)
            ranks.put("verdict", verdict)
            return verdict
        if read_data:
            _help(Path(directory), ranks, workers)
        found: Verdict = ranks.get("verdict")
        return found


class _Options(NamedTuple):
    """The arguments of :func:`verify`."""

    against: str | Path | Checkpoint | None
    also: Sequence[str | Path]
    read_data: bool
    load: bool
    base: str | Path | None
    trust_remote_code: bool
    workers: int | None
    progress: Progress | None
    ranks: Ranks | None


def _help(path: Path, ranks: Ranks, workers: int | None) -> None:
    """Read this rank's share; what is wrong with the structure the leader finds itself."""
    findings = Findings()
    found = list_directory(path, findings)
    read_weights(found, findings)
    help_to_read(found, read_manifests(found, findings), ranks, workers)


def _verdict(path: Path, options: _Options) -> Verdict:
    against, also, read_data, load, base, trust_remote_code, workers, progress, ranks = options
    started = time.monotonic()
    findings = Findings()
    found = list_directory(path, findings)
    found.trust_remote_code = trust_remote_code
    checkpoint = None if against is None else _opened(against, also)
    read_weights(found, findings)
    manifests = read_manifests(found, findings)
    read_config(found, findings, weights_alone=is_of_weights_alone(manifests))
    with ThreadPoolExecutor(1) as pool:
        # A process of its own, which takes seconds: others do their work meanwhile.
        texts = Findings()
        asked = pool.submit(check_text, found, texts)
        reference = check_model(found, findings)
        check_config(found, reference, findings)
        check_precision(found, reference, findings)
        check_adapters(found, findings)
        check_manifests(found, manifests, findings)
        if read_data:
            check_data(
                found,
                manifests,
                reference,
                findings,
                workers=workers,
                progress=progress,
                ranks=ranks,
            )
        asked.result()
    findings.include(texts)
    if load:
        check_loading(found, findings, None if base is None else Path(base))
    if checkpoint is not None:
        from ckpt_tools.verification.against import check_against

        ties = written_ties(found, reference)
        check_against(found, checkpoint, findings, ties=ties, workers=workers, progress=progress)
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


def _opened(checkpoint: str | Path | Checkpoint, also: Sequence[str | Path]) -> Checkpoint:
    if isinstance(checkpoint, Checkpoint):
        return checkpoint
    from ckpt_tools.readers.opening import open_weights
    from ckpt_tools.storage.folders import read_as_one

    return open_weights(read_as_one(Path(checkpoint), also))
