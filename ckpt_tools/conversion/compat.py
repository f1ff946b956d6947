"""Functions of other projects under their own names and signatures: a script changes one import.

Owns signatures, return types, and which of our checkpoints the other project's function takes.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_tools import readers
from ckpt_tools.conversion.api import open_checkpoint
from ckpt_tools.errors import AmbiguousCheckpoint, NotACheckpoint, OutputFailed, UsageError
from ckpt_tools.ranks import Ranks, from_environment, from_process_group
from ckpt_tools.readers import dcp
from ckpt_tools.tensors.catalogue import Shape, Tensor
from ckpt_tools.tensors.checkpoint import Checkpoint
from ckpt_tools.tensors.checksums import ReadLog
from ckpt_tools.tensors.deferred import settle
from ckpt_tools.tensors.derived import cast
from ckpt_tools.tensors.dtypes import FLOAT32
from ckpt_tools.tensors.gather import Gatherer
from ckpt_tools.tensors.threads import default_workers
from ckpt_tools.writing.single_file import SAFETENSORS, TORCH, write_single_file
from ckpt_tools.writing.source import COPY_AGAIN, check_sources

if TYPE_CHECKING:
    import torch


# Seconds without progress after which the other ranks give up.
_TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when :meth:`contiguous` is called, like DeepSpeed's ``GatheredTensor``.

    Attributes:
        tensor: where it lies.
    """

    tensor: Tensor

    @property
    def shape(self) -> Shape:
        """Sizes."""
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""
        return self.tensor.dtype.torch

    def contiguous(self) -> torch.Tensor:
        """Read it: a new CPU tensor."""
        return self.tensor.load()


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | os.PathLike[str],
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> OrderedDict[str, torch.Tensor] | OrderedDict[str, LazyTensor]:
    """The fp32 state dict of a ZeRO checkpoint, as ``deepspeed.utils.zero_to_fp32`` gives it.

    It differs in what that function gets wrong: frozen parameters are fp32 as well, and those of
    ZeRO-1 are not lost.

    Args:
        checkpoint_dir: the directory that holds the tag's directory, or that directory itself.
        tag: the tag; by default the one that ``latest`` names.
        exclude_frozen_parameters: leave frozen parameters out.
        lazy_mode: give objects that are read when ``.contiguous()`` is called, without a comparison with
            the checksums of the files.

    Returns:
        Name to tensor, second names of tied tensors included (the same tensor object).

    Raises:
        CkptError: see :mod:`ckpt_tools.errors`.
    """
    checkpoint = open_checkpoint(checkpoint_dir, tag=tag)
    frozen = {name for name, weight in checkpoint.weights.items() if weight.kind == "frozen"}
    names = [n for n in checkpoint.weights if not (exclude_frozen_parameters and n in frozen)]
    lazy = OrderedDict((name, LazyTensor(cast(checkpoint[name], FLOAT32))) for name in names)
    aliases = {alias: kept for alias, kept in checkpoint.ties.items() if kept in lazy}
    if lazy_mode:
        lazy.update((alias, lazy[kept]) for alias, kept in aliases.items())
        return lazy
    log = ReadLog()
    with Gatherer(log) as gatherer:
        loaded = OrderedDict(
            (name, gatherer.window(each.tensor, 0, each.tensor.numel).view(each.shape))
            for name, each in lazy.items()
        )
    check_sources(log, hint=COPY_AGAIN)
    loaded.update((alias, loaded[kept]) for alias, kept in aliases.items())
    return loaded


def merge_fsdp_weights(
    checkpoint_dir: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    safe_serialization: bool = True,
    remove_checkpoint_dir: bool = False,
) -> None:
    """Merge the weights of a sharded FSDP state into one file, as ``accelerate.utils`` does.

    The file is the same: every tensor under the name that it has in the state, wrappers included, in
    the dtype that it was saved in. It differs in what that function gets wrong. A directory above
    ``pytorch_model_fsdp_0`` will do; an optimizer's, which becomes no file of weights, will not, and of
    a state that holds more than a model the model is taken. Nothing is left of a run that fails.
    Memory does not grow with the model. As with accelerate's, an older file is replaced, and every rank may
    call it: the first one writes, and the others wait for it.

    Args:
        checkpoint_dir: a directory with ``.metadata`` and ``.distcp`` files, or one above it: that of
            ``Accelerator.save_state``, or a Trainer's ``checkpoint-N``.
        output_path: the directory to put the file into; it may hold other files.
        safe_serialization: write ``model.safetensors``; otherwise ``pytorch_model.bin``.
        remove_checkpoint_dir: remove the directory with the ``.distcp`` files, and nothing above it,
            once the file on disk was compared with it bit for bit.

    Raises:
        UsageError: it is another format, or removing it would lose what is not in the result.
        OutputFailed: the file could not be written, or the source not removed, as the hint says.
        RankFailed: the rank that writes failed.
        CkptError: see :mod:`ckpt_tools.errors`; nothing was written or removed.
    """
    merge = partial(
        _merge_fsdp_weights,
        Path(checkpoint_dir),
        Path(output_path),
        safe_serialization=safe_serialization,
        remove_checkpoint_dir=remove_checkpoint_dir,
    )
    # Without torch there is no process group either, and importing it takes a second.
    ranks = from_process_group(_TIMEOUT_SECONDS) if "torch" in sys.modules else None
    ranks = ranks or _launched()
    if ranks is None:
        merge()
        return
    with ranks.session("merge_fsdp_weights"):
        if ranks.leads:
            merge()
            ranks.put("merged", True)
        else:
            ranks.get("merged")


@lru_cache(maxsize=1)
def _launched() -> Ranks | None:
    """The ranks that torchrun started, where they have made no process group yet."""
    ranks = from_environment(_TIMEOUT_SECONDS)
    if ranks is not None:
        ranks.await_all()
    return ranks


def _merge_fsdp_weights(
    checkpoint_dir: Path, output: Path, *, safe_serialization: bool, remove_checkpoint_dir: bool
) -> None:
    checkpoint = _sharded_model(checkpoint_dir)
    source = checkpoint.location.directory
    if output.resolve().is_relative_to(source.resolve()):
        raise UsageError(
            f"it lies in the input {source}",
            path=output,
            hint="Name another output. Inputs are never changed.",
        )
    if remove_checkpoint_dir:
        _refuse_to_lose(checkpoint)
    tensors = checkpoint.catalogue("model")
    settle(tensors.values(), default_workers())
    path = output / (SAFETENSORS if safe_serialization else TORCH)
    write_single_file(tensors, path, prove=remove_checkpoint_dir, overwrite=True)
    if remove_checkpoint_dir:
        try:
            shutil.rmtree(source)
        except OSError as error:
            raise OutputFailed(
                f"cannot be removed ({error.strerror})",
                path=source,
                hint=f"{path} is complete and was compared with it; remove the rest by hand.",
            ) from error


def _sharded_model(path: Path) -> Checkpoint:
    """The sharded state at a path.

    Raises:
        UsageError: there are several, or it is another format.
        NotACheckpoint: there is none.
    """
    try:
        location = readers.locate(path)
    except AmbiguousCheckpoint as error:
        choices = ", ".join(error.choices)
        raise AmbiguousCheckpoint(
            error.fact,
            choices=error.choices,
            path=path,
            hint=f"Name the directory of one of them: {choices}",
        ) from error
    except NotACheckpoint as error:
        raise NotACheckpoint(
            error.fact,
            path=path,
            hint="Name a directory with .metadata and .distcp files, such as pytorch_model_fsdp_0, or the "
            "one above it.",
        ) from error
    if location.format != dcp.NAME:
        raise UsageError(
            f"it is not a sharded FSDP state; its format is {location.format}",
            path=location.directory,
            hint="ckpt_tools.consolidate reads it.",
        )
    return readers.read(location)


def _refuse_to_lose(checkpoint: Checkpoint) -> None:
    """Raise UsageError if the directory holds anything that the file of weights will not."""
    source = checkpoint.location.directory
    others = checkpoint.details["left_alone"]
    strange = [entry.name for entry in source.iterdir() if not dcp.is_own_file(entry)]
    if others or strange or source.is_symlink():
        held = [*(others if isinstance(others, dict) else ()), *sorted(strange)]
        raise UsageError(
            f"removing it would lose what is not in the result: {', '.join(held)}"
            if held
            else "it is a link, and its target may be in use elsewhere",
            path=source,
            hint="Leave out remove_checkpoint_dir, and remove the directory by hand.",
        )
