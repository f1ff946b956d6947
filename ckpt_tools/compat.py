"""Functions of other projects under their own names and signatures: a script changes one import.

Owns signatures and return types, nothing else.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckpt_tools.catalogue import Shape, Tensor
from ckpt_tools.convert import open_checkpoint
from ckpt_tools.dtypes import FLOAT32
from ckpt_tools.lazy import cast

if TYPE_CHECKING:
    import torch


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
        lazy_mode: give objects that are read when ``.contiguous()`` is called.

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
    loaded = OrderedDict((name, tensor.contiguous()) for name, tensor in lazy.items())
    loaded.update((alias, loaded[kept]) for alias, kept in aliases.items())
    return loaded
