"""How a command ends: with an error as a message and an exit status, or interrupted.

Owns the form in which errors are shown, as text and as JSON.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ckpt_tools.cli.signals import STATUSES, is_later_rank, is_rank, speak_undisturbed
from ckpt_tools.cli.text import print_json, say
from ckpt_tools.errors import CkptError
from ckpt_tools.storage.patience import be_patient

if TYPE_CHECKING:
    from ckpt_tools.ranks import Ranks

# Key of the ranks in the context of the command.
_LONGEST_FACT = 1_000
_RANKS = "ckpt_tools.ranks"

F = TypeVar("F", bound=Callable[..., Any])


def reports_errors(function: F, trouble: int = 1, goes_on: bool = False) -> F:
    """End the command with a message and the error's exit status instead of a traceback.

    Args:
        function: the command.
        trouble: the exit status after a failure that was not foreseen.
        goes_on: whether the same command goes on where an interruption stopped it.
    """

    @functools.wraps(function)
    def run(*args: Any, debug: bool, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except CkptError as error:
            speak_undisturbed()
            if debug:
                print_traceback()
                sys.exit(1)
            if not _is_told_elsewhere():
                if kwargs.get("as_json") or kwargs.get("form") == "json":
                    print_json({"error": _as_json(error)})
                _print_error(error)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            _say_what_is_left(kwargs.get("out"), goes_on)
            sys.exit(130)
        except SystemExit as end:
            if end.code in STATUSES:
                _say_what_is_left(kwargs.get("out"), goes_on)
            raise
        except BrokenPipeError:
            # The reader of our output is gone (`ckpt-tools inspect | head`).
            sys.stderr.close()
            sys.exit(141)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            speak_undisturbed()
            if debug:
                print_traceback()
            else:
                _print_unforeseen(error)
            sys.exit(trouble)

    return run  # type: ignore[return-value]


def _is_told_elsewhere(by_default: bool = False) -> bool:
    """Whether another rank reports why the command ends; ``by_default`` if no session failed."""
    ranks: Ranks | None = click.get_current_context().meta.get(_RANKS)
    told = None if ranks is None else ranks.told_elsewhere
    return by_default if told is None else told


def _say_what_is_left(out: Path | str | None, goes_on: bool) -> None:
    """Report what an interruption left behind; only one of several ranks reports it."""
    from ckpt_tools.writing.publish import how_to_go_on, leftovers

    if _is_told_elsewhere(by_default=is_later_rank()):
        return
    if goes_on:
        say("Interrupted. The same command goes on where it was.", err=True)
        return
    left = leftovers(out) if isinstance(out, Path) else []
    kept = "".join(f". {how_to_go_on(path)}" for path in left) or "; nothing was left behind."
    say(f"Interrupted{kept}", err=True)


def joined_ranks(timeout: float) -> Ranks | None:
    """The ranks of the torchrun that started this process; None without torchrun."""
    be_patient(timeout)
    if not is_rank():
        return None
    # torch prints a stack for each broken connection; our error says what it means.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from ckpt_tools.ranks import from_environment

    ranks = click.get_current_context().meta[_RANKS] = from_environment(timeout)
    if ranks is not None:
        ranks.await_all()
    return ranks


def print_traceback() -> None:
    """Print where the error that is handled came from."""
    for line in traceback.format_exc().splitlines():
        say(line, err=True)


def _print_unforeseen(error: Exception) -> None:
    """Report an error that nobody foresaw."""
    fact = f"an unforeseen failure ({type(error).__name__}: {error})"
    say(fact[:_LONGEST_FACT], label="error: ", color="red", bold=True, err=True)
    hint = "Please report what the same command prints with --debug."
    say(hint, label="  next: ", err=True)


def _print_error(error: CkptError) -> None:
    say(error.fact, label="error: ", color="red", bold=True, err=True)
    if error.where is not None:
        say(error.where, label="  in: ", err=True)
    if error.tensor is not None:
        say(str(error.tensor), label="  tensor: ", err=True)
    if error.hint:
        say(str(error.hint), label="  next: ", err=True)


def _as_json(error: CkptError) -> dict[str, Any]:
    return {
        "kind": type(error).__name__,
        "fact": error.fact,
        "path": error.where,
        "tensor": error.tensor,
        "hint": error.hint,
        "exit_code": error.exit_code,
        "missing": list(getattr(error, "missing", ())),
        "choices": list(getattr(error, "choices", ())),
    }
