"""Owns the answers of transformers that the commands of one run of the tests share.

A command that starts as a user starts it asks transformers in a new interpreter, which takes seconds of the
processor. Tests of something else let it keep the answer for the next one. No other run sees the answers.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Mapping

_DIRECTORY = "CKPT_TOOLS_TEST_ANSWERS"


def share_answers() -> None:
    """Make the directory, which the processes that pytest-xdist starts share."""
    if _DIRECTORY not in os.environ:
        os.environ[_DIRECTORY] = tempfile.mkdtemp(prefix="ckpt-tools-answers-")
        atexit.register(shutil.rmtree, os.environ[_DIRECTORY], ignore_errors=True)


def shared_answers() -> Mapping[str, str]:
    """Variables for a command that may keep its answers there."""
    return {"CKPT_TOOLS_CACHE": os.environ[_DIRECTORY]}
