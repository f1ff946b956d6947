"""Owns AutoEP's form of a Hugging Face model: its names of experts and routers, and the way back.

AutoEP keeps the experts of a layer as three tensors ``w1``, ``w2`` and ``w3``, and the router under a second
name. Here they get the names and the form of the model: ``gate_up_proj`` and ``down_proj``.

Source: ``deepspeed/module_inject/auto_ep_layer.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ckpt_tools.readers.containers.restricted_pickle import TensorRef
from ckpt_tools.readers.containers.torch_file import stored
from ckpt_tools.readers.deepspeed.joining import Piece, joined, shifted, whole
from ckpt_tools.readers.deepspeed.shards import ShardSet
from ckpt_tools.tensors.catalogue import Stored

RECORD = "ds_autoep_layers"
FUSED = re.compile(r"(?P<head>.*\.experts)\.(?P<leaf>w[123])(?:\.(?P<number>\d+))?")


def layers_of(shards: ShardSet) -> dict[str, Any]:
    """AutoEP's record of each of its layers by the layer's name; nothing for native MoE."""
    return {entry["module_path"]: entry for entry in shards.first.get(RECORD) or ()}


def stacked(held: Mapping[str, TensorRef]) -> dict[str, Stored]:
    """For each layer one tensor ``w1`` (``w2``, ``w3``) with all experts."""
    numbered: dict[str, dict[int, Stored]] = {}
    for name, ref in held.items():
        match = FUSED.fullmatch(name)
        if match is not None and match["number"] is not None:
            one = stored(ref, (1, *ref.shape))
            numbered.setdefault(f"{match['head']}.{match['leaf']}", {})[int(match["number"])] = one
    whole_tensors = {}
    for name, experts in numbered.items():
        parts = [experts[number] for number in sorted(experts)]
        pieces = [
            Piece(at, whole(part.shape), shifted(part.shape, 0, at))
            for at, part in enumerate(parts)
        ]
        whole_tensors[name] = joined(parts, pieces, (len(parts), *parts[0].shape[1:]))
    return whole_tensors


def fused(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors with the names and the form of the Hugging Face model: gate and up in one tensor."""
    made: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        match = FUSED.fullmatch(name)
        if match is None:
            made[name] = tensor
        elif match["leaf"] == "w2":
            made[f"{match['head']}.down_proj"] = tensor
        elif match["leaf"] == "w1":
            up = tensors[f"{match['head']}.w3"]
            experts, size, *rest = tensor.shape
            pieces = [
                Piece(0, whole(tensor.shape), (0,) * len(tensor.shape)),
                Piece(1, whole(up.shape), shifted(up.shape, 1, size)),
            ]
            shape = (experts, size + up.shape[1], *rest)
            made[f"{match['head']}.gate_up_proj"] = joined([tensor, up], pieces, shape)
    return made


def routers_of(shards: ShardSet, paths: Iterable[str]) -> dict[str, str]:
    """The model's name of each router; AutoEP's module also has the name ``router`` for it."""
    called = {}
    for path in paths:
        pattern = re.compile(re.escape(path) + r"\.(?P<attribute>\w+)\.gate\.(?P<leaf>\w+)")
        matches = list(filter(None, map(pattern.fullmatch, shards.first.content["module"])))
        for match in matches:
            if match["attribute"] != "router":
                router = f"{path}.router.gate.{match['leaf']}"
                called[router] = f"{path}.{match['attribute']}.{match['leaf']}"
    return called


def without_second_routers(shards: ShardSet, called: Mapping[str, str]) -> ShardSet:
    """The shards without the second name that AutoEP's module has for each router."""
    second = set()
    for name in called.values():
        path, _, leaf = name.rpartition(".")
        second.add(f"{path}.gate.{leaf}")
    first = shards.first
    module = {name: value for name, value in first.content["module"].items() if name not in second}
    models = [replace(first, content={**first.content, "module": module}), *shards.models[1:]]
    return replace(shards, models=models)
