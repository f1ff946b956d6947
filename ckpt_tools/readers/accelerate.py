"""Owns ``Accelerator.save_state`` directories, and what the Trainer saves through the same functions.

The names of the files tell models' weights from optimizers, schedulers, samplers, random states and custom
objects, which are not opened. If the weights are in a directory of another format (DeepSpeed, torch
Distributed Checkpoint), the location is one of that format. Rank files have their own reader. Tensors keep
their names, such as ``_orig_mod.`` of a compiled model; a safetensors file has no second name of a tied
tensor.

Source: ``accelerate/accelerator.py`` (``save_state``), ``accelerate/checkpointing.py``
(``save_accelerator_state``) and ``accelerate/utils/fsdp_utils.py`` (``save_fsdp_model``), read at 1.15.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.readers import dcp
from ckpt_tools.readers.containers.weight_files import entry_in, entry_names, read_weight_files
from ckpt_tools.readers.deepspeed import reader as zero
from ckpt_tools.readers.trainer_state import is_trainer_directory, trainer_step
from ckpt_tools.storage.folders import entries_of
from ckpt_tools.tensors.checkpoint import Checkpoint, Location, Weight

NAME = "accelerate"
_PLAIN = re.compile(r"((?:pytorch_)?model(?:_\d+)?)\.(?:safetensors|bin)(?:\.index\.json)?")
_FULL = re.compile(r"(pytorch_model_fsdp(?:_\d+)?)\.bin")
_DEEPSPEED = re.compile(r"pytorch_model(_\d+)?")
_DCP = re.compile(r"pytorch_model_fsdp_\d+")
_AUTOMATIC = re.compile(r"checkpoint_\d+")
# Kinds of other files; the group leaves out the number of the model or rank.
_LEFT_ALONE = re.compile(
    r"(optimizer|scheduler|sampler|dl_state_dict)(?:_\d+)?(?:_rank\d+)?\.bin"
    r"|(random_states|custom_checkpoint)_\d+\.pkl|(scaler)\.pt"
)
# Each process writes one; the Trainer's have another name.
_RANDOM = re.compile(r"(?:random_states|rng_state)_(\d+)\.(?:pkl|pth)")
_MARKS = {"optimizer", "scheduler", "sampler", "dl_state_dict", "random_states"}


def find(path: Path, tag: str | None = None) -> list[Location]:
    """The models of the ``save_state`` to which ``path`` leads.

    Args:
        path: the directory of the save, or one of its files with weights. With automatic names also the
            project's directory, or ``checkpoints`` in it.
        tag: the name of one of several: ``model_1``, ``pytorch_model_1``, ``checkpoint_0``, or
            ``checkpoint_0/model_1``.

    Returns:
        One location a model, with the format of its weights.
    """
    if path.is_file():
        models = [model for model in _models(path.parent) if model.format == NAME]
        return [model for model in models if path.name in entry_names(_files(model))]
    models = _models(path)
    for saves in (path, path / "checkpoints"):
        if not models:
            models = _automatic(saves)
    if tag is None or tag == path.name:
        return models
    return [model for model in models if tag in (model.name, model.name.partition("/")[0])]


def _automatic(directory: Path) -> list[Location]:
    """The models of every save below a directory, with the names of their saves."""
    found = []
    for save in entries_of(directory):
        if _AUTOMATIC.fullmatch(save.name):
            models = _models(save)
            for model in models:
                name = f"{save.name}/{model.name}" if len(models) > 1 else save.name
                found.append(replace(model, name=name))
    return found


def _models(directory: Path) -> list[Location]:
    """The models of one save. Plain weights beside those of a distributed run are an export and left out."""
    entries = entries_of(directory)
    distributed = []
    for entry in entries:
        if entry.is_dir() and _DCP.fullmatch(entry.name):
            distributed += [replace(found, name=entry.name) for found in dcp.find(entry)]
        elif entry.is_dir() and _DEEPSPEED.fullmatch(entry.name):
            distributed += zero.find(entry)
        elif match := _FULL.fullmatch(entry.name):
            distributed.append(_location(directory, match[1]))
    if distributed or not any(_left_alone(entry) in _MARKS for entry in entries):
        return distributed
    parts = dict.fromkeys(match[1] for e in entries if (match := _PLAIN.fullmatch(e.name)))
    return [_location(directory, part) for part in parts]


def _location(directory: Path, part: str) -> Location:
    near = (directory, directory.parent, directory.parent.parent)
    return Location(NAME, directory, part, near, part=part)


def _left_alone(entry: Path) -> str | None:
    """The kind of a file without weights; None for other files."""
    match = _LEFT_ALONE.fullmatch(entry.name)
    return next(kind for kind in match.groups() if kind) if match else None


def _files(model: Location) -> list[str]:
    """Names of the files that may hold a model's weights, the preferred first."""
    return [f"{model.part}.{suffix}" for suffix in ("safetensors", "bin")]


def read(location: Location) -> Checkpoint:
    """Read a model's headers.

    Raises:
        DamagedCheckpoint: a file is missing or truncated, or index and shards disagree.
    """
    directory = location.directory
    entry = entry_in(directory, _files(location))
    if entry is None:
        raise DamagedCheckpoint("the files of its weights no longer exist", path=directory)
    held = read_weight_files(entry)
    # The files do not state which tensors were trained, but only floating ones can be.
    weights = {
        name: Weight("parameter" if t.dtype.is_floating else "buffer", t.shape, t.dtype, model=t)
        for name, t in held.tensors.items()
    }
    files = [path for path in entries_of(directory) if path.is_file()]
    writer = "Transformers Trainer" if is_trainer_directory(directory) else "Accelerate save_state"
    ranks = [int(match[1]) for path in files if (match := _RANDOM.fullmatch(path.name))]
    return Checkpoint(
        location=location,
        title=f"{writer} ({'FSDP, full' if _FULL.fullmatch(entry.name) else 'plain'})",
        weights=weights,
        ties=held.ties,
        files={path: path.stat().st_size for path in files},
        # The number in an automatic name counts saves, not steps.
        step=trainer_step(directory),
        world_size=max(ranks) + 1 if ranks else None,
        framework="accelerate",
        details={
            "model": location.part,
            "left_alone": dict(Counter(kind for path in files if (kind := _left_alone(path)))),
        },
        remarks=(*location.remarks, *held.remarks),
        unlisted=held.unlisted,
    )
