"""Owns what lies beside a model and is no part of it: code that nothing names, weights in other folders.

A file that a manifest lists was put there on purpose. A file that a manifest does not list is found by its
own check. Hidden folders belong to other programs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from ckpt_tools.errors import CkptError, listed
from ckpt_tools.hub.custom_code import code_files
from ckpt_tools.verification.custom_code import FILES
from ckpt_tools.verification.directory import Directory, read_object
from ckpt_tools.verification.problem import Findings
from ckpt_tools.verification.run import Run

ORDER = 22
_CODE = (".py", ".pyc", ".so")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".distcp")


def check(run: Run) -> None:
    """Warn of code that nothing names, and of folders with weights that were not looked at."""
    directory = run.directory
    if any(manifest.folder == "" for manifest in run.manifests):
        return
    visible = [f for f in directory.files if not any(p.startswith(".") for p in f.split("/"))]
    code = [file for file in visible if file.endswith(_CODE)]
    for file in sorted(set(code) - _named(directory)) if code else ():
        run.findings.add(
            "code-unnamed",
            "no auto_map names it, and no code that one names imports it",
            file=file,
            hint="Delete the file if the model does not need it.",
        )
    if not directory.tensors and not directory.adapters:
        return
    looked_at = {entry.file for entry in directory.every_tensor}
    folders: dict[str, list[str]] = {}
    for file in visible:
        folder, _, name = file.rpartition("/")
        own = not folder or folder in directory.adapters
        if not own and file.endswith(_WEIGHTS) and file not in looked_at:
            folders.setdefault(folder, []).append(name)
    for folder, names in folders.items():
        run.findings.add(
            "weights-elsewhere",
            f"weights that are not part of the model, and were not checked: {listed(names)}",
            file=folder,
            hint="Verify the folder by itself, or delete it if an earlier save left it.",
        )


def _named(directory: Directory) -> set[str]:
    """The files of code that an ``auto_map`` of the directory needs."""
    return {file for config in FILES for file in _named_by(directory, config)}


def _named_by(directory: Directory, config: str) -> Iterator[str]:
    if config not in directory.root_files:
        return
    data = read_object(directory, config, "config-invalid", Findings()) or {}
    try:
        for asset in code_files(data.get("auto_map"), directory.path, hint=""):
            yield PurePosixPath(asset.name).as_posix()
    except CkptError:
        # What is missing stops the load, and other checks say so.
        return
