"""Owns the plot of expected cost and disk against the interval, as SVG or PNG, without a display.

Matplotlib is an extra (``plot``) and is imported only for a plot. The same numbers give the same bytes.
"""

from __future__ import annotations

import io
import math
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_tools.analysis.interval.choice import CheckpointInterval
from ckpt_tools.analysis.interval.quantities import LONGEST
from ckpt_tools.errors import CkptError, OutputExists, OutputFailed, UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FORMATS = (".svg", ".png")
_HOUR = 3600.0


def draw(
    found: CheckpointInterval, path: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Draw a :class:`CheckpointInterval`.

    Args:
        found: the result to draw.
        path: the file. Its suffix, ``.svg`` or ``.png``, is the format.
        overwrite: replace a file that exists.

    Raises:
        UsageError: another suffix.
        OutputExists: the file exists, and ``overwrite`` was not given.
        OutputFailed: it cannot be written.
        CkptError: matplotlib is not installed.
    """
    target = Path(path)
    _check(target, overwrite=overwrite)
    picture = _drawn(found, target.suffix.lower().removeprefix("."))
    partial = target.with_name(f"{target.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.write_bytes(picture)
        partial.replace(target)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise OutputFailed(
            f"cannot be written ({error.strerror})",
            path=target,
            hint="Name a file in a directory that exists and can be written.",
        ) from error


def _check(target: Path, *, overwrite: bool) -> None:
    if target.suffix.lower() not in _FORMATS:
        raise UsageError(
            f"--plot: the suffix of {target.name!r} is neither .svg nor .png",
            hint="Name the file interval.svg or interval.png.",
        )
    if target.is_dir() or (target.exists() and not overwrite):
        raise OutputExists(
            "--plot: the file exists already",
            path=target,
            hint="Name another file, or pass --overwrite.",
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise CkptError(
            "--plot: the package `matplotlib` is not installed",
            hint='Install it with pip install "ckpt-tools[plot]".',
        ) from None


def _drawn(found: CheckpointInterval, format: str) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    # Text stays text. A fixed salt and no date make the bytes reproducible.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ckpt-tools"}):
        has_disk = found.checkpoint_bytes is not None
        figure = Figure(figsize=(8, 7 if has_disk else 5), layout="constrained")
        ratios = {"height_ratios": (2, 1)} if has_disk else None
        rows = figure.subplots(1 + has_disk, 1, sharex=True, squeeze=False, gridspec_kw=ratios)
        _draw_cost(rows[0, 0], found)
        if has_disk:
            _draw_disk(rows[1, 0], found)
        for axes in rows[:, 0]:
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.12g}"))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.12g}"))
        rows[-1, 0].set_xlabel("steps between two saves")
        picture = io.BytesIO()
        metadata = {"Date": None} if format == "svg" else {}
        figure.savefig(picture, format=format, dpi=144, metadata=metadata)
    return picture.getvalue()


def _draw_cost(axes: Axes, found: CheckpointInterval) -> None:
    steps = [cost.interval for cost in found.curve]
    lines = [
        (
            "the whole cost: the sum of the others",
            2.5,
            "black",
            [cost.cost_seconds for cost in found.curve],
        ),
        ("training waits for saves", 1.2, "tab:blue", [cost.save_seconds for cost in found.curve]),
        (
            "failures undo work and saves",
            1.2,
            "tab:red",
            [cost.lost_seconds for cost in found.curve],
        ),
    ]
    if found.run.restart_time:
        lines.append(
            (
                "restarts after failures",
                1.2,
                "tab:purple",
                [cost.restart_seconds for cost in found.curve],
            )
        )
    for label, width, colour, values in lines:
        axes.plot(steps, [_hours(value) for value in values], label=label, lw=width, color=colour)
    # The formulas come close to the least cost, so their marks stand below the curve, on lines of their own.
    marks = [
        ("least cost", "o", "black", 1.0, found.exact),
        ("Young's formula", "^", "tab:orange", 0.62, found.young.cost),
        ("Daly's formula", "v", "tab:green", 0.4, found.daly.cost),
    ]
    if found.every is not None:
        marks.append(("--every", "s", "tab:brown", 1.0, found.every))
    for label, marker, colour, height, cost in marks:
        hours = _hours(cost.cost_seconds)
        shown = "for ever" if math.isnan(hours) else f"{hours:.3g} h"
        label = f"{label}: {cost.interval:,} steps, {shown}"
        at, level = cost.interval, hours * height
        axes.plot([at], [level], marker, label=label, ms=8, color=colour, zorder=3)
        axes.plot([at, at], [level, hours], ":", lw=1, color=colour)
    least = _hours(found.exact.cost_seconds)
    axes.set(xscale="log", yscale="log", ylim=(least / 50, least * 200))
    axes.set_ylabel("expected cost, hours")
    axes.set_title(
        f"{found.run.steps:,} steps: {_hours(found.run.work_seconds):.3g} h of work "
        f"and at least {least:.3g} h of saves and failures"
    )
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend(loc="upper center", ncols=2, fontsize="small")


def _draw_disk(axes: Axes, found: CheckpointInterval) -> None:
    disks = [(cost.interval, disk) for cost in found.curve if (disk := found.disk(cost))]
    steps = [interval for interval, _ in disks]
    unit, name = _unit(min((disk.peak or disk.all for _, disk in disks), default=0))
    kept = [disk.all / unit for _, disk in disks]
    axes.plot(steps, kept, label="all checkpoints kept", color="black")
    if found.keep is not None:
        peaks = [(disk.peak or 0) / unit for _, disk in disks]
        label = f"the last {found.keep} kept, and the one being written"
        axes.plot(steps, peaks, label=label, color="tab:green")
    axes.set(xscale="log", yscale="log", ylabel=f"disk, {name}")
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend(loc="upper right", fontsize="small")


def _unit(nbytes: float) -> tuple[float, str]:
    """The decimal unit in which a size is at least 1, and its name."""
    units = ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    return next(((unit, name) for unit, name in units if nbytes >= unit), (1.0, "bytes"))


def _hours(seconds: float) -> float:
    """Hours; NaN, which is not drawn, for a run that never ends."""
    return seconds / _HOUR if seconds <= LONGEST else math.nan
