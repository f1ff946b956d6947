"""Owns the question whether an output is complete, and whether the same request has made it.

An output appears by one rename, with its manifest: the manifest is the mark of completion. It holds a digest
of the request: the command, every option that decides what is written, and the names, sizes and times of the
files that are read.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import xxhash

from ckpt_tools.conversion.request import Request
from ckpt_tools.errors import UsageError
from ckpt_tools.storage.naming import as_path
from ckpt_tools.tensors.checkpoint import LIVE, Checkpoint
from ckpt_tools.writing.manifest import NAME, SUMS_NAME
from ckpt_tools.writing.output import Output

# How the request is carried out, and not what is written; `search` and `also` are told by the files in them.
_NOT_OF_THE_OUTPUT = {
    *("output", "workers", "dry_run", "overwrite", "progress", "resume", "verify", "ranks"),
    *("check_source", "check_all_masters", "strict", "node_local", "resumable", "skip_complete"),
    *("search", "also", "tag", "model", "source_format"),
    *("destination", "scratch", "push_to_hub", "revision", "private"),
}
# Files near a checkpoint that may become part of the output, or that decide what it is.
_ASSETS = {
    *("config.json", "generation_config.json", "adapter_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja"),
    *("chat_template.json", "processor_config.json", "preprocessor_config.json"),
}
_ASSET_STEMS = ("tokenizer", "vocab", "spiece", "sentencepiece")


def digest_of(sources: Sequence[Checkpoint], request: Request) -> str | None:
    """A digest of everything that decides what a request writes; None for a model in training."""
    if any(source.location.format == LIVE for source in sources):
        return None
    options = {
        each.name: _plain(getattr(request, each.name))
        for each in fields(request)
        if each.name not in _NOT_OF_THE_OUTPUT
    }
    read = [
        [
            source.location.format,
            str(source.location.directory.absolute()),
            source.location.name,
            source.location.part,
            [_stamp(file) for file in sorted(source.files)],
        ]
        for source in sources
    ]
    near = [_stamp(file) for folder in request.search for file in _assets(folder)]
    return xxhash.xxh3_128_hexdigest(json.dumps([options, read, near]).encode())


def _plain(value: Any) -> Any:
    """An option as a JSON value; a path with the stamps of what lies there."""
    if isinstance(value, Path) or (isinstance(value, str) and os.path.exists(value)):
        path = as_path(value)
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        return [str(path.absolute()), *(_stamp(each) for each in inside)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    return value


def _stamp(file: Path) -> list[object]:
    try:
        found = file.stat()
    except OSError:
        return [str(file)]
    if stat.S_ISDIR(found.st_mode):
        return [str(file)]
    return [str(file), found.st_size, found.st_mtime_ns]


def _assets(folder: Path) -> Iterator[Path]:
    try:
        inside = sorted(folder.iterdir())
    except OSError:
        return
    for file in inside:
        if file.name in _ASSETS or file.name.startswith(_ASSET_STEMS):
            yield file


def held_complete(output: Path, asked: str | None) -> dict[str, int] | None:
    """Bytes of each file of a complete output that the same request has made; None if there is none.

    Args:
        output: the directory. Adapters in its folders have manifests of their own.
        asked: the digest of the request.
    """
    if asked is None:
        return None
    sizes: dict[str, int] = {}
    manifests = [*output.glob(NAME), *output.glob(f"*/{NAME}")]
    for path in manifests:
        content = read_manifest(path)
        if content is None or content.get("request") != asked:
            return None
        folder = path.parent
        sizes[path.relative_to(output).as_posix()] = path.stat().st_size
        for name, record in content["files"].items():
            file = folder / name
            if not file.is_file() or file.stat().st_size != record["bytes"]:
                return None
            sizes[file.relative_to(output).as_posix()] = record["bytes"]
    return sizes or None


def read_manifest(path: Path) -> Mapping[str, Any] | None:
    """The manifest in a file; None if there is none, or if it is damaged."""
    try:
        content = json.loads(path.read_bytes())
        own = content["xxh3_128"]
        text = json.dumps({**content, "xxh3_128": ""}, indent=1, ensure_ascii=False) + "\n"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return content if own == xxhash.xxh3_128_hexdigest(text.encode()) else None


def refuse_marker(marker: str | None, outputs: Sequence[Output]) -> None:
    """Raise UsageError for a marker that is not the name of a new file of the output."""
    if marker is None:
        return
    taken = {Path(name).name for output in outputs for name in output.sizes} | {NAME, SUMS_NAME}
    if marker in taken or marker in ("", ".", "..") or Path(marker).name != marker:
        raise UsageError(
            f"the marker {marker!r} is "
            + ("another file of the output" if marker in taken else "not a file name"),
            hint="Pass --marker with a name such as COMPLETED.",
        )
