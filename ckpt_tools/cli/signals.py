"""How a signal ends a command: as an exception, so that partial output is removed.

An exception that is raised while torch is imported may get lost in its C code or break the import. Such a
signal waits until the import has ended.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

_AGAIN_SECONDS = 0.05


def end_on_signals() -> None:
    """Let SIGINT raise ``KeyboardInterrupt``, and SIGTERM ``SystemExit`` with status 143."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)


def leave_at_once(status: object) -> None:
    """End the process where ``status`` is that of a signal, or where it is a rank of several.

    The cleanup is done by then. A normal exit of the interpreter stops threads that still work or wait for
    other ranks; one that runs C++ code may then abort the process, with status 134 instead of its own.
    """
    if status in (128 + signal.SIGINT, 128 + signal.SIGTERM) or is_rank():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else int(bool(status)))


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
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    if getattr(spec, "_initializing", False):
        signal.signal(signal.SIGALRM, lambda _, frame: _end(number, frame))
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
    elif number == signal.SIGINT:
        raise KeyboardInterrupt
    else:
        sys.exit(128 + number)
