"""Owns checkpoints of OLMo-core: ``stepN/model_and_optim/``, a torch Distributed Checkpoint with own names.

It adds to that format the places of the files, the facts in ``train/rank0.pt`` and ``.metadata.json``, and
the names of tensors in Hugging Face's Olmo2 and Olmo3, which differ from OLMo-core's by renaming alone.
Other models of OLMo-core (pre-norm, mixtures of experts) keep their names.
:mod:`~ckpt_tools.readers.dcp.reader` locates the bytes; :mod:`ckpt_tools.hub.olmo_core` translates the
config.

Sources: OLMo-core ``train/checkpoint.py`` (files) and ``nn/hf/convert.py`` (names), read at commit fa6c5014
(3.0).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckpt_tools.errors import CkptError, UsageError
from ckpt_tools.readers import dcp
from ckpt_tools.readers.containers.torch_file import TorchFile
from ckpt_tools.readers.dcp.metadata import is_dcp_directory, read_metadata
from ckpt_tools.storage.regular import content_of
from ckpt_tools.tensors.checkpoint import Checkpoint, Location

NAME = "olmo-core"
_STATE = "model_and_optim"
_STEP = re.compile(r"step(\d+)(-.*)?")
_ENDS = {
    "embeddings": "model.embed_tokens",
    "lm_head.norm": "model.norm",
    "lm_head.w_out": "lm_head",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_IN_BLOCK = {
    "attention.w_q": "self_attn.q_proj",
    "attention.w_k": "self_attn.k_proj",
    "attention.w_v": "self_attn.v_proj",
    "attention.w_out": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward_norm": "post_feedforward_layernorm",
}


def find(path: Path, tag: str | None = None) -> list[Location]:
    """The checkpoints of this format to which ``path`` leads.

    Args:
        path: ``stepN``, ``model_and_optim`` in it, a run's directory with one or more ``stepN``, or a
            directory that ``save_model_and_optim_state`` wrote.
        tag: the name of one of several ``stepN``.

    Raises:
        UsageError: ``tag`` does not exist.
    """
    if path.name == ".metadata":
        path = path.parent
    if is_dcp_directory(path):
        if not _is_ours(path):
            return []
        name = path.parent.name if path.name == _STATE else path.name
        return [_location(path, name)] if tag in (None, name) else []
    if not path.is_dir():
        return []
    if (path / _STATE).is_dir():
        return [_location(path / _STATE, path.name)] if tag in (None, path.name) else []
    steps = sorted(
        (int(match[1]), entry)
        for entry in path.iterdir()
        if (match := _STEP.fullmatch(entry.name)) and (entry / _STATE).is_dir()
    )
    if tag is None or not steps:
        return [_location(entry / _STATE, entry.name) for _, entry in steps]
    chosen = [entry for _, entry in steps if entry.name == tag]
    if not chosen:
        raise UsageError(
            f"there is no checkpoint with the tag {tag!r}",
            path=path,
            hint=f"Found: {', '.join(entry.name for _, entry in steps)}.",
        )
    return [_location(chosen[0] / _STATE, tag)]


def _is_ours(directory: Path) -> bool:
    if directory.name == _STATE:
        return True
    try:
        return read_metadata(directory).writer == "olmo_core"
    except CkptError:
        return False


def _location(directory: Path, name: str) -> Location:
    near = (directory, directory.parent, directory.parent.parent)
    return Location(NAME, directory, name, near)


def read(location: Location) -> Checkpoint:
    """Read a checkpoint's metadata.

    Raises:
        DamagedCheckpoint: files are missing or too short, or boxes overlap or leave a hole.
    """
    checkpoint = dcp.read(location)
    run = location.directory.parent if location.directory.name == _STATE else location.directory
    experiment = _object(run / "config.json")
    shapes = {name: weight.shape for name, weight in checkpoint.weights.items()}
    names, remark = hub_names(shapes, experiment)
    train = _train_state(run / "train" / "rank0.pt")
    version = _object(run / ".metadata.json").get("version")
    step = _STEP.fullmatch(run.name)
    return replace(
        checkpoint,
        title="OLMo-core",
        weights={names.get(name, name): weight for name, weight in checkpoint.weights.items()},
        step=_int(train.get("global_step")) or (int(step[1]) if step else checkpoint.step),
        world_size=_int(train.get("world_size")) or checkpoint.world_size,
        framework=f"ai2-olmo-core {version}" if version else "ai2-olmo-core",
        details={**checkpoint.details, "names": "Hugging Face" if names else "OLMo-core"},
        remarks=(*checkpoint.remarks, *([remark] if remark else [])),
    )


def hub_names(
    shapes: Mapping[str, tuple[int, ...]], experiment: Mapping[str, Any]
) -> tuple[dict[str, str], str | None]:
    """Each tensor's name in Hugging Face's Olmo2 and Olmo3.

    In OLMo-core's pre-norm models the norms have the same names but another place, so the kind of block
    decides. Without a config that states it, norms over all heads of queries and keys decide: no other dense
    model on the Hub has them.

    Args:
        shapes: OLMo-core's names, with shapes.
        experiment: the content of OLMo-core's config; empty if there is none.

    Returns:
        The names, empty for another model, and a remark for the report.
    """
    names = {name: hub for name in shapes if (hub := _hub_name(name)) is not None}
    odd = [name for name in shapes if name not in names]
    if odd:
        return {}, f"tensors keep OLMo-core's names: Olmo2 and Olmo3 have no name for {odd[0]}"
    model = experiment.get("model")
    if isinstance(model, Mapping):
        kinds = _block_kinds(model)
        if kinds == {"reordered_norm"}:
            return names, None
        return (
            {},
            f"tensors keep OLMo-core's names: Olmo2 and Olmo3 have no {', '.join(kinds)} blocks",
        )
    norms = [name for name in shapes if name.endswith(".attention.q_norm.weight")]
    if norms and all(
        shapes[name] == shapes[name.replace("q_norm", "w_q")][:1]
        for name in norms
        if name.replace("q_norm", "w_q") in shapes
    ):
        return names, (
            "there is no config of OLMo-core: the model is taken for an Olmo2 or Olmo3, because its q_norm "
            "spans all heads"
        )
    return (
        {},
        "tensors keep OLMo-core's names: there is no config of OLMo-core that states the model",
    )


def _hub_name(name: str) -> str | None:
    module, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        return None
    if module in _ENDS:
        return f"{_ENDS[module]}.{leaf}"
    match = _BLOCK.fullmatch(module)
    if match is None or match[2] not in _IN_BLOCK:
        return None
    return f"model.layers.{match[1]}.{_IN_BLOCK[match[2]]}.{leaf}"


def _block_kinds(model: Mapping[str, Any]) -> set[str]:
    overrides = model.get("block_overrides") or {}
    blocks = [model.get("block"), *overrides.values()]
    return {str(block.get("name")) if isinstance(block, Mapping) else "?" for block in blocks}


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file cannot be read, because its facts are not essential."""
    try:
        data = json.loads(content_of(path).decode())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _train_state(path: Path) -> Mapping[str, Any]:
    """The trainer's record of its progress; empty if it cannot be read."""
    try:
        state = TorchFile(path).load()
    except CkptError:
        return {}
    return state if isinstance(state, dict) else {}


def _int(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
