"""Owns the file names of a DeepSpeed save: the kind of each file, and the rank that wrote it.

A name has a data-parallel rank (``zero_pp_rank_D``) and a model-parallel rank (``mp_rank_MM``), which
counts tensor-parallel ranks within pipeline stages. Up to DeepSpeed 0.18.3, sequence-parallel runs
(Ulysses) wrote the sequence rank there, so each data-parallel rank has one file in all.

Sources: ``deepspeed/runtime/engine.py`` (``_get_ckpt_name``, ``_get_zero_ckpt_name``,
``_get_expert_ckpt_name``), ``runtime/pipe/module.py`` (``ckpt_layer_path``),
``checkpoint/ds_to_universal.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.readers.containers.torch_file import TorchFile, refuse_exchanged
from ckpt_tools.readers.deepspeed.agreement import SAME_SAVE

MODEL_FILE = re.compile(r"(?:zero_pp_rank_(?P<dp>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt")
OPTIM_FILE = re.compile(
    r"(?P<prefix>bf16_|fp16_)?zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_?optim_states\.pt"
)
EXPERT_FILE = re.compile(
    r"(?:layer_(?P<layer>\d+)_)?expert_(?P<expert>\d+)_mp_rank_(?P<mp>\d+)_model_states\.pt"
)
EXPERT_OPTIM_FILE = re.compile(r"expp_rank_\d+_mp_rank_\d+_optim_states\.pt")
LAYER_FILE = re.compile(r"layer_(?P<layer>\d+)(?:-model_(?P<tp>\d+))?-model_states\.pt")
UNIVERSAL = "zero"
_OF_RANKS = (MODEL_FILE, OPTIM_FILE, EXPERT_FILE, LAYER_FILE)

ByRank = dict[int, dict[int, str]]


@dataclass(frozen=True)
class SaveNames:
    """The files of one folder.

    Attributes:
        directory: the folder.
        models: model files by model-parallel and data-parallel rank.
        optims: optimizer files by model-parallel and data-parallel rank.
        experts: files of one expert of one layer.
        expert_optims: optimizer files of expert-parallel ranks, of runs without ZeRO.
        layers: files of one layer of a pipeline.
    """

    directory: Path
    models: ByRank
    optims: ByRank
    experts: tuple[str, ...]
    expert_optims: tuple[str, ...]
    layers: tuple[str, ...]

    @property
    def model_ranks(self) -> list[int]:
        """The model-parallel ranks that have a file."""
        return sorted({*self.models, *self.optims})


def names_in(directory: Path) -> SaveNames:
    """The files of a save that lie in a folder.

    Raises:
        DamagedCheckpoint: two files are of the same rank and kind.
    """
    names = sorted(entry.name for entry in directory.iterdir() if entry.is_file())
    models, optims = _by_rank(directory, names, MODEL_FILE), _by_rank(directory, names, OPTIM_FILE)
    if _is_sequence_parallel(optims):
        optims = _together(optims)
        models = _together(models) if _is_sequence_parallel(models) else models
    return SaveNames(
        directory,
        models,
        optims,
        tuple(name for name in names if EXPERT_FILE.fullmatch(name)),
        tuple(name for name in names if EXPERT_OPTIM_FILE.fullmatch(name)),
        tuple(name for name in names if LAYER_FILE.fullmatch(name)),
    )


def is_shard_directory(path: Path) -> bool:
    """Whether the directory itself holds files of a save that weights are read from."""
    try:
        return any(
            pattern.fullmatch(entry.name)
            for entry in path.iterdir()
            for pattern in (MODEL_FILE, LAYER_FILE)
        )
    except OSError:
        return False


def is_save_file(name: str) -> bool:
    """Whether a file of this name belongs to a save."""
    kinds = (MODEL_FILE, OPTIM_FILE, EXPERT_FILE, EXPERT_OPTIM_FILE, LAYER_FILE)
    return any(pattern.fullmatch(name) for pattern in kinds)


def is_universal(path: Path) -> bool:
    """Whether the directory is a universal checkpoint: a folder ``zero`` with a folder for each parameter."""
    try:
        return any((entry / "fp32.pt").is_file() for entry in (path / UNIVERSAL).iterdir())
    except OSError:
        return False


def _by_rank(directory: Path, names: Iterable[str], pattern: re.Pattern[str]) -> ByRank:
    found: ByRank = {}
    for name in names:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        of_rank = found.setdefault(int(match["mp"]), {})
        rank = int(match["dp"] or 0)
        if rank in of_rank:
            raise DamagedCheckpoint(
                f"one directory has files of two saves: {of_rank[rank]} and {name} are both of rank {rank}",
                path=directory,
                hint=SAME_SAVE,
            )
        of_rank[rank] = name
    return found


def _is_sequence_parallel(found: ByRank) -> bool:
    """Whether the second rank in the names is a sequence rank: no data-parallel rank has two files."""
    ranks = [rank for of_rank in found.values() for rank in of_rank]
    return len(found) > 1 and len(ranks) == len(set(ranks))


def _together(found: ByRank) -> ByRank:
    return {0: {rank: name for of_rank in found.values() for rank, name in of_rank.items()}}


def load_own(path: Path) -> Any:
    """The content of a file of one rank.

    Raises:
        DamagedCheckpoint: it was saved under the name of another rank's file.
    """
    file = TorchFile(path)
    content = file.load()
    refuse_exchanged(file, _whose)
    return content


def _whose(name: str) -> tuple[int, ...] | None:
    """The kind and the numbers in a file's name, which identify it in a save; None for other files."""
    for kind, pattern in enumerate(_OF_RANKS):
        if match := pattern.fullmatch(name):
            numbers = {key: value for key, value in match.groupdict().items() if key != "prefix"}
            return kind, *(int(value or 0) for value in numbers.values())
    return None
