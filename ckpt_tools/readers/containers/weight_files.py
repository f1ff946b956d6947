"""Owns weights in plain files: safetensors or ``torch.save``, in one file or in shards with an index.

Index and shards must agree. Names of tensors that share their bytes are found as second names.

Source: ``transformers/utils/hub.py`` (``get_checkpoint_shard_files``), ``transformers/utils/__init__.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckpt_tools.errors import CkptError, DamagedCheckpoint, listed, tensors
from ckpt_tools.readers.containers.dtensor import whole_of
from ckpt_tools.readers.containers.quantised_classes import quantised_remarks
from ckpt_tools.readers.containers.restricted_pickle import Opaque, TensorRef
from ckpt_tools.readers.containers.safetensors_file import read_safetensors
from ckpt_tools.readers.containers.torch_file import TorchFile
from ckpt_tools.storage.regular import content_of
from ckpt_tools.tensors.catalogue import Stored, Tensor
from ckpt_tools.tensors.dequantise import Dequantised
from ckpt_tools.tensors.threads import read_each

# PEFT's names for an adapter's weights, the preferred first.
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The weights in one file, or in the shards of one index.

    Attributes:
        tensors: the tensors by name, in the order of the index or of the file.
        ties: for each second name of a tensor, the name in ``tensors``.
        files: the files with weights, and their sizes in bytes.
        unlisted: tensors of shards that lie beside the index and that it does not name, each with its file.
            They are not read.
        remarks: what to say of them.
    """

    tensors: Mapping[str, Tensor]
    ties: Mapping[str, str]
    files: Mapping[Path, int]
    unlisted: Mapping[str, Path] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def entry_names(names: Iterable[str]) -> list[str]:
    """The given file names, each after the name of the index that may stand in its place."""
    return [entry for name in names for entry in (f"{name}.index.json", name)]


def entry_in(directory: Path, names: Iterable[str]) -> Path | None:
    """The first of the given files, or indexes of their shards, that ``directory`` holds."""
    paths = (directory / name for name in entry_names(names))
    return next((path for path in paths if path.is_file()), None)


def read_weight_files(entry: Path) -> WeightFiles:
    """Read headers.

    Args:
        entry: a file with weights, or an index of shards in the same directory.

    Raises:
        DamagedCheckpoint: a shard is missing or truncated, or index and shards disagree.
    """
    weight_map = _read_index(entry) if entry.suffix == ".json" else None
    names = sorted(set(weight_map.values())) if weight_map is not None else [entry.name]
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    paths = [entry.parent / name for name in names]
    for path in paths:
        if not path.is_file():
            raise DamagedCheckpoint(
                "a shard in the index is missing", path=path, missing=[path.name]
            )
    for path, (held, shared) in zip(paths, read_each(_read_file, paths), strict=True):
        for key in held.keys() & tensors.keys():
            raise DamagedCheckpoint("it is in two shards", path=path, tensor=key)
        tensors |= held
        ties |= shared
    if weight_map is not None:
        _agree(entry, weight_map, (*tensors, *ties))
        tensors = {key: tensors[key] for key in weight_map if key in tensors}
    files = {entry.parent / name: (entry.parent / name).stat().st_size for name in names}
    if weight_map is None:
        return WeightFiles(tensors, ties, files, remarks=quantised_remarks(tensors))
    unlisted, remarks = _left_out(entry, files, {*tensors, *ties})
    return WeightFiles(tensors, ties, files, unlisted, (*quantised_remarks(tensors), *remarks))


def _left_out(
    index: Path, files: Mapping[Path, int], names: Set[str]
) -> tuple[dict[str, Path], tuple[str, ...]]:
    """The tensors of shards that an index does not name and no other shard holds, and what to say of them."""
    stem, suffix = index.name.removesuffix(".index.json").rsplit(".", 1)
    pattern = re.compile(rf"{re.escape(stem)}-\d+-of-\d+\.{suffix}")
    strays = [
        path
        for path in sorted(index.parent.iterdir())
        if pattern.fullmatch(path.name) and path not in files
    ]
    unlisted: dict[str, Path] = {}
    for path in strays:
        try:
            held, shared = _read_file(path)
        except CkptError:
            continue  # it is not part of the model, so it need not be readable
        unlisted |= dict.fromkeys({*held, *shared} - names, path)
    if not strays:
        return {}, ()
    remark = f"shards that the index does not name, and that were not read: {_called(strays)}"
    if unlisted:
        remark += f"; tensors that only they hold: {listed(sorted(unlisted))}"
    return unlisted, (remark,)


def _called(paths: Iterable[Path]) -> str:
    return listed([path.name for path in paths])


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(content_of(path).decode())["weight_map"]
        if not all(Path(name).name == name for name in weight_map.values()):
            raise ValueError("a shard outside the directory")
        if not weight_map:
            raise ValueError("it lists no shard")
        return dict(weight_map)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise DamagedCheckpoint(f"not an index of shards ({error})", path=path) from error


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of one file, and second names of tensors that share their bytes."""
    if path.suffix == ".safetensors":
        return dict(read_safetensors(path).tensors), {}
    content = TorchFile(path).load()
    if not isinstance(content, dict):
        raise DamagedCheckpoint("its content is not a state dict", path=path)
    return tensors_of(content, path)


def tensors_of(content: Mapping[str, Any], path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a state dict that ``path`` holds, and second names of tensors that share their bytes.

    Raises:
        DamagedCheckpoint: something in it is not a tensor.
        UnsupportedLayout: something in it is a tensor that is not plain.
    """
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    places: dict[object, str] = {}
    refuse_odd_names(content, path)
    for key, value in content.items():
        if not isinstance(value, TensorRef) and key.endswith("_extra_state"):
            continue  # extra state of a module is not a weight
        tensor = whole_of(value, path, key)
        if tensor is None:
            raise DamagedCheckpoint("it is not a tensor", path=path, tensor=key)
        held = tensor.parts["codes"] if isinstance(tensor, Dequantised) else tensor
        fragments = held.fragments if isinstance(held, Stored) else ()
        place = (tensor.dtype, tensor.shape, *fragments) if tensor.numel else key
        first = places.setdefault(place, key)
        if first == key:
            tensors[key] = tensor
        else:
            ties[key] = first
    return tensors, ties


def refuse_odd_names(content: Mapping[Any, Any], path: Path) -> None:
    """Refuse a state dict with a name that is not text.

    Raises:
        DamagedCheckpoint: it has one.
    """
    for key in content:
        if not isinstance(key, str):
            kind = key.global_name if isinstance(key, Opaque) else type(key).__name__
            raise DamagedCheckpoint(
                f"a name in its state dict is not text but a value of type {kind}",
                path=path,
                hint="Save the state dict with the names of model.state_dict().",
            )


def _agree(index: Path, weight_map: dict[str, str], names: Iterable[str]) -> None:
    odd = sorted(set(weight_map) ^ set(names))
    if odd:
        raise DamagedCheckpoint(
            f"index and shards differ in {tensors(len(odd))}", path=index, tensor=odd[0]
        )
