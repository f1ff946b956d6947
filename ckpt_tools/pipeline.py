"""The pipeline: the only place where the order of things is decided.

    state -> find config -> ask for its model -> check masters -> fit to the model -> assets
        -> plan -> write -> publish

Everything that can be wrong with the input is found before the partial directory is made. Knows no
format, no byte layout and no command line.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from ckpt_tools import readers
from ckpt_tools.assets import AssetFile, AssetOptions, Assets, ConfigSource, collect, find_config
from ckpt_tools.assets.config import of_attribute
from ckpt_tools.catalogue import Catalogue, Tensor
from ckpt_tools.checkpoint import Checkpoint, Copy
from ckpt_tools.errors import OutputFailed
from ckpt_tools.fit import Fitted, anticipate, fit_to_model
from ckpt_tools.masters import check_masters
from ckpt_tools.plan import Plan, plan
from ckpt_tools.publish import check_room, check_target, leftovers, partial_directory
from ckpt_tools.report import Report
from ckpt_tools.state import DTypeChoice, State, cast_state, main_dtype, model_state
from ckpt_tools.transforms.average import average
from ckpt_tools.write import Written, write

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """What is asked of one conversion; the arguments of the public functions, made ready."""

    target: Path
    attribute: str | None
    coefficients: Sequence[float] | None
    dtype: DTypeChoice
    copy: Copy
    assets: AssetOptions
    max_shard_size: int | str
    workers: int
    dry_run: bool
    overwrite: bool
    weights_only: bool
    check_all_masters: bool
    progress: Progress | None


class Clock:
    """Seconds of each step, and in all."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, step: str) -> None:
        """End the step that is running and call it ``step``."""
        now = time.monotonic()
        self.laps |= {step: now - self._last, "total": now - self._started}
        self._last = now


def run(sources: Sequence[Checkpoint], request: Request, clock: Clock) -> Report:
    """Carry out a conversion of one checkpoint, or of the mean of several.

    Raises:
        CkptError: see :mod:`ckpt_tools.errors`; nothing was written.
    """
    if not request.dry_run:
        check_target(request.target, _inputs(sources, request.assets), overwrite=request.overwrite)
    state = _state(sources, request)
    catalogue = cast_state(state, request.dtype)
    config = _config(request)
    like = _like(request)
    if config is not None:
        anticipate(catalogue, config, like, main_dtype(catalogue))
        import_module("torch")  # needed later and slow to import: while the answer is awaited
    clock.lap("read")
    checked = 0
    if request.copy == "master":
        checked = sum(
            check_masters(s, every_element=request.check_all_masters, workers=request.workers)
            for s in sources
        )
    clock.lap("check")
    fitted, assets = Fitted.unchecked(catalogue), Assets((), {}, (), ())
    if config is not None:
        fitted = fit_to_model(catalogue, config, like, main_dtype(catalogue))
        assets = _collect(request.assets, config, fitted)
    layout = plan(fitted.catalogue, max_shard_size=request.max_shard_size)
    needed = layout.nbytes + sum(file.nbytes for file in assets.files)
    if not request.dry_run:
        check_room(request.target, needed)
    clock.lap("plan")
    written = None if request.dry_run else _publish(layout, assets, request)
    clock.lap("write")
    first = sources[0]
    return Report(
        checkpoint=first.location.directory,
        output=request.target,
        source=first.title if len(sources) == 1 else f"mean of {len(sources)} checkpoints",
        step=first.step if len(sources) == 1 else None,
        world_size=first.world_size,
        framework=first.framework,
        weights=request.copy,
        dtypes=_dtype_counts(layout.tensors),
        tensors=len(layout.tensors),
        parameters=sum(tensor.numel for tensor in layout.tensors.values()),
        files=layout.sizes | {file.name: file.nbytes for file in assets.files},
        bytes_read=written.bytes_read if written else 0,
        bytes_written=needed if written else 0,
        checked=checked,
        seconds=clock.laps
        | {
            "move": written.move_seconds if written else 0.0,
            "sync": written.sync_seconds if written else 0.0,
        },
        notes=(
            *(f"stripped {where} from {n} names" for where, n in state.removed.items()),
            *fitted.notes,
            *assets.notes,
        ),
        warnings=(
            *(remark for source in sources for remark in source.remarks),
            *map(_leftover, leftovers(request.target)),
            *fitted.warnings,
            *assets.warnings,
        ),
        dry_run=request.dry_run,
        plan=layout.listing() if request.dry_run else (),
    )


def _inputs(sources: Sequence[Checkpoint], assets: AssetOptions) -> list[Path]:
    """Directories and files that are read, and so must not be replaced."""
    named = (assets.config, assets.tokenizer, assets.like)
    return [*(source.location.directory for source in sources), *filter(None, named)]


def _state(sources: Sequence[Checkpoint], request: Request) -> State:
    states = [model_state(source, request.copy, request.attribute) for source in sources]
    if len(states) == 1:
        return states[0]
    mean = average([state.catalogue for state in states], request.coefficients)
    return State(mean, states[0].dtypes, states[0].removed)


def _config(request: Request) -> ConfigSource | None:
    """The config of the model that is written; None where weights alone are."""
    if request.weights_only:
        return None
    config = find_config(request.assets)
    return config if request.attribute is None else of_attribute(config, request.attribute)


def _like(request: Request) -> Catalogue | None:
    """The tensors of ``--like``, in the dtypes of the output."""
    if request.assets.like is None:
        return None
    finished = readers.read(readers.locate(request.assets.like))
    dtype = "keep" if request.dtype == "auto" else request.dtype
    return cast_state(model_state(finished, "model"), dtype)


def _collect(options: AssetOptions, config: ConfigSource, fitted: Fitted) -> Assets:
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in fitted.catalogue.items()}
    return collect(
        options, config, shapes, dtype=main_dtype(fitted.catalogue), untied=bool(fitted.untied)
    )


def _leftover(path: Path) -> str:
    return f"{path} was left by a run that was killed; it can be deleted"


def _dtype_counts(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[str(tensor.dtype)] += tensor.numel
    return dict(counts)


def _summed(progress: Progress | None, total: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    lock, done = threading.Lock(), 0

    def add(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            progress(done, total)

    return add


def _publish(layout: Plan, assets: Assets, request: Request) -> Written:
    progress = _summed(request.progress, layout.tensor_bytes)
    with partial_directory(request.target, overwrite=request.overwrite) as partial:
        written = write(layout, partial, workers=request.workers, progress=progress)
        for asset in assets.files:
            _write_asset(partial, asset)
    return written


def _write_asset(directory: Path, asset: AssetFile) -> None:
    path = directory / asset.name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if asset.content is not None:
            path.write_bytes(asset.content)
        elif asset.source is not None:
            shutil.copyfile(asset.source, path)
    except OSError as error:
        raise OutputFailed(f"cannot be written ({error.strerror})", path=path) from error
