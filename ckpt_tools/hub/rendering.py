"""Owns the process that renders a chat template, and what it may use of time, memory and text.

A template can compute in one step of the interpreter, such as a power, which no signal handler ends. So a
process of its own renders it, and is killed.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 20
# Address space that the process may add, and the longest text that is looked at.
_BYTES, _TEXT = 1 << 30, 1 << 22


def in_time(render: Callable[[], object]) -> dict[str, Any]:
    """What ``render`` returns, as ``text``, or its ``failure``.

    Returns:
        ``text``; or ``failure``, and whether it is ``certain`` for every conversation. ``refuses`` says that
        the template itself raised the failure.

    Raises:
        ImportError: the template needs another version of a library.
    """
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        _limit_memory(_BYTES)
        # For a parent that is killed first. It is the longer limit, so that the parent knows the reason.
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS + 1, SECONDS + 1))
        with os.fdopen(writer, "wb") as answers:
            answers.write(json.dumps(_attempt(render)).encode())
        os.kill(os.getpid(), signal.SIGKILL)  # nothing of the parent's is to run at its exit
    os.close(writer)
    try:
        written = _read_until(reader, time.monotonic() + SECONDS)
    finally:
        os.close(reader)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    if written is None:
        return {"failure": f"it was not rendered within {SECONDS} seconds", "certain": True}
    if not written:
        return {"failure": "rendering it ends the process", "certain": True}
    answer: dict[str, Any] = json.loads(written)
    if "missing" in answer:
        raise ImportError(answer["missing"])
    return answer


def _limit_memory(more: int) -> None:
    """Let this process take ``more`` bytes beyond what it has; it shares what its parent has imported."""
    # The sixth number is pages of data and stack: see proc_pid_statm(5).
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    most = pages * resource.getpagesize() + more
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard == resource.RLIM_INFINITY or most < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _attempt(render: Callable[[], object]) -> dict[str, Any]:
    import jinja2

    try:
        text = str(render())
    except jinja2.TemplateSyntaxError as error:
        return {"failure": f"{error.message} (line {error.lineno})", "certain": True}
    except ImportError as error:  # of a recent Jinja
        return {"missing": str(error)}
    except MemoryError:
        return {"failure": "it takes more than a gigabyte of memory", "certain": True}
    except Exception as error:  # a template raises errors of any class
        refuses = type(error) is jinja2.TemplateError
        reason = str(error) or type(error).__name__
        return {"failure": reason, "certain": False, "refuses": refuses}
    if len(text) > _TEXT:
        return {"failure": "it makes megabytes of a short conversation", "certain": True}
    return {"text": text}


def _read_until(reader: int, end: float) -> bytes | None:
    """All bytes of a pipe; None if its writer does not end in time."""
    parts: list[bytes] = []
    while select.select([reader], [], [], max(end - time.monotonic(), 0))[0]:
        part = os.read(reader, 1 << 16)
        if not part:
            return b"".join(parts)
        parts.append(part)
    return None
