"""``Accelerator.save_state`` directories, and what the Transformers Trainer saves through the same functions.

Owns the names of the files: which are models' weights, which are optimizers, schedulers, samplers, random
states and custom objects, of which none is opened. Weights that lie as another format in a directory of
their own (DeepSpeed, torch Distributed Checkpoint) are pointed out to the reader of that format; one file a
rank is found by its own reader. Names of tensors are kept as they are: ``_orig_mod.`` of a compiled model, no
second name of a tied tensor in a safetensors file.

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
# What else lies there, without the number of the model or rank that it belongs to.
_LEFT_ALONE = re.compile(
    r"(optimizer|scheduler|sampler|dl_state_dict)(?:_\d+)?(?:_rank\d+)?\.bin"
    r"|(random_states|custom_checkpoint)_\d+\.pkl|(scaler)\.pt"
)
# Each process writes one; the Trainer calls its own differently.
_RANDOM = re.compile(r"(?:random_states|rng_state)_(\d+)\.(?:pkl|pth)")
_MARKS = {"optimizer", "scheduler", "sampler", "dl_state_dict", "random_states"}


def find(path: Path, tag: str | None = None) -> list[Location]:
    """The models of the ``save_state`` that ``path`` means.

    Args:
        path: the directory that was saved to, one of the files with weights in it, or, where names were
            automatic, the project's directory or ``checkpoints`` in it.
        tag: which of several, by name: ``model_1``, ``pytorch_model_1``, ``checkpoint_0``, or
            ``checkpoint_0/model_1``.

    Returns:
        One location a model; of another format where its weights are of one.
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
    """The models of every save below a directory, named after their saves."""
    found = []
    for save in entries_of(directory):
        if _AUTOMATIC.fullmatch(save.name):
            models = _models(save)
            for model in models:
                name = f"{save.name}/{model.name}" if len(models) > 1 else save.name
                found.append(replace(model, name=name))
    return found


def _models(directory: Path) -> list[Location]:
    """The models of one save; those of a distributed run first, as weights beside them are an export."""
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
    """What a file is that holds no weights."""
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
        raise DamagedCheckpoint("its weights are gone", path=directory)
    held = read_weight_files(entry)
    # Nothing says what was trained, but what is not floating was not.
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
        # The number of an automatic name counts saves, not steps.
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
