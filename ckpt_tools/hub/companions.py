"""Owns the files beside config and tokenizer that belong to a model and are no part of either.

These are the modules of sentence-transformers with their folders, and processors that lie apart from the
tokenizer. They are copied. Other files are left where they are, and named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from ckpt_tools.errors import listed
from ckpt_tools.hub.custom_code import code_files
from ckpt_tools.hub.files import AssetFile, read_json

_MODULES = "modules.json"
_SENTENCE_TRANSFORMERS = (
    _MODULES,
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "router_config.json",
)
# Weights, the state of training, and files that this program writes itself.
_NOT_ASSETS = re.compile(
    r"\..*|.*\.(safetensors|bin|pt|pth|ckpt|distcp|h5|msgpack|onnx|gguf|npz|log|out|err|lock)|"
    r".*\.(safetensors|bin)\.index\.json|config\.json|generation_config\.json|adapter_config\.json|"
    r"ckpt_tools_manifest\.json|SHA256SUMS|README\.md|latest|latest_.*|zero_to_(fp32|torch)\.py|"
    r"(trainer|training|scheduler)_.*\.json|.*results\.json|ds_config.*\.json|\.metadata"
)


def companion_files(places: Iterable[Path]) -> tuple[AssetFile, ...]:
    """The files of sentence-transformers in the first place that has a ``modules.json``.

    Raises:
        DamagedCheckpoint: ``modules.json`` is not JSON.
        MissingAsset: the code of a module is missing.
    """
    place = next((place for place in places if (place / _MODULES).is_file()), None)
    if place is None:
        return ()
    found = {path for pattern in _SENTENCE_TRANSFORMERS for path in place.glob(pattern)}
    own: dict[str, str] = {}
    for folder, kind in _modules(place):
        if folder and (place / folder).is_dir():
            found |= {path for path in (place / folder).rglob("*") if path.is_file()}
        if not kind.startswith("sentence_transformers.") and "." in kind:
            own[kind] = kind
    code = code_files(
        own, place, hint="Put the file there, or remove the module from modules.json."
    )
    copies = [AssetFile(path.relative_to(place).as_posix(), source=path) for path in sorted(found)]
    return (*copies, *(file for file in code if (place / file.name).is_file()))


def left_behind(places: Iterable[Path], copied: Iterable[AssetFile]) -> Iterator[str]:
    """A note for each place about its files that are not copied."""
    names = {file.name for file in copied}
    for place in dict.fromkeys(places):
        left = sorted(
            path.name
            for path in place.iterdir()
            if path.is_file() and path.name not in names and not _NOT_ASSETS.fullmatch(path.name)
        )
        if left:
            yield f"not copied from {place}: {listed(left)}"


def _modules(place: Path) -> Iterator[tuple[str, str]]:
    """Folder and class of each module; a folder outside of the directory is none."""
    data = read_json(place / _MODULES)
    for module in data if isinstance(data, list) else ():
        if isinstance(module, dict):
            folder = PurePosixPath(str(module.get("path") or ""))
            inside = not folder.is_absolute() and ".." not in folder.parts
            name = folder.as_posix() if inside and folder.parts else ""
            yield name, str(module.get("type") or "")
