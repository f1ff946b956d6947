"""What the commands that write a model directory share: their options, and how they report.

Each such command is one library call; this module owns the words in which it is asked and answered.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ckpt_tools.cli.progress import shown_progress
from ckpt_tools.cli.shared import (
    also_option,
    count_text,
    debug_option,
    joined_ranks,
    json_option,
    nbytes_text,
    print_json,
    seconds_text,
)

if TYPE_CHECKING:
    from ckpt_tools.conversion.report import Report

F = TypeVar("F", bound=Callable[..., Any])

_PATH = click.Path(path_type=Path)

_OPTIONS = (
    click.option("--tag", metavar="T", help="Which checkpoint, where CKPT holds several."),
    click.option(
        "--model", type=click.IntRange(min=0), metavar="N", help="Which model of a state."
    ),
    click.option("--format", metavar="F", help="Which format, where the directory fits several."),
    also_option,
    click.option(
        "--dtype",
        type=click.Choice(["auto", "keep", "fp32", "bf16", "fp16"]),
        default="auto",
        show_default=True,
        help="auto: each tensor in its training dtype. keep: each as it lies. Others cast floating tensors.",
    ),
    click.option(
        "--weights",
        type=click.Choice(["master", "model"]),
        default="master",
        show_default=True,
        help="The optimizer's fp32 masters (where there are any), or the 16-bit copy.",
    ),
    click.option(
        "--config",
        type=_PATH,
        metavar="FILE|DIR",
        help="The model's config.json. Default: --like, else near the checkpoint.",
    ),
    click.option(
        "--tokenizer",
        type=_PATH,
        metavar="DIR",
        help="Tokenizer to copy. Default: the same places as the config.",
    ),
    click.option(
        "--generation-config",
        default="auto",
        show_default=True,
        metavar="auto|olmo|none|FILE|DIR",
        help="olmo: greedy, no bos, <|im_end|> and <|endoftext|> end a text. auto: olmo for OLMo models, "
        "else the source's own.",
    ),
    click.option(
        "--like",
        type=_PATH,
        metavar="DIR",
        help="A Hugging Face directory that the output is to be like; frozen tensors that the checkpoint "
        "left out come from it.",
    ),
    click.option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE"),
    click.option(
        "--workers", type=click.IntRange(min=1), metavar="N", help="Threads. Default: one a core."
    ),
    click.option(
        "--check-masters",
        is_flag=True,
        help="Compare all masters with the 16-bit weights, not a sample.",
    ),
    click.option(
        "--weights-only", is_flag=True, help="Write weights alone, under the names that they have."
    ),
    click.option(
        "--no-card",
        "card",
        flag_value=False,
        default=True,
        help="Write no model card (README.md).",
    ),
    click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Run custom code beside the config, in a process of its own, to learn the layout.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace OUT once the new one is complete."),
    click.option("--resume", is_flag=True, help="Go on with what a run that failed has left."),
    click.option("--sha256", is_flag=True, help="Write SHA256SUMS, for sha256sum -c."),
    click.option(
        "--verify", is_flag=True, help="Verify every byte of the output before it appears."
    ),
    click.option(
        "--node-local",
        is_flag=True,
        help="Under torchrun: each machine sees only its own files of CKPT; the ranks pool them.",
    ),
    click.option(
        "--timeout",
        type=click.FloatRange(min=1),
        default=1800,
        show_default=True,
        metavar="SECONDS",
        help="Under torchrun: how long ranks wait for one that makes no progress.",
    ),
    click.option("--dry-run", is_flag=True, help="Check and plan everything, write nothing."),
    click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors (and --json)."),
    json_option,
    debug_option,
)


_OF_MODELS = {
    "card",
    "generation_config",
    "like",
    "max_shard_size",
    "trust_remote_code",
    "weights_only",
}


def adapter_writing_options(function: F) -> F:
    """Those of them that make sense for an adapter, which is one file without a model's config."""
    return _without(_OF_MODELS, writing_options(function))


def mean_writing_options(function: F) -> F:
    """Those of them that make sense for several checkpoints; ``--also`` would not tell whose folder it is."""
    return _without({"also"}, writing_options(function))


def _without(names: set[str], function: F) -> F:
    parameters = function.__click_params__  # type: ignore[attr-defined]
    parameters[:] = [p for p in parameters if p.name not in names]
    return function


def writing_options(function: F) -> F:
    """The options of every command that writes a model directory."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def write_directory(
    convert: Callable[..., Report],
    *,
    check_masters: bool,
    quiet: bool,
    as_json: bool,
    timeout: float,
    **options: Any,
) -> None:
    """Carry out ``convert``, and say what was done."""
    ranks = joined_ranks(timeout)
    leads = ranks is None or ranks.leads
    with shown_progress(quiet or as_json or not leads) as progress:
        report = convert(check_all_masters=check_masters, progress=progress, ranks=ranks, **options)
    if not leads:
        return
    if as_json:
        print_json(report.to_json())
    elif not quiet:
        _show(report)


def _show(report: Any) -> None:
    for note in report.notes:
        click.echo(f"note: {note}")
    for warning in report.warnings:
        click.echo(click.style("warning: ", fg="yellow") + warning, err=True)
    if report.dry_run:
        for file in report.plan:
            click.echo(
                f"{file['file']}: {nbytes_text(file['bytes'])}, {len(file['tensors'])} tensors"
            )
        click.echo(f"Nothing was written to {report.output} (dry run).")
        return
    dtypes = ", ".join(report.dtypes)
    seconds = report.seconds
    rate = report.bytes_written / max(seconds["move"] + seconds["sync"], 1e-9)
    click.echo(
        f"{report.output}: {report.tensors} tensors, {count_text(report.parameters)} parameters, {dtypes}"
    )
    checked = (
        f", {report.checked} masters compared with the 16-bit weights" if report.checked else ""
    )
    click.echo(
        f"{nbytes_text(report.bytes_read)} read, {nbytes_text(report.bytes_written)} written in "
        f"{len(report.files)} files, "
        f"{seconds_text(seconds['total'])} ({nbytes_text(rate)}/s written){checked}"
    )
