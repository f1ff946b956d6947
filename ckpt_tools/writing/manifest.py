"""Owns the text of ``ckpt_tools_manifest.json`` and of ``SHA256SUMS``: sources, options, and all digests.

A tensor's digest covers the bytes that the writer wrote, see :mod:`ckpt_tools.writing.units`. The digest of
any other file covers the file on disk. The last entry is the digest of the manifest itself, with that entry
empty.
``verify`` reads both files with its own code. docs/verify.md has the schema.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from heapq import merge
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

import xxhash

from ckpt_tools._version import __version__
from ckpt_tools.errors import OutputFailed
from ckpt_tools.storage.folders import assets_near
from ckpt_tools.tensors.catalogue import Catalogue, Stored, Tensor
from ckpt_tools.tensors.checkpoint import LIVE, Checkpoint, Copy, Location
from ckpt_tools.tensors.threads import pool
from ckpt_tools.transforms.recipe import Json, Leaf, described, leaf_recipes, leaves_of
from ckpt_tools.writing.layout import Plan, PlannedFile, Slot

NAME = "ckpt_tools_manifest.json"
SUMS_NAME = "SHA256SUMS"
_READ_BYTES = 1 << 20
_PACKAGES = ("torch", "transformers", "safetensors", "peft")
_JSON = json.JSONEncoder(indent=1, ensure_ascii=False)


@dataclass(frozen=True, eq=False)
class Provenance:
    """The origin of an output.

    Attributes:
        command: the command.
        sources: the checkpoints that are read.
        options: the options of the command; ``weights`` is the copy that was taken.
        beside: directories of further tensors, with the tensors.
        request: digest of everything that decides what is written; None for a model in training.
    """

    command: str
    sources: tuple[Checkpoint, ...]
    options: Mapping[str, object]
    beside: Mapping[Path, Catalogue] = field(default_factory=dict)
    request: str | None = None

    def _leaves(self) -> Iterator[dict[Leaf, Tensor]]:
        """The tensors of each source."""
        weights: Copy = "model" if self.options.get("weights") == "model" else "master"
        for index, source in enumerate(self.sources):
            yield leaves_of(index, source, weights)
        for index, catalogue in enumerate(self.beside.values(), start=len(self.sources)):
            yield {Leaf(index, name): tensor for name, tensor in catalogue.items()}

    @cached_property
    def _recipes(self) -> Mapping[int, Json]:
        recipes: dict[int, Json] = {}
        for leaves in self._leaves():
            recipes = leaf_recipes(leaves) | recipes
        return recipes

    def in_both(self, file: Path, other: Path) -> str | None:
        """The name of a source tensor that has parts in both files."""
        for leaf, tensor in chain.from_iterable(leaves.items() for leaves in self._leaves()):
            if isinstance(tensor, Stored):
                files = {fragment.file for fragment in tensor.fragments if fragment.region.numel}
                if {file, other} <= files:
                    return leaf.name
        return None

    def recipe(self, tensor: Tensor) -> Json:
        """The recipe of an output tensor from source tensors."""
        return described(tensor, self._recipes)

    def files(self) -> list[Path]:
        """The files that are read."""
        beside = [file for files in self.files_beside().values() for file in files]
        return [*(path for source in self.sources for path in sorted(source.files)), *beside]

    def files_beside(self) -> dict[Path, list[Path]]:
        """The files that are read of each directory of further tensors."""
        return {directory: _files_of(catalogue) for directory, catalogue in self.beside.items()}

    def identity(self) -> str:
        """Digest of the names, sizes and times of the files that are read."""
        facts: list[tuple[str, int, int]] = []
        for path in self.files():
            try:
                found = path.stat()
                facts.append((path.name, found.st_size, found.st_mtime_ns))
            except OSError:
                facts.append((path.name, 0, 0))
        return xxhash.xxh3_128_hexdigest(json.dumps(facts).encode())

    def to_json(self) -> list[dict[str, Any]]:
        """The sources, as the manifest lists them."""
        listed = [
            {
                **_where(source.location),
                "format": source.location.format,
                "name": source.location.name,
                "title": source.title,
                "part": source.location.part,
                "step": source.step,
                "world_size": source.world_size,
                "framework": source.framework,
            }
            for source in self.sources
        ]
        listed += [{"path": str(path.absolute()), "name": path.name} for path in self.beside]
        return listed


def _where(location: Location) -> dict[str, Any]:
    if location.format == LIVE:
        return {"path": None}
    path = str(location.directory.absolute())
    folders = (str(folder.absolute()) for folder in assets_near(location.directory))
    also = [folder for folder in folders if folder != path]
    return {"path": path, "also": also} if also else {"path": path}


def _files_of(catalogue: Catalogue) -> list[Path]:
    moves = (move for tensor in catalogue.values() for move in tensor.moves(0, tensor.numel))
    return sorted({move.source for move in moves if isinstance(move.source, Path)})


def manifest_parts(
    directory: Path,
    plan: Plan,
    provenance: Provenance,
    *,
    unit_bytes: int,
    digests: Mapping[str, str],
) -> Iterator[bytes]:
    """The manifest of a directory, piece by piece. All other files of the directory must be written before.

    Args:
        directory: the directory, before its publication.
        plan: the layout of its weights.
        provenance: its origin.
        unit_bytes: tensors are cut at multiples of this offset for their digests.
        digests: the digest of each tensor.

    Raises:
        OutputFailed: a file cannot be read back.
    """
    content = {
        "version": 1,
        "tool": f"ckpt-tools {__version__}",
        "command": provenance.command,
        "sources": provenance.to_json(),
        "options": dict(provenance.options),
        "request": provenance.request,
        "versions": _versions(),
        "unit_bytes": unit_bytes,
        "tensors": _tensors(plan, provenance, digests)
        if any(file.slots for file in plan.files)
        else {},
        "files": _files(directory, plan),
    }
    digest = xxhash.xxh3_128()
    for text in chain("{", _members(content.items()), (',\n "xxh3_128": "',)):
        part = text.encode()
        digest.update(part)
        yield part
    end = b'"\n}\n'
    digest.update(end)
    yield digest.hexdigest().encode() + end


def _members(items: Iterable[tuple[str, object]], depth: int = 1) -> Iterator[str]:
    """The members of an object as ``json.dump`` writes them with an indent of 1, piece by piece.

    Of 100,000 tensors the whole text and its values take 150 MB.

    Args:
        items: names and values; an iterator as a value has the members of an object in it, at least one.
        depth: the number of objects around them.
    """
    border, line = "", "\n" + " " * depth
    for name, value in items:
        yield f"{border}{line}{_JSON.encode(name)}: "
        if isinstance(value, Iterator):
            yield from chain("{", _members(value, depth + 1), (f"{line}}}",))
        else:
            yield _JSON.encode(value).replace("\n", line)
        border = ","


def _tensors(
    plan: Plan, provenance: Provenance, digests: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, object]]]:
    """What the manifest says of each tensor, in the order of their names."""
    for name, file, slot in merge(*map(_sorted_slots, plan.files)):
        entry: dict[str, object] = {"file": file, "xxh3_128": digests[name]}
        recipe = provenance.recipe(slot.tensor)
        if recipe != name:
            entry["from"] = recipe
        yield name, entry


def _sorted_slots(file: PlannedFile) -> Iterator[tuple[str, str, Slot]]:
    """Name of the tensor, name of the file, and slot, in the order of the names."""
    for slot in sorted(file.slots, key=attrgetter("name")):
        yield slot.name, file.name, slot


def _files(directory: Path, plan: Plan) -> dict[str, dict[str, object]]:
    """What the manifest says of each file but itself."""
    # Of a file that is closed at the end, the bytes around the data matter as well.
    headers = {file.name: file.header for file in plan.files if file.closing is None}
    files: dict[str, dict[str, object]] = {}
    for name in _names(directory, NAME):
        if name in headers:
            found = {"header_xxh3_128": xxhash.xxh3_128_hexdigest(headers[name])}
        else:
            found = {"xxh3_128": _digest(directory / name, xxhash.xxh3_128())}
        files[name] = {"bytes": (directory / name).stat().st_size, **found}
    return files


def sums_text(directory: Path, workers: int, progress: Callable[[int], None] | None = None) -> str:
    """The output of ``sha256sum`` for all files of a directory, in the order of their names.

    Args:
        directory: the directory.
        workers: number of threads.
        progress: called with the number of bytes after each read, from any worker's thread.

    Raises:
        OutputFailed: a file cannot be read back.
    """
    names = _names(directory, SUMS_NAME)

    def digest(name: str) -> str:
        return _digest(directory / name, hashlib.sha256(), progress)

    with pool(workers) as threads:
        sums = list(threads.map(digest, names))
    return "".join(f"{digest}  {name}\n" for digest, name in zip(sums, names, strict=True))


def _names(directory: Path, own: str) -> Sequence[str]:
    """Every file except ``own`` and hidden files, as paths with forward slashes."""
    paths = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    return sorted(
        path.as_posix()
        for path in paths
        if path.as_posix() != own and not any(part.startswith(".") for part in path.parts)
    )


def _digest(path: Path, hasher: Any, progress: Callable[[int], None] | None = None) -> str:
    buffer = bytearray(_READ_BYTES)
    try:
        with path.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                hasher.update(memoryview(buffer)[:count])
                if progress is not None:
                    progress(count)
    except OSError as error:
        raise OutputFailed(f"cannot be read back ({error.strerror})", path=path) from error
    return str(hasher.hexdigest())


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
