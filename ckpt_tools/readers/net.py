"""Owns the net for what a reader does not expect: an error that says which file, instead of a traceback.

Pickled metadata may have any form. A form that a reader does not expect is damage to the file, not an error
in the reader. ``--debug`` shows where it came from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ckpt_tools.errors import CkptError, DamagedCheckpoint

_LONGEST = 300


@contextmanager
def unexpected_is_damage(path: Path, format: str) -> Iterator[None]:
    """Turn an error of a reader into one about the checkpoint.

    Args:
        path: the directory or file that is read.
        format: name of the format that it is read as.

    Raises:
        DamagedCheckpoint: the code within raised something else than a :class:`CkptError`.
    """
    try:
        yield
    except CkptError:
        raise
    except OSError as error:
        raise DamagedCheckpoint(
            f"cannot be read ({error.strerror or error})",
            path=error.filename if isinstance(error.filename, str) else path,
            hint="Check that the file still exists and its permissions, and try again.",
        ) from error
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RecursionError,
        StopIteration,
        TypeError,
        ValueError,
    ) as error:
        said = f"{type(error).__name__}: {error}"[:_LONGEST]
        raise DamagedCheckpoint(
            f"its metadata does not have the form of {format} ({said})",
            path=path,
            hint="If the files were changed after they were saved, copy them anew. If not, their layout is "
            "not known: please report it with what --debug shows.",
        ) from error
