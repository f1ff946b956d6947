"""What every command shares: how errors end it, how numbers are written, how JSON is printed."""

from __future__ import annotations

import functools
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ckpt_tools.cli.signals import is_later_rank, is_rank, speak_undisturbed
from ckpt_tools.errors import CkptError

if TYPE_CHECKING:
    from rich.console import Console

    from ckpt_tools.ranks import Ranks

F = TypeVar("F", bound=Callable[..., Any])

_LOG_WIDTH = 160

debug_option = click.option("--debug", is_flag=True, help="Show a traceback for every error.")
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout."
)

also_option = click.option(
    "--also",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="DIR",
    help="A further folder with files of CKPT, such as another machine's; repeatable.",
)


def adapter_options(adapter_help: str) -> Callable[[F], F]:
    """The options that name an adapter and its config."""

    def add(function: F) -> F:
        for option in (
            click.option(
                "--lora-alpha",
                type=float,
                metavar="X",
                help="lora_alpha of the training run, where no config says it.",
            ),
            click.option(
                "--adapter-config",
                type=click.Path(path_type=Path),
                metavar="FILE|DIR",
                help="The adapter's adapter_config.json. Default: near the checkpoint.",
            ),
            click.option("--adapter", metavar="NAME", help=adapter_help),
        ):
            function = option(function)
        return function

    return add


def reports_errors(function: F) -> F:
    """End the command with a message and the error's exit status instead of a traceback."""

    @functools.wraps(function)
    def run(*args: Any, debug: bool, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except CkptError as error:
            speak_undisturbed()
            if debug:
                raise
            if not error.told_elsewhere:
                if kwargs.get("as_json"):
                    print_json({"error": _as_json(error)})
                _print_error(error)
            sys.exit(error.exit_code)
        except KeyboardInterrupt as end:
            _say_what_is_left(kwargs.get("out"), end)
            sys.exit(130)
        except SystemExit as end:
            if end.code == 128 + signal.SIGTERM:
                _say_what_is_left(kwargs.get("out"), end)
            raise
        except BrokenPipeError:
            # The reader of our output is gone (`ckpt-tools inspect | head`).
            sys.stderr.close()
            sys.exit(141)

    return run  # type: ignore[return-value]


def _say_what_is_left(out: Path | None, end: BaseException) -> None:
    """After an interruption; of several ranks one speaks."""
    from ckpt_tools.writing.publish import how_to_go_on, leftovers

    if getattr(end, "told_elsewhere", is_later_rank()):
        return
    left = leftovers(out) if out is not None else []
    kept = "".join(f". {how_to_go_on(path)}" for path in left) or "; nothing was left behind."
    click.echo(f"Interrupted{kept}", err=True)


def joined_ranks(timeout: float) -> Ranks | None:
    """The ranks of the torchrun that started this process, if one did."""
    if not is_rank():
        return None
    # Of a connection that breaks torch tells each stack frame; what it means is told by our error.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from ckpt_tools.ranks import from_environment

    return from_environment(timeout)


def _print_error(error: CkptError) -> None:
    click.echo(click.style("error: ", fg="red", bold=True) + error.fact, err=True)
    if error.path is not None:
        click.echo(f"  in: {error.path}", err=True)
    if error.tensor is not None:
        click.echo(f"  tensor: {error.tensor}", err=True)
    if error.hint:
        click.echo(f"  next: {error.hint}", err=True)


def _as_json(error: CkptError) -> dict[str, Any]:
    return {
        "kind": type(error).__name__,
        "fact": error.fact,
        "path": None if error.path is None else str(error.path),
        "tensor": error.tensor,
        "hint": error.hint,
        "exit_code": error.exit_code,
        "missing": list(getattr(error, "missing", ())),
        "choices": list(getattr(error, "choices", ())),
    }


def print_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    click.echo(json.dumps(value, indent=2))


def drawn(draw: Callable[[Console], None]) -> str:
    """What is drawn on a console as wide as the terminal, or as a log where there is none."""
    from rich.console import Console

    is_terminal = sys.stdout.isatty()
    text = io.StringIO()
    width = None if is_terminal else _LOG_WIDTH
    draw(Console(file=text, force_terminal=is_terminal, highlight=False, width=width))
    # A table fills its lines up with spaces.
    return "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())


def nbytes_text(nbytes: float) -> str:
    """Bytes for a person, in decimal units as ``--max-shard-size`` takes them."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"


def count_text(count: int) -> str:
    """A number of parameters for a person."""
    for limit, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if count >= limit:
            return f"{count:,} ({count / limit:.3g} {unit})"
    return f"{count:,}"


def seconds_text(seconds: float) -> str:
    """A duration for a person."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
