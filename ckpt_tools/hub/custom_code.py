"""The Python files that an ``auto_map`` names, found without running them.

Owns the way from ``auto_map`` to files: the named module and, by its relative imports, the modules
it needs from the same directory. Code is parsed, never imported. It must not know what the classes
are.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ckpt_tools.errors import DamagedCheckpoint, MissingAsset
from ckpt_tools.hub.files import AssetFile


def code_files(auto_map: Any, directory: Path, *, hint: str) -> tuple[AssetFile, ...]:
    """The files that the classes of an ``auto_map`` need, to be copied byte for byte.

    A class that lives in a Hub repository (``owner/name--module.Class``) needs no file here.

    Args:
        auto_map: the value of ``auto_map``; anything that is no mapping needs no files.
        directory: where the file with the ``auto_map`` lies.
        hint: what to pass instead when a file is missing.

    Raises:
        MissingAsset: a file that is named, or that a named file imports, is not there.
        DamagedCheckpoint: a file is not Python, or a name is not that of a module.
    """
    pending = list(_modules(auto_map, directory))
    found: dict[Path, AssetFile] = {}
    while pending:
        path = pending.pop()
        if path in found:
            continue
        if not path.is_file():
            raise MissingAsset("custom code that auto_map needs is missing", path=path, hint=hint)
        found[path] = AssetFile(path.relative_to(directory).as_posix(), source=path)
        pending += _relative_imports(path, directory)
    return tuple(found[path] for path in sorted(found))


def hub_repositories(auto_map: Any) -> tuple[str, ...]:
    """The Hub repositories whose code an ``auto_map`` uses."""
    return tuple(sorted({name.split("--")[0] for name in _references(auto_map) if "--" in name}))


def _references(auto_map: Any) -> Iterator[str]:
    """``module.Class`` references: a value is one, or a slow and a fast one that may be null."""
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
                f"auto_map holds {reference!r}, which is not module.Class",
                path=directory,
                hint="correct auto_map in the JSON files of this directory",
            )
        yield _file(directory, module)


def _relative_imports(path: Path, directory: Path) -> Iterator[Path]:
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, ValueError) as error:
        raise DamagedCheckpoint(
            f"is not valid Python ({error})",
            path=path,
            hint="restore the file from where the model came from",
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
    # `from . import name`: a module, or something that the package's __init__ defines.
    modules = (_file(package, [alias.name]) for alias in node.names)
    return (path for path in modules if path.is_file())


def _file(package: Path, module: list[str]) -> Path:
    base = package.joinpath(*module)
    return base / "__init__.py" if base.is_dir() else base.with_name(base.name + ".py")
