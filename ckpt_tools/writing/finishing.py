"""Finishes one output after its weights: the other files, manifest, checksums, verification.

Owns their order: each covers everything before it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from ckpt_tools.hub.files import AssetFile
from ckpt_tools.writing import manifest
from ckpt_tools.writing.bytes import refused
from ckpt_tools.writing.manifest import Provenance
from ckpt_tools.writing.output import Output, Writing

# The content of a marker. Some services do not upload empty files.
MARKER = b"COMPLETED\n"


class Checks(Protocol):
    """The last checks before an output appears; a failed one raises."""

    def refuse_changed(self) -> None:
        """Raise DamagedCheckpoint if a source was changed while it was read."""

    def refuse_wrong(self, directory: Path, writing: Writing) -> None:
        """Raise VerificationFailed if a complete directory is wrong."""


def finish(
    directory: Path,
    output: Output,
    digests: Mapping[str, str],
    unit_bytes: int,
    provenance: Provenance,
    writing: Writing,
    checks: Checks,
) -> None:
    """Write every file of an output but its weights, and verify it if asked.

    Args:
        directory: the directory; its weights are already written.
        output: the planned output.
        digests: the digest of each tensor.
        unit_bytes: size of the units of the digests.
        provenance: the sources of the output.
        writing: how it is written.
        checks: verifies the directory, if asked.

    Raises:
        OutputFailed: the disk refused.
        VerificationFailed: verify found it wrong.
    """
    for asset in output.files:
        _write_asset(directory, asset)
    if writing.marker is not None:
        _write_asset(directory, AssetFile(writing.marker, MARKER))
    path = directory / manifest.NAME
    try:
        with path.open("wb") as stream:
            stream.writelines(
                manifest.manifest_parts(
                    directory,
                    output.layout,
                    provenance,
                    unit_bytes=unit_bytes,
                    digests=digests,
                )
            )
    except OSError as error:
        raise refused(error, path) from error
    if writing.sha256:
        sums = manifest.sums_text(directory, writing.workers, writing.active)
        _write_asset(directory, AssetFile(manifest.SUMS_NAME, sums.encode()))
    if writing.verify:
        checks.refuse_wrong(directory, writing)


def _write_asset(directory: Path, asset: AssetFile) -> None:
    path = directory / asset.name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if asset.content is not None:
            path.write_bytes(asset.content)
        elif asset.source is not None:
            shutil.copyfile(asset.source, path)
    except OSError as error:
        raise refused(error, path) from error
