"""Owns the number of worker threads, how they share the cores, and how a signal ends a wait for them.

Python raises a signal's exception in the main thread alone. The main thread must not be in an import of torch
then, and must not wait for threads that are.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from ckpt_tools.storage.reading import is_near

MAX_WORKERS = 16
# So few files are read in turn, because threads take time to start.
_FEW_FILES = 4
_MOST_REQUESTS = 32

S = TypeVar("S")
T = TypeVar("T")


def default_workers() -> int:
    """One worker for each processor that this process may use, up to 16."""
    return min(len(os.sched_getaffinity(0)), MAX_WORKERS)


@contextmanager
def pool(workers: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Threads that an error waits for, and an interruption does not.

    What is not begun is cancelled in both cases. After an interruption a thread may work on until it looks at
    whatever tells it to stop, so the block must not close what the threads use.

    Args:
        workers: number of threads.
    """
    threads = ThreadPoolExecutor(workers)
    try:
        yield threads
    except (Exception, GeneratorExit):
        threads.shutdown(cancel_futures=True)
        raise
    except BaseException:
        threads.shutdown(wait=False, cancel_futures=True)
        raise
    threads.shutdown()


def read_each(read: Callable[[S], T], sources: Sequence[S]) -> list[T]:
    """Read metadata of many files in threads, because a shared file system is slow for each of them.

    What is read stays, so the garbage collector does not look at it.

    Args:
        read: reads one.
        sources: the files.

    Raises:
        CkptError: the error of the first file in order that :func:`read` refuses.
    """
    with garbage_kept():
        if len(sources) < _FEW_FILES:
            return [read(source) for source in sources]
        with pool(threads_for(sources)) as threads:
            return list(threads.map(read, sources))


def threads_for(sources: Iterable[object]) -> int:
    """The number of threads that read metadata of files: more for a store, where each request takes long."""
    first = next((source for source in sources if isinstance(source, Path)), None)
    return MAX_WORKERS if first is None or is_near(first) else _MOST_REQUESTS


# The import of torch, where another thread than the main one made it.
_import: Future[None] | None = None


def load_torch() -> None:
    """Import torch; a signal ends the wait for it at once.

    The import takes seconds, mostly in C code, where no signal is seen. An exception that is raised between
    may get lost, or break the import. So the main thread lets another thread import.
    """
    if threading.current_thread() is threading.main_thread():
        begin_torch()
        if _import is not None:
            _import.result()
    import torch  # noqa: F401  (waits where another thread imports it)


def begin_torch() -> None:
    """Let another thread import torch while this one waits for metadata of a store."""
    global _import
    if "torch" not in sys.modules and _import is None:
        _import = Future()
        threading.Thread(target=_import_torch, args=(_import,), name="import", daemon=True).start()


def _import_torch(done: Future[None]) -> None:
    try:
        with garbage_kept():
            import torch  # noqa: F401
    except BaseException as error:
        done.set_exception(error)
    else:
        done.set_result(None)


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Switch the garbage collector off, while many objects are made that stay.

    Each of its runs visits all of them: it doubles the time to read a million entries of metadata, and takes
    a tenth of the import of torch.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def casting_on_one_core() -> Iterator[None]:
    """Let torch use one thread for each cast or sum, while several workers run.

    The workers already use all cores. A sum in several threads has no fixed order of additions.
    """
    load_torch()
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
