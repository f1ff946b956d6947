"""How a signal ends a command: as an exception, so that partial output is removed.

An exception that is raised while the main thread imports torch may get lost in its C code or break the
import. Such a signal waits until the import has ended. Commands let another thread import torch
(:func:`ckpt_tools.tensors.threads.load_torch`), so this is rare.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from ckpt_tools.storage.temporary import remove_all

_AGAIN_SECONDS = 0.05

# The exit status of a command that a signal ended.
STATUSES = frozenset(128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))


def end_on_signals() -> None:
    """Let SIGINT raise ``KeyboardInterrupt``, SIGTERM and SIGHUP ``SystemExit`` with 143 and 129."""
    signal.signal(signal.SIGINT, _end)
    signal.signal(signal.SIGTERM, _end)
    # `nohup` starts a command with SIGHUP ignored.
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _end)


def ignore_signals() -> None:
    """Ignore the signals that end a command: it has ended, and its status is known."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def leave_at_once(status: object) -> None:
    """End the process, where ``status`` is a number or nothing and the streams take what was printed.

    The cleanup is done by then. A normal exit of the interpreter takes a fifth of a second to visit every
    object of torch. It also stops threads that still work or wait for other ranks; one that runs C++ code
    may then abort the process, with status 134 instead of its own.
    """
    if status is not None and not isinstance(status, int):
        return
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        return  # a normal exit reports it
    remove_all()
    os._exit(status or 0)


def is_rank() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_later_rank() -> bool:
    """Whether this process is a rank other than the first, which alone prints."""
    return is_rank() and os.environ.get("RANK", "0") != "0"


def speak_undisturbed() -> None:
    """Ignore SIGTERM under torchrun while an error is printed: torchrun sends it when another rank ends."""
    if is_rank():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end(number: int, frame: FrameType | None) -> None:
    if _imports_torch(frame):
        signal.signal(signal.SIGALRM, lambda _, frame: _end(number, frame))
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
    elif number == signal.SIGINT:
        raise KeyboardInterrupt
    else:
        if number == signal.SIGHUP:
            # A terminal that closes sends it, and the shell that ends with it once more.
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        sys.exit(128 + number)


def _imports_torch(frame: FrameType | None) -> bool:
    """Whether the main thread, which runs ``frame``, is within an import of torch."""
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    if not getattr(spec, "_initializing", False):
        return False
    while frame is not None:
        if frame.f_globals.get("__spec__") is spec:
            return True
        frame = frame.f_back
    return False
