"""Owns whether the code that a directory names lies in it.

``auto_map`` may name a class of another repository, as ``owner/name--module.Class``. Loaders fetch and run
that code as it is on the day of the load, whoever owns the repository then.
"""

from __future__ import annotations

from pathlib import Path

from ckpt_tools.errors import listed
from ckpt_tools.hub.custom_code import hub_repositories
from ckpt_tools.storage.naming import as_path
from ckpt_tools.verification.directory import read_object
from ckpt_tools.verification.problem import Findings
from ckpt_tools.verification.run import Run

ORDER = 21
FILES = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)


def check(run: Run) -> None:
    """Note every file that names code of another repository; a warning if ``like`` names the same."""
    directory = run.directory
    for file in FILES:
        if file not in directory.root_files:
            continue
        data = read_object(directory, file, "config-invalid", Findings()) or {}
        repositories = set(hub_repositories(data.get("auto_map")))
        if not repositories:
            continue
        like = run.request.like
        same = like is not None and repositories <= _named_in(as_path(like) / file)
        run.findings.add(
            "code-of-another-repository",
            f"auto_map names code of {listed(sorted(repositories))}",
            file=file,
            severity="warning" if same else None,
            hint="Copy the code into the directory, and name its classes as module.Class.",
        )


def _named_in(path: Path) -> set[str]:
    from ckpt_tools.errors import CkptError
    from ckpt_tools.hub.files import read_object as read

    try:
        return set(hub_repositories(read(path).get("auto_map")))
    except CkptError:
        return set()
