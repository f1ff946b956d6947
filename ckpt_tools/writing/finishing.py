"""Finishes one output after its weights: the other files, manifest, checksums, verification.

Owns their order: each covers everything before it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from ckpt_tools.hub.files import AssetFile
from ckpt_tools.writing import manifest
from ckpt_tools.writing.bytes import refused
from ckpt_tools.writing.manifest import Provenance
from ckpt_tools.writing.output import Output, Writing

Verify = Callable[[Path, Writing], None]


def finish(
    directory: Path,
    output: Output,
    digests: Mapping[str, str],
    unit_bytes: int,
    provenance: Provenance,
    writing: Writing,
    verify: Verify,
) -> None:
    """Write every file of an output but its weights, and verify it if asked.

    Args:
        directory: the directory; its weights are already written.
        output: the planned output.
        digests: the digest of each tensor.
        unit_bytes: size of the units of the digests.
        provenance: the sources of the output.
        writing: how it is written.
        verify: raises if the directory is wrong.

    Raises:
        OutputFailed: the disk refused.
        VerificationFailed: verify found it wrong.
    """
    for asset in output.files:
        _write_asset(directory, asset)
    text = manifest.manifest_text(
        directory,
        output.layout,
        provenance,
        unit_bytes=unit_bytes,
        digests=digests,
    )
    _write_asset(directory, AssetFile(manifest.NAME, text.encode()))
    if writing.sha256:
        sums = manifest.sums_text(directory, writing.workers, writing.active)
        _write_asset(directory, AssetFile(manifest.SUMS_NAME, sums.encode()))
    if writing.verify:
        verify(directory, writing)


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
