"""Owns the search for the Python files that an ``auto_map`` needs.

They are the named modules and, by their relative imports, further modules of the same directory. Code is
parsed and never imported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ckpt_tools.errors import DamagedCheckpoint, MissingAsset
from ckpt_tools.hub.files import AssetFile
from ckpt_tools.storage.regular import content_of


def code_files(auto_map: Any, directory: Path, *, hint: str) -> tuple[AssetFile, ...]:
    """The files that the classes of an ``auto_map`` need, to be copied byte for byte.

    A class in a Hub repository (``owner/name--module.Class``) needs no file here.

    Args:
        auto_map: the value of ``auto_map``; a value that is not a mapping needs no files.
        directory: the directory of the file with the ``auto_map``.
        hint: the next step if a file is missing.

    Raises:
        MissingAsset: a file that is named, or that a named file imports, is missing.
        DamagedCheckpoint: a file is not Python, or an entry is not ``module.Class``.
    """
    pending = list(_modules(auto_map, directory))
    found: dict[Path, AssetFile] = {}
    while pending:
        path = pending.pop()
        if path in found:
            continue
        if not path.is_file():
            raise MissingAsset(
                "a file of custom code that auto_map needs is missing", path=path, hint=hint
            )
        found[path] = AssetFile(path.relative_to(directory).as_posix(), source=path)
        pending += _relative_imports(path, directory)
    return tuple(found[path] for path in sorted(found))


def hub_repositories(auto_map: Any) -> tuple[str, ...]:
    """The Hub repositories whose code an ``auto_map`` uses."""
    return tuple(sorted({name.split("--")[0] for name in _references(auto_map) if "--" in name}))


def _references(auto_map: Any) -> Iterator[str]:
    """``module.Class`` references. A value is one, or a list of a slow and a fast one; each may be null."""
    for value in auto_map.values() if isinstance(auto_map, Mapping) else ():
        for reference in value if isinstance(value, list) else [value]:
            if isinstance(reference, str):
                yield reference


def _modules(auto_map: Any, directory: Path) -> Iterator[Path]:
    for reference in _references(auto_map):
        if "--" in reference:
            continue
        module = reference.split(".")[:-1]
        if not module or not all(part.isidentifier() for part in module):
            raise DamagedCheckpoint(
                f"an entry of auto_map is {reference!r}, not module.Class",
                path=directory,
                hint="Correct auto_map in the JSON files of this directory.",
            )
        yield _file(directory, module)


def _relative_imports(path: Path, directory: Path) -> Iterator[Path]:
    try:
        tree = ast.parse(content_of(path), filename=str(path))
    except (SyntaxError, ValueError) as error:
        raise DamagedCheckpoint(
            f"is not valid Python ({error})",
            path=path,
            hint="Copy the file anew from the source of the model.",
        ) from error
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        package = path.parent
        for _ in range(node.level - 1):
            package = package.parent
        if not package.is_relative_to(directory):
            continue
        yield from _imported(package, node)


def _imported(package: Path, node: ast.ImportFrom) -> Iterable[Path]:
    if node.module is not None:
        return (_file(package, node.module.split(".")),)
    # `from . import name`: the name is a module, or is defined by the package's __init__.
    modules = (_file(package, [alias.name]) for alias in node.names)
    return (path for path in modules if path.is_file())


def _file(package: Path, module: list[str]) -> Path:
    base = package.joinpath(*module)
    return base / "__init__.py" if base.is_dir() else base.with_name(base.name + ".py")
