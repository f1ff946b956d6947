"""Owns links that lead out of the directory. Their targets are not part of it, and do not move with it."""

from __future__ import annotations

from pathlib import Path

from ckpt_tools.hub.links import links_out, remarks_on
from ckpt_tools.verification.run import Run

ORDER = 23


def check(run: Run) -> None:
    """Warn of links out of the directory, and name those of the checkpoint that it is compared with."""
    directory = run.directory
    files = (directory.path / file for file in directory.files)
    for link, target in links_out(files, directory.path).items():
        run.findings.add(
            "link-outside",
            f"it leads to {target}",
            file=link,
            hint="Put copies in the place of links that lead out of the directory.",
        )
    request, checkpoint = run.request, run.checkpoint
    if checkpoint is not None and isinstance(request.against, str | Path):
        held = [checkpoint.location.directory, *checkpoint.files]
        run.findings.checked += remarks_on(held, [request.against, *request.also])
