"""Owns the way of an output to a store: it is made on this machine, then uploaded.

The directory on this machine is complete and, if that was asked for, verified before the first byte is sent.
It is removed after the upload. After a failed upload it is kept, and ``--resume`` sends what is missing.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import xxhash

from ckpt_tools._version import __version__
from ckpt_tools.conversion.report import Report
from ckpt_tools.conversion.request import Request
from ckpt_tools.conversion.staging import alone_in
from ckpt_tools.errors import CkptError, UsageError
from ckpt_tools.storage.addresses import Address, PathLike, parsed
from ckpt_tools.storage.naming import as_path
from ckpt_tools.tensors.checkpoint import Checkpoint

_MANIFEST = "ckpt_tools_manifest.json"
Sources = Sequence[PathLike | Checkpoint]

_WRITABLE = ("s3", "gs", "az", "hf")


def sent(sources: Sources, request: Request, convert: Callable[[Request], Report]) -> Report:
    """Carry out a request, and upload its output where it asks for that.

    Args:
        sources: the checkpoints.
        request: what was asked.
        convert: makes the output on this machine.

    Raises:
        CkptError: see :mod:`ckpt_tools.errors`.
    """
    if request.skip_complete and (request.destination or request.push_to_hub):
        raise UsageError(
            "--skip-complete looks at an OUT on this machine, and nothing is known of what was uploaded",
            hint="Leave out --skip-complete.",
        )
    if request.push_to_hub is not None:
        return _pushed(request, convert)
    address = request.destination
    if address is None:
        if request.private or request.revision is not None or request.scratch is not None:
            raise UsageError(
                "--scratch, --private and --revision are for an output that is uploaded",
                hint="Name an address as OUT, or add --push-to-hub ORG/REPO.",
            )
        return convert(request)
    if address.scheme not in _WRITABLE:
        raise UsageError(
            f"{address.scheme}:// cannot be written",
            path=str(address),
            hint="Name an OUT of s3://, gs://, az:// or hf://, or a folder of this machine.",
        )
    if request.revision is not None:
        raise UsageError(
            "--revision is for --push-to-hub", hint=f"Name the branch in OUT: {address.root}."
        )
    return _uploaded(address, sources, request, convert)


def _uploaded(
    address: Address, sources: Sources, request: Request, convert: Callable[[Request], Report]
) -> Report:
    with alone_in(request.output.parent):
        return _made_and_sent(address, sources, request, convert)


def _made_and_sent(
    address: Address, sources: Sources, request: Request, convert: Callable[[Request], Report]
) -> Report:
    home = request.output.parent
    record = home / "uploaded.json"
    signature = _signature(sources, request)
    earlier = _earlier(request, signature) if request.resume else None
    if earlier is None:
        _forget(home, keep_partial=request.resume)
        if not request.overwrite:
            _refuse_existing(address, request, record)
        report = convert(replace(request, overwrite=True, destination=None, scratch=None))
        if request.dry_run:
            return replace(report, output=str(address))
        _note(home, request, report, signature)
    else:
        report = earlier
    try:
        notes = _send(address, request, request.output, record)
    except CkptError as error:
        kept = (
            f"The finished directory is kept in {request.output}. --resume sends what is missing."
        )
        error.hint = f"{error.hint} {kept}" if error.hint else kept
        raise
    _forget(home, keep_partial=False)
    return replace(report, output=str(address), notes=(*report.notes, *notes))


def _pushed(request: Request, convert: Callable[[Request], Report]) -> Report:
    if request.destination is not None:
        raise UsageError(
            "--push-to-hub uploads an OUT that is a folder of this machine",
            hint="Name the repository either as OUT or with --push-to-hub.",
        )
    if not re.fullmatch(r"[^/:@]+/[^/:@]+", request.push_to_hub or ""):
        raise UsageError(
            f"{request.push_to_hub!r} is not the name of a repository of the Hub",
            hint="Pass --push-to-hub ORG/REPO; --revision names another branch than main.",
        )
    revision = f"@{request.revision.replace('/', '%2F')}" if request.revision else ""
    address = parsed(f"hf://{request.push_to_hub}{revision}")
    if not request.overwrite and not request.resume:
        _refuse_existing(address, request, None)
    report = convert(replace(request, push_to_hub=None, revision=None, private=False, scratch=None))
    if request.dry_run:
        return report
    try:
        notes = _send(address, request, request.output, None)
    except CkptError as error:
        kept = f"{request.output} is complete. hf upload sends it, too."
        error.hint = f"{error.hint} {kept}" if error.hint else kept
        raise
    return replace(report, notes=(*report.notes, *notes))


def _refuse_existing(address: Address, request: Request, record: Path | None) -> None:
    from ckpt_tools.storage.remote.trees import patience

    if address.scheme == "hf":
        from ckpt_tools.storage.remote.commit import HubOutput

        HubOutput(address, request.private, patience()).refuse_existing()
        return
    from ckpt_tools.storage.remote.upload import BucketOutput, read_record

    done = read_record(record) if record is not None else {}
    BucketOutput(address, patience()).refuse_existing(done)


def _send(
    address: Address, request: Request, directory: Path, record: Path | None
) -> tuple[str, ...]:
    from ckpt_tools.storage.remote.trees import patience

    if address.scheme == "hf":
        from ckpt_tools.storage.remote.commit import HubOutput

        message = f"{request.command} of ckpt-tools {__version__}"
        output = HubOutput(address, request.private, patience())
        return (f"uploaded as one commit: {output.upload(directory, message, request.overwrite)}",)
    from ckpt_tools.storage.remote.upload import BucketOutput

    assert record is not None
    sizes = [path.stat().st_size for path in directory.rglob("*") if path.is_file()]
    total = sum(sizes)

    def sent_bytes(done: int) -> None:
        request.active()
        if request.progress is not None:
            request.progress(done, total)

    BucketOutput(address, patience()).upload(directory, record, sent_bytes)
    return (f"uploaded: {total:,} bytes in {len(sizes)} files",)


def _signature(sources: Sources, request: Request) -> str:
    """A digest of what was asked of which files, but for how it is carried out."""
    asked = replace(request, progress=None, ranks=None, resume=False, overwrite=False, workers=1)
    files = [file for source in sources for file in _files_of(source)]
    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
    return xxhash.xxh3_128_hexdigest(f"{__version__} {asked!r} {facts!r}".encode())


def _files_of(source: PathLike | Checkpoint) -> list[Path]:
    if isinstance(source, Checkpoint):
        return list(source.files)
    path = as_path(source)
    return [each for each in (path, *path.rglob("*")) if each.is_file()]


def _note(home: Path, request: Request, report: Report, signature: str) -> None:
    """Record that the directory is complete."""
    manifest = (request.output / _MANIFEST).read_bytes()
    content = {
        "request": signature,
        "manifest": xxhash.xxh3_128_hexdigest(manifest),
        "report": json.loads(json.dumps(asdict(replace(report, plan=())), default=str)),
    }
    (home / "complete.json").write_text(json.dumps(content), encoding="utf-8")


def _earlier(request: Request, signature: str) -> Report | None:
    """The report of the complete directory that an earlier run of the same request left."""
    try:
        content = json.loads((request.output.parent / "complete.json").read_bytes())
        manifest = (request.output / _MANIFEST).read_bytes()
        if content["request"] != signature:
            return None
        if content["manifest"] != xxhash.xxh3_128_hexdigest(manifest):
            return None
        report = Report(**content["report"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return replace(report, notes=tuple(report.notes), warnings=tuple(report.warnings), plan=())


def _forget(home: Path, keep_partial: bool) -> None:
    """Remove what an earlier run left; its partial directory can be continued."""
    for path in home.iterdir():
        if not (keep_partial and path.name.startswith("output.partial-")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
