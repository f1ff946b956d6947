"""State dicts that people save themselves, alone in a torch file or in a mapping with other things.

Owns the search for state dicts in such a file, and their names: ``model``, ``state_dict`` (Lightning
too), ``ema.model``. A state dict is a mapping from names to tensors. Such a file is read by its name, or
as the only one of a folder in which nothing else is a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckpt_tools.errors import DamagedCheckpoint, UnsupportedLayout
from ckpt_tools.readers.containers.quantised_classes import quantised_remarks
from ckpt_tools.readers.containers.restricted_pickle import Opaque, TensorRef
from ckpt_tools.readers.containers.torch_file import TorchFile
from ckpt_tools.readers.containers.weight_files import ADAPTER_FILES, tensors_of
from ckpt_tools.tensors.checkpoint import Checkpoint, Location, Weight

NAME = "torch"
_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
_DEPTH = 2
_STEPS = ("global_step", "step", "iteration")
_WHOLE = ""


def find(path: Path, tag: str | None = None) -> list[Location]:
    """The state dicts of a file, or of the only such file of a folder; tags mean nothing here."""
    if tag is not None or path.name in ADAPTER_FILES:
        return []
    named = path.is_file()
    if not named:
        files = [entry for entry in path.iterdir() if entry.suffix in _SUFFIXES and entry.is_file()]
        if len(files) != 1:
            return []
        (path,) = files
    elif path.suffix not in _SUFFIXES:
        return []
    content = _content(path)
    found = list(_state_dicts(content))
    if not found:
        # What was named and cannot be read is refused with the reason.
        if not named or isinstance(content, Mapping):
            return []
        found = [_WHOLE]
    location = Location(NAME, path, path.name, (path.parent, path.parent.parent))
    return [replace(location, part=part, name=part or path.name) for part in found]


def read(location: Location) -> Checkpoint:
    """Read a file's pickle.

    Raises:
        DamagedCheckpoint: the file is truncated, or no torch file.
        UnsupportedLayout: it holds no state dict.
    """
    path = location.directory
    content = TorchFile(path).load()
    held = _state_dicts(content).get(location.part or _WHOLE)
    if held is None:
        raise _no_state_dict(path, content)
    tensors, ties = tensors_of(held, path)
    top = content if isinstance(content, Mapping) else {}
    lightning = top.get("pytorch-lightning_version")
    return Checkpoint(
        location=location,
        title="torch file" + (f", {location.part}" if location.part else ""),
        weights={
            name: Weight("parameter", tensor.shape, tensor.dtype, model=tensor)
            for name, tensor in tensors.items()
        },
        ties=ties,
        files={path: path.stat().st_size},
        step=next((top[key] for key in _STEPS if isinstance(top.get(key), int)), None),
        framework=f"lightning {lightning}" if isinstance(lightning, str) else None,
        remarks=(*location.remarks, *quantised_remarks(tensors)),
    )


def _content(path: Path) -> Any:
    """What the file holds; None where it cannot be read, which reading it says."""
    try:
        return TorchFile(path).load()
    except (DamagedCheckpoint, UnsupportedLayout):
        return None


def _state_dicts(content: Any) -> dict[str, Mapping[str, Any]]:
    """The state dicts in a value, by the dotted keys that lead to them; the value itself has no key."""
    if _is_state_dict(content):
        return {_WHOLE: content}
    return dict(_inner(content, (), _DEPTH))


def _inner(
    content: Any, keys: tuple[str, ...], depth: int
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not isinstance(content, Mapping) or not depth:
        return
    for key, value in content.items():
        # What an optimizer keeps of a parameter looks like a state dict.
        if not isinstance(key, str) or "optim" in key.lower():
            continue
        if _is_state_dict(value):
            yield ".".join((*keys, key)), value
        else:
            yield from _inner(value, (*keys, key), depth - 1)


def _is_state_dict(value: Any) -> bool:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return False
    return any(isinstance(held, TensorRef) for held in value.values()) and all(
        isinstance(held, TensorRef | Opaque) or key.endswith("_extra_state")
        for key, held in value.items()
    )


def _no_state_dict(path: Path, content: Any) -> UnsupportedLayout:
    if isinstance(content, Opaque):
        return UnsupportedLayout(
            f"a pickled {content.global_name}, not a state dict",
            path=path,
            hint="Its class would have to run. Save `model.state_dict()` in the training script instead.",
        )
    return UnsupportedLayout(
        f"a pickled {type(content).__name__}, not a state dict",
        path=path,
        hint="Name a file with the model's state dict.",
    )
