"""Owns what the objects of a pickle become: tensors without data, and inert objects of any other class.

A pickle can set attributes on any object that it was given (the BUILD opcode). Therefore
:class:`StorageRef`, :class:`TensorRef` and the functions of the allow-list refuse attributes: otherwise a
pickle could point to another file of the machine, whose bytes would go to the output.
"""

from __future__ import annotations

import math
import pickle
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.readers.containers.pickle_limits import Meter
from ckpt_tools.tensors.dtypes import DType


class Opaque:
    """An object of a class that is not allowed: its name, arguments and state, without behaviour.

    Attributes:
        global_name: ``module.qualname`` in the pickle.
        meter: counts the arguments that objects of the class keep; each pickle has its own.
        args: the positional arguments of its constructor.
        state: the argument of its ``__setstate__``, or None.
    """

    # Metadata has a million of these objects.
    __slots__ = ("args", "state")
    global_name: str = "?"
    meter: Meter | None = None
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **_: Any) -> Opaque:
        """Keep the arguments."""
        if args and cls.meter is not None:
            cls.meter.spend(len(args))
        self = object.__new__(cls)
        self.args = args
        self.state = None
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *args: Any, **_: Any) -> Opaque:
        """Accept a call without effect; a pickle may call the result of another call."""
        if self.meter is not None:
            self.meter.spend(len(args))
        return Opaque(*args)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        """Accept a list item, as pickle does for subclasses of list."""

    def extend(self, items: Any) -> None:
        """Accept list items, as pickle does for subclasses of list."""

    def add(self, item: Any) -> None:
        """Accept a set item, as pickle does for subclasses of set."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __repr__(self) -> str:
        return f"<{self.global_name}, not run>"


class UnknownTensor(Opaque):
    """A tensor of an unknown element type, which is an error only for a reader that needs it."""

    global_name = "tensor of an unknown element type"


class LazyTensor(Opaque):
    """A tensor whose elements torch computes from the stored ones."""

    global_name = (
        "tensor with a conjugate or negative bit (torch.Tensor.resolve_conj makes it plain)"
    )


class Sealed:
    """One of our values that a pickle receives and cannot change."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Refuse the state of the BUILD opcode."""
        raise pickle.UnpicklingError(f"it tries to change a {type(self).__name__}")


class StorageRef(Sealed, ABC):
    """The place of a tensor's storage; each container has its own class."""

    __slots__ = ()
    dtype: DType
    numel: int

    @property
    @abstractmethod
    def path(self) -> Path:
        """The file that holds it."""

    @property
    @abstractmethod
    def data_offset(self) -> int:
        """First byte of the data in that file."""

    @abstractmethod
    def spend(self, runs: int) -> None:
        """Count runs into which placements cut tensors of that file, after the first of each tensor.

        Raises:
            DamagedCheckpoint: they are more than the file has bytes.
        """


# Without slots: up to Python 3.11.3 a frozen dataclass with slots replaces its __setstate__ by one that sets
# attributes.
@dataclass(frozen=True)
class TensorRef(Sealed):
    """A tensor in a pickle: elements of a storage, without data.

    Attributes:
        storage: the storage of its elements.
        dtype: its element type.
        storage_offset: first element, counted in elements of ``dtype``.
        shape: its sizes.
        stride: its strides, in elements.
    """

    storage: StorageRef
    dtype: DType
    storage_offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie in row-major order without gaps."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return self.numel == 0
            expected *= size
        return True

    @property
    def byte_offset(self) -> int:
        """Position of the first element in the file.

        Raises:
            DamagedCheckpoint: the elements do not lie within the storage.
        """
        itemsize = self.dtype.itemsize
        room = self.storage.numel * self.storage.dtype.itemsize
        last = sum(
            (size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True)
        )
        end = (self.storage_offset + last + 1) * itemsize if self.numel else 0
        if self.storage_offset < 0 or min(self.stride, default=0) < 0 or end > room:
            raise DamagedCheckpoint("a tensor reaches beyond its storage", path=self.storage.path)
        return self.storage.data_offset + self.storage_offset * itemsize
