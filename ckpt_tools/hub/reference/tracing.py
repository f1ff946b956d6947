"""Owns the recording of recipes: it watches torch move data between meta tensors in the child process.

Views of a tensor share its storage and have offset, sizes and strides, so only operations that make a new
storage are watched. Joins and copies are recorded; the result of any other operation has new values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ckpt_tools.hub.reference.recipes import Joined, Live, NewValues, Recipe, Strided

_aten = torch.ops.aten
_COPIES = {_aten.clone.default, _aten._to_copy.default, _aten.contiguous.default}


class _Made(NamedTuple):
    tensor: torch.Tensor
    recipe: Recipe


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is active, records the recipe of every tensor made of ``tensors``.

    Args:
        tensors: contiguous meta tensors by name; tensors that share storage count as one.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: dict[int, _Made] = {}
        for name, tensor in tensors.items():
            if _key(tensor) not in self._made:
                self._note(tensor, Live(name))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run ``func`` and record the recipe of each new storage."""
        options = dict(kwargs or {})
        if func in _COPIES and args[0].dtype == options.get("dtype", args[0].dtype):
            options["memory_format"] = torch.contiguous_format
            result = func(*args, **options)
            self._note(result, self.recipe(args[0]))
            return result
        result = func(*args, **options)
        if func is _aten.cat.default:
            # torch.cat skips empty one-dimensional tensors, with which accumulations start.
            parts = [part for part in args[0] if part.shape != (0,)]
            axis = args[1] if len(args) > 1 else options.get("dim", 0)
            recipes = tuple(self.recipe(part) for part in parts)
            self._note(result, Joined(recipes, axis % result.ndim))
        elif func is _aten.stack.default:
            axis = (args[1] if len(args) > 1 else options.get("dim", 0)) % result.ndim
            recipes = tuple(self.recipe(part.unsqueeze(axis)) for part in args[0])
            self._note(result, Joined(recipes, axis))
        else:
            results = result if isinstance(result, (tuple, list)) else [result]
            for item in results:
                if isinstance(item, torch.Tensor) and _key(item) not in self._made:
                    self._note(item, NewValues(str(func)))
        # After an operation in place the recorded recipe is no longer true.
        if func._schema.is_mutable and isinstance(args[0], torch.Tensor):
            self._note(args[0], NewValues(str(func)))
        return result

    def recipe(self, tensor: torch.Tensor) -> Recipe:
        """How ``tensor`` is made of the given tensors."""
        if _key(tensor) not in self._made:
            return NewValues("a new tensor")
        made = self._made[_key(tensor)]
        sizes = tuple(int(size) for size in tensor.shape)
        strides = tuple(int(stride) for stride in tensor.stride())
        offset = int(tensor.storage_offset())
        if tensor.dtype != made.tensor.dtype:
            return NewValues("a view of the bytes in another dtype")
        if isinstance(made.recipe, NewValues):
            return made.recipe
        if sizes == made.tensor.shape and not offset and tensor.is_contiguous():
            return made.recipe
        return Strided(made.recipe, offset, sizes, strides)

    def _note(self, tensor: torch.Tensor, recipe: Recipe) -> None:
        if not tensor.is_contiguous() or tensor.storage_offset():
            recipe = NewValues("a tensor that is not contiguous")
        # As long as the tensor is held, the address of its storage is not used again.
        self._made[_key(tensor)] = _Made(tensor, recipe)


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
