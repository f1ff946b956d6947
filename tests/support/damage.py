"""Damage to a checkpoint, as functions on a copy of a shipped one.

``copy_of`` gives the directory of the shards; every other function changes files there. Edits load and
save with torch itself, DeepSpeed's few classes being replaced for that moment by plain ones of their
names, so that what is written is what DeepSpeed writes but for the edit.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ZERO = Path(__file__).resolve().parents[2] / "fixtures" / "zero"
Content = dict[str, Any]


def copy_of(fixture: str, tmp_path: Path, tag: str | None = None) -> Path:
    """A copy of a shipped checkpoint, beside its ``latest``; returns the directory of its shards."""
    root = tmp_path / fixture
    shutil.copytree(ZERO / fixture / "checkpoint", root)
    return root / (tag or (root / "latest").read_text())


def shards_of(fixture: str, tag: str | None = None) -> Path:
    """The directory of a shipped checkpoint's shards, to take files from."""
    root = ZERO / fixture / "checkpoint"
    return root / (tag or (root / "latest").read_text())


def optim_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*optim_states.pt"))


def model_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*model_states.pt"))


# Files.


def drop_rank(directory: Path, rank: int, kind: str = "optim") -> str:
    """Remove a rank's file, as when a machine's folder was not copied; returns its name."""
    (path,) = directory.glob(f"*zero_pp_rank_{rank}_*{kind}_states.pt")
    path.unlink()
    return path.name


def as_saved_here(path: Path) -> None:
    """Let the records of a copied file lie under its new name, as if it had been saved so."""
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].partition("/")[0]
    assert len(root) == len(path.stem)
    path.write_bytes(path.read_bytes().replace(root.encode(), path.stem.encode()))


def truncate(path: Path, size: int) -> None:
    """Keep the first bytes, as an interrupted copy does."""
    with path.open("rb+") as stream:
        stream.truncate(size)


def swap(one: Path, other: Path) -> None:
    """Exchange two files."""
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def take_over(source: Path, directory: Path, name: str | None = None) -> Path:
    """Put a file of another save in the directory, in the place of one of its own if there is one."""
    target = directory / (name or source.name)
    shutil.copyfile(source, target)
    return target


def twin(path: Path) -> Path:
    """Lay a file beside itself under the other of DeepSpeed's two names, with and without ``bf16_``."""
    name = path.name.removeprefix("bf16_") if path.name.startswith("bf16_") else f"bf16_{path.name}"
    return take_over(path, path.parent, name)


def flip(path: Path, needle: bytes) -> None:
    """Flip a bit of the first byte of ``needle``."""
    data = bytearray(path.read_bytes())
    data[data.index(needle)] ^= 1
    path.write_bytes(data)


# Contents.


def edit(path: Path, change: Callable[[Content], Any]) -> None:
    """Change what a shard holds and save it again, in the container that it had."""
    with _deepspeed_classes():
        content = torch.load(path, map_location="cpu", weights_only=False)
        change(content)
        torch.save(content, path, _use_new_zipfile_serialization=zipfile.is_zipfile(path))


def saved_anew(path: Path) -> Path:
    """Save a file again, so that its records have its own name, not that of the file it was copied from."""
    edit(path, lambda content: None)
    return path


@contextlib.contextmanager
def _deepspeed_classes() -> Iterator[None]:
    """Stand-ins under the names of DeepSpeed's classes, for pickle to find; importing it takes seconds."""
    names = {
        "deepspeed.runtime.zero.config": ["ZeroStageEnum"],
        "deepspeed.runtime.fp16.loss_scaler": ["LossScaler", "DynamicLossScaler"],
        "deepspeed.utils.tensor_fragment": ["fragment_address"],
        "__mp_main__": ["RunInfo"],
    }
    made = dict(_stand_in(module, classes) for module, classes in names.items())
    for module in list(made):
        while "." in module:
            module = module.rpartition(".")[0]
            made.setdefault(module, types.ModuleType(module))
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _stand_in(name: str, classes: list[str]) -> tuple[str, types.ModuleType]:
    module = types.ModuleType(name)
    for each in classes:
        body: dict[str, Any] = {"__module__": name}
        if each == "ZeroStageEnum":
            body |= {
                "__init__": lambda self, value: setattr(self, "value", value),
                "__reduce__": lambda self: (type(self), (self.value,)),
            }
        setattr(module, each, type(each, (), body))
    return name, module


# Raw torch zip files.


def repack(path: Path, change: Callable[[dict[str, bytes]], Any], compression: int = 0) -> None:
    """Change the records of a zip file; names are those after the archive's own folder."""
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        records = {n.partition("/")[2]: archive.read(n) for n in archive.namelist()}
    change(records)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(f"{root}/{name}", data)


def torch_zip(pickle: bytes, storages: dict[str, bytes] | None = None) -> bytes:
    """A file as ``torch.save`` makes it around a pickle of our choosing."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/byteorder", "little")
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", "3\n")
    return stream.getvalue()
