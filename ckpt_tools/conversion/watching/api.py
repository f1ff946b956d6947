"""The public function: what ``ckpt-tools watch`` does, for programs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ckpt_tools.conversion.api import consolidate, extract_lora
from ckpt_tools.conversion.report import Report
from ckpt_tools.conversion.request import (
    ConversionOptions,
    WatchOptions,
    requested,
)
from ckpt_tools.conversion.signature import states_options
from ckpt_tools.conversion.watching.events import Tell
from ckpt_tools.conversion.watching.saves import look_at
from ckpt_tools.conversion.watching.watch import Asked, Convert, Watch
from ckpt_tools.errors import CkptError, NotACheckpoint, UsageError
from ckpt_tools.readers import locate
from ckpt_tools.storage.addresses import PathLike, is_address
from ckpt_tools.tensors.checkpoint import FINISHED, LAST

if TYPE_CHECKING:
    from typing_extensions import Unpack

POLL_SECONDS = 10.0
SETTLE_SECONDS = 30.0


@states_options(WatchOptions)
def watch(
    run: PathLike,
    output: PathLike,
    *,
    keep: int | None = None,
    every: int | None = None,
    exec: str | None = None,
    once: bool = False,
    prune_source: bool = False,
    settle: float = SETTLE_SECONDS,
    poll: float = POLL_SECONDS,
    stop: Callable[[], bool] | None = None,
    tell: Tell | None = None,
    attribute: str | None = None,
    lora: bool = False,
    adapter: str | None = None,
    adapter_config: PathLike | None = None,
    lora_alpha: float | None = None,
    base_model: str | None = None,
    **options: Unpack[WatchOptions],
) -> list[Report]:
    """Convert each finished checkpoint of a training that runs: once, in order.

    What is done is read from the outputs, so a watch that was stopped goes on where it was. A checkpoint
    that is being written is never read; docs/watch.md has the rules.

    Args:
        run: the directory in which the checkpoints appear side by side.
        output: the directory that gets one directory for each checkpoint, of the same name.
        keep: of how many checkpoints the outputs are kept; by default of all.
        every: convert the checkpoints whose number is a multiple of this one; by default all.
        exec: a command for ``sh`` after each conversion. ``CKPT_TOOLS_OUTPUT``, ``CKPT_TOOLS_CHECKPOINT``,
            ``CKPT_TOOLS_NAME`` and ``CKPT_TOOLS_STEP`` say what for.
        once: do what can be done now, and return.
        prune_source: remove a checkpoint that training does not need, after its output was read back and
            compared with it bit for bit.
        settle: seconds for which the files of a checkpoint must stand still, where nothing else says that
            it is finished.
        poll: seconds between two looks at the run.
        stop: asked between two looks; the watch returns when it is true.
        tell: called with each :class:`ckpt_tools.conversion.watching.events.Event`.
        attribute: write this part of a composite model, as ``extract-attr`` does.
        lora: write the adapter, as ``extract-lora`` does.
        adapter: which adapter, where there are several.
        adapter_config: the adapter's config, or a directory with it.
        lora_alpha: of the training run, where no config says it.
        base_model: what the base model is called, where no config says it.
        options: see :class:`ckpt_tools.conversion.request.Request`.

    Returns:
        A report of each conversion.

    Raises:
        TypeError: an option has an unknown name.
        UsageError: the request cannot be carried out for any checkpoint, or another watch works there.
        CkptError: the first error about one checkpoint or command, when all others are done; any other at
            once. See :mod:`ckpt_tools.errors`.
    """
    for place in (run, output):
        if is_address(place):
            raise UsageError(
                f"{place} is in a store, where no run is watched",
                hint="Name folders of this machine, or convert each checkpoint with ckpt-tools consolidate.",
            )
    run, out = Path(run), Path(output)
    given: dict[str, Any] = {"attribute": attribute} if not lora else {}
    adapters = {
        "adapter": adapter,
        "adapter_config": adapter_config,
        "lora_alpha": lora_alpha,
        "base_model": base_model,
    }
    _refuse_contradictions(run, out, keep, every, lora, attribute, adapters, prune_source)
    accepted: type[ConversionOptions] = ConversionOptions if lora else WatchOptions
    given |= adapters if lora else {}
    # Raises TypeError for a wrong name before anything is waited for.
    requested("watch", out, accepted, cast("dict[str, Any]", options), **given)
    overwrite = options.pop("overwrite", False)
    do: Callable[..., Report] = extract_lora if lora else consolidate
    convert = partial(do, **given, **options)
    watched = Watch(
        Asked(run, out, keep, every, exec, prune_source, overwrite),
        cast("Convert", convert),
        tell or (lambda _: None),
        settle,
        time.monotonic,
    )
    _refuse_no_run(run, out)
    with watched.records.alone():
        _go_on(watched, once=once, settle=settle, poll=poll, stop=stop)
    if watched.errors:
        raise watched.errors[0]
    return watched.reports


def _go_on(
    watched: Watch, *, once: bool, settle: float, poll: float, stop: Callable[[], bool] | None
) -> None:
    """Passes until there is no more to do, or until the watch is to stop."""
    if once:
        if watched.once():
            time.sleep(settle)
            watched.once()
        return
    while not (stop is not None and stop()):
        watched.once()
        time.sleep(poll)


def _refuse_no_run(run: Path, out: Path) -> None:
    """Raise for what is not the directory in which checkpoints appear side by side."""
    if not run.exists():
        raise NotACheckpoint(
            "the directory of the run does not exist",
            path=run,
            hint="Check the path, or make the directory before training begins.",
        )
    hint = "Name the directory in which the checkpoints appear side by side."
    if not run.is_dir():
        raise UsageError("it is not a directory", path=run, hint=hint)
    if look_at(run, out).saves:
        return
    try:
        found = locate(run)
    except CkptError:
        return  # no checkpoint yet
    if found.format not in (*FINISHED, *LAST) and found.directory.resolve() == run.resolve():
        raise UsageError("it is one checkpoint, not the directory of a run", path=run, hint=hint)


def _refuse_contradictions(
    run: Path,
    out: Path,
    keep: int | None,
    every: int | None,
    lora: bool,
    attribute: str | None,
    adapters: Mapping[str, object],
    prune: bool,
) -> None:
    """Raise UsageError for what no watch can do."""
    for name, number in (("--keep", keep), ("--every", every)):
        if number is not None and number < 1:
            raise UsageError(f"{name} is {number}", hint=f"Pass {name} with 1 or more.")
    if run.resolve() == out.resolve():
        raise UsageError(
            "the outputs would lie among the checkpoints",
            path=out,
            hint="Name another output, such as a directory in it.",
        )
    if lora and attribute is not None:
        raise UsageError("--lora and --attr exclude each other", hint="Leave out one of them.")
    given = [name for name, value in adapters.items() if value is not None]
    if given and not lora:
        option = f"--{given[0].replace('_', '-')}"
        raise UsageError(
            f"{option} is an option for adapters",
            hint=f"Add --lora to write adapters, or leave out {option}.",
        )
    if prune and (lora or attribute is not None):
        raise UsageError(
            "--prune-source would lose what is not in the outputs, which hold a part of the model",
            hint="Leave out --prune-source, or write whole models.",
        )
