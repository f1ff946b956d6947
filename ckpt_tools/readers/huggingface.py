"""Hugging Face model directories as input: safetensors or ``.bin``, in one file or in shards.

Owns the names of the files and the agreement of index and shards. Adapters are another format.

Source: ``transformers/utils/hub.py`` (``get_checkpoint_shard_files``), ``transformers/utils/__init__.py``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ckpt_tools.catalogue import Stored
from ckpt_tools.checkpoint import Checkpoint, Location, Weight
from ckpt_tools.dtypes import DType
from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.readers.restricted_pickle import TensorRef
from ckpt_tools.readers.safetensors_file import read_safetensors
from ckpt_tools.readers.torch_file import TorchFile, stored

NAME = "huggingface"
_SINGLE = ("model.safetensors", "pytorch_model.bin")


def find(path: Path, tag: str | None = None) -> list[Location]:
    """The model directory that ``path`` is, or none; tags mean nothing here."""
    if path.is_file() and path.name in (*_SINGLE, *map("{}.index.json".format, _SINGLE)):
        path = path.parent
    elif any(path.glob("sharded/shard-*-model-*.safetensors")):
        # torch consolidated them, and turns 0-d values into zeros: the shards have their own reader.
        return []
    if tag is not None or _entry_point(path) is None:
        return []
    return [Location(NAME, path, path.name, (path, path.parent))]


def _entry_point(directory: Path) -> Path | None:
    for name in _SINGLE:
        for candidate in (directory / f"{name}.index.json", directory / name):
            if candidate.is_file():
                return candidate
    return None


def read(location: Location) -> Checkpoint:
    """Read a directory's headers.

    Raises:
        DamagedCheckpoint: a shard is missing or truncated, or index and shards disagree.
    """
    entry = _entry_point(location.directory)
    if entry is None:
        raise DamagedCheckpoint("its weights are gone", path=location.directory)
    weight_map = _read_index(entry) if entry.suffix == ".json" else None
    names = sorted(set(weight_map.values())) if weight_map is not None else [entry.name]
    tensors: dict[str, Stored] = {}
    ties: dict[str, str] = {}
    for name in names:
        path = location.directory / name
        if not path.is_file():
            raise DamagedCheckpoint(
                "a shard that the index names is missing", path=path, missing=[name]
            )
        held, shared = _read_file(path)
        for key in held.keys() & tensors.keys():
            raise DamagedCheckpoint("it lies in two shards", path=path, tensor=key)
        tensors |= held
        ties |= shared
    if weight_map is not None:
        _agree(entry, weight_map, (*tensors, *ties))
        tensors = {key: tensors[key] for key in weight_map if key in tensors}
    weights = {
        key: Weight("parameter", tensor.shape, tensor.dtype, model=tensor)
        for key, tensor in tensors.items()
    }
    files = {
        location.directory / name: (location.directory / name).stat().st_size for name in names
    }
    return Checkpoint(
        location=location,
        title="Hugging Face " + ("safetensors" if names[0].endswith(".safetensors") else "torch"),
        weights=weights,
        ties=ties,
        files=files,
        training_dtype=_majority(tensors.values()),
        details={"shards": len(names)},
        remarks=location.remarks,
    )


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(Path(name).name == name for name in weight_map.values()):
            raise ValueError("a shard outside the directory")
        return dict(weight_map)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"not an index of shards ({error})", path=path) from error


def _read_file(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of one file, and second names of tensors that share their bytes."""
    if path.suffix == ".safetensors":
        return dict(read_safetensors(path).tensors), {}
    content = TorchFile(path).load()
    if not isinstance(content, dict):
        raise DamagedCheckpoint("it holds no state dict", path=path)
    tensors: dict[str, Stored] = {}
    ties: dict[str, str] = {}
    places: dict[object, str] = {}
    for key, ref in content.items():
        if not isinstance(ref, TensorRef):
            raise DamagedCheckpoint("it is not a tensor", path=path, tensor=str(key))
        place = (ref.byte_offset, ref.shape, ref.stride, ref.dtype) if ref.numel else key
        first = places.setdefault(place, key)
        if first == key:
            tensors[key] = stored(ref)
        else:
            ties[key] = first
    return tensors, ties


def _agree(index: Path, weight_map: dict[str, str], names: Iterable[str]) -> None:
    odd = sorted(set(weight_map) ^ set(names))
    if odd:
        raise DamagedCheckpoint(
            f"index and shards differ in {len(odd)} tensors", path=index, tensor=odd[0]
        )


def _majority(tensors: Iterable[Stored]) -> DType | None:
    counts: Counter[DType] = Counter()
    for tensor in tensors:
        if tensor.dtype.is_floating:
            counts[tensor.dtype] += tensor.numel
    return counts.most_common(1)[0][0] if counts else None
