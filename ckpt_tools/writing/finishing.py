"""Finishes one output whose weights are written: its other files, manifest, checksums, verification.

Owns their order: each is of everything before it. Knows nothing of units, journals, ranks, or how an
output gets its name.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from ckpt_tools.errors import VerificationFailed
from ckpt_tools.hub.files import AssetFile
from ckpt_tools.writing import manifest
from ckpt_tools.writing.bytes import refused
from ckpt_tools.writing.manifest import Provenance
from ckpt_tools.writing.output import Output, Writing


def finish(
    directory: Path,
    output: Output,
    digests: Mapping[str, str],
    unit_bytes: int,
    provenance: Provenance,
    writing: Writing,
) -> None:
    """Write everything of an output but its weights, and take the last look at it.

    Args:
        directory: where it is made; its weights are written.
        output: what it is.
        digests: the digest of each tensor.
        unit_bytes: where tensors were cut for their digests.
        provenance: what it was made of.
        writing: what is wanted beside it.

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
        _verify(directory, writing)


def _verify(directory: Path, writing: Writing) -> None:
    from ckpt_tools.verification import verify

    verdict = verify(directory, read_data=True, workers=writing.workers, progress=writing.active)
    errors = [problem for problem in verdict.problems if problem.severity == "error"]
    if errors:
        first = errors[0]
        more = f", and {len(errors) - 1} more problems" if len(errors) > 1 else ""
        raise VerificationFailed(
            f"verify found the output wrong: {first.kind}: {first.detail}{more}",
            path=first.file,
            tensor=first.tensor,
            hint="Nothing was published. Write it without --verify, then run ckpt-tools verify on it "
            "for the whole list.",
        )


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
