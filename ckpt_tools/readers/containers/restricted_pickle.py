"""Owns the reading of pickles without running any code that they name, and the allow-list for it.

A pickle builds containers, strings and numbers by itself. Everything else needs a *global*, which is here
one of two:

* an allowed global is rebuilt by a function of this module: tensors become :class:`TensorRef`, dtypes our
  :class:`~ckpt_tools.tensors.dtypes.DType`, ``torch.Size`` a tuple;
* any other global becomes a new, inert class that keeps its arguments and state as data (:class:`Opaque`).
  Unknown objects of a user's client state do no harm, and DeepSpeed's small objects are read as a name and
  a few numbers.

Nothing is imported, and no function that a pickle names is called.

A pickle can set attributes on any object that it was given (the BUILD opcode). Therefore callables are made
anew for every load, and :class:`StorageRef` and :class:`TensorRef` refuse attributes: otherwise a pickle
could point to another file of the machine, whose bytes would go to the output. A pickle can also kill the
process by the objects that it builds; see :mod:`~ckpt_tools.readers.containers.pickle_nesting`.

Source of the allow-list: ``torch/_utils.py`` and ``torch/_weights_only_unpickler.py``.
"""

from __future__ import annotations

import copyreg
import io
import math
import pickle
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_tools.errors import CkptError, DamagedCheckpoint, UnsafePickle
from ckpt_tools.readers.containers.pickle_nesting import refuse_deep_nesting
from ckpt_tools.tensors.dtypes import BY_NAME, BY_STORAGE_CLASS, DType

# Nested classes have the names of all outer classes, so their names can take the square of the pickle's size.
_LONGEST_NAME = 10_000


class Opaque:
    """An object of a class that is not allowed: its name, arguments and state, without behaviour.

    Attributes:
        global_name: ``module.qualname`` in the pickle.
        args: the positional arguments of its constructor.
        state: the argument of its ``__setstate__``, or None.
    """

    global_name: str = "?"
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **_: Any) -> Opaque:
        """Keep the arguments."""
        self = object.__new__(cls)
        self.args = args
        self.state = None
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *args: Any, **_: Any) -> Opaque:
        """Accept a call without effect; a pickle may call the result of another call."""
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


def _rebuild_tensor(
    storage: Any, storage_offset: int, size: Any, stride: Any, dtype: Any = None
) -> TensorRef | Opaque:
    if isinstance(storage, Opaque) or isinstance(dtype, type):
        return UnknownTensor(storage, storage_offset, size, stride, dtype)
    shape, strides = tuple(size), tuple(stride)
    ints = (storage_offset, *shape, *strides)
    if not all(isinstance(n, int) for n in ints) or len(shape) != len(strides):
        raise pickle.UnpicklingError("a tensor with malformed sizes")
    if not isinstance(storage, StorageRef) or min(shape, default=0) < 0:
        raise pickle.UnpicklingError("a tensor without a storage that can be read")
    dtype = storage.dtype if dtype is None else dtype
    if not isinstance(dtype, DType):
        raise pickle.UnpicklingError("a tensor with a malformed dtype")
    return TensorRef(storage, dtype, storage_offset, shape, strides)


def _size(items: Any = ()) -> tuple[int, ...]:
    """``torch.Size``. Only numbers are allowed, because nested tuples in it would not be counted."""
    sizes = tuple(items)
    for n in sizes:  # there may be millions, and a generator takes twice as long
        if not isinstance(n, int):
            raise pickle.UnpicklingError("a torch.Size with an item that is not a number")
    return sizes


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    if not isinstance(data, TensorRef | Opaque):
        raise pickle.UnpicklingError("a parameter that is not a tensor")
    return data


def _rebuild_from_type(func: Callable[..., Any], _type: Any, args: Any, state: Any) -> Any:
    """A tensor with attributes becomes the tensor; a subclass such as DTensor keeps its state."""
    rebuilt = func(*args)
    if isinstance(rebuilt, Opaque):
        rebuilt.state = state
    return rebuilt


def _nested_class(owner: Any, name: Any) -> Any:
    """An inert class for ``getattr(Class, "Inner")`` in a pickle. No attribute is looked up."""
    if isinstance(owner, type) and issubclass(owner, Opaque) and isinstance(name, str):
        if len(owner.global_name) + len(name) > _LONGEST_NAME:
            raise pickle.UnpicklingError("the name of a class is too long")
        return _opaque_class(f"{owner.global_name}.{name}")
    return Opaque(owner, name)


def _opaque_class(global_name: str) -> type[Opaque]:
    name = global_name.rpartition(".")[2] or "Opaque"
    return type(name, (Opaque,), {"global_name": global_name})


def _encode(text: str, encoding: str = "utf-8") -> bytes:
    return text.encode("latin1" if encoding == "latin1" else "utf-8")


def _allowed() -> dict[tuple[str, str], Any]:
    """The allow-list, with new functions for each load, so that a pickle cannot change ours."""
    table: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): OrderedDict,
        # A plain dict, because freeing nested defaultdicts recurses in C without a limit.
        ("collections", "defaultdict"): lambda *_: {},
        ("collections", "Counter"): lambda *a: Counter(*a),
        ("builtins", "set"): set,
        ("builtins", "frozenset"): frozenset,
        ("builtins", "complex"): complex,
        ("builtins", "bytearray"): lambda *a: bytearray(*a[:1]) if a and _is_bytes(a[0]) else b"",
        ("builtins", "getattr"): lambda *a: _nested_class(*a[:2]),
        ("_codecs", "encode"): lambda *a: _encode(*a),
        ("torch", "Size"): lambda *a: _size(*a),
        ("torch", "device"): lambda *a: ":".join(map(str, a)),
        ("torch._utils", "_rebuild_tensor"): lambda *a: _rebuild_tensor(*a[:4]),
        ("torch._utils", "_rebuild_tensor_v2"): lambda *a: _rebuild_tensor(*a[:4]),
        ("torch._utils", "_rebuild_tensor_v3"): lambda *a: _rebuild_tensor(
            a[0], a[1], a[2], a[3], a[6]
        ),
        ("torch._utils", "_rebuild_parameter"): lambda *a: _rebuild_parameter(*a),
        ("torch._utils", "_rebuild_parameter_with_state"): lambda *a: _rebuild_parameter(*a),
        ("torch._tensor", "_rebuild_from_type_v2"): lambda *a: _rebuild_from_type(*a),
    }
    for name, dtype in BY_STORAGE_CLASS.items():
        table["torch", name] = table["torch.storage", name] = dtype
    for name, dtype in BY_NAME.items():
        table["torch", name] = dtype
    # Python 2 names of the same builtins, written by pickle protocols 0 to 2.
    for (module, name), value in list(table.items()):
        if module == "builtins":
            table["__builtin__", name] = value
    return table


def _is_bytes(value: Any) -> bool:
    return isinstance(value, bytes | bytearray)


class RestrictedUnpickler(pickle.Unpickler):
    """An unpickler that imports nothing and calls only the functions above."""

    def __init__(
        self,
        file: io.BufferedIOBase | io.BytesIO,
        persistent_load: Callable[[tuple[Any, ...]], Any] | None = None,
    ) -> None:
        super().__init__(file, encoding="utf-8")
        self._allowed = _allowed()
        self._opaque: dict[tuple[str, str], type[Opaque]] = {}
        self._resolve_storage = persistent_load

    def find_class(self, module: str, name: str, /) -> Any:
        """Return the allowed replacement of a global, or a new inert class."""
        key = (module, name)
        if key in self._allowed:
            return self._allowed[key]
        if key not in self._opaque:
            self._opaque[key] = _opaque_class(f"{module}.{name}")
        return self._opaque[key]

    def persistent_load(self, pid: Any) -> Any:
        """Return the storage of a persistent id, as torch files have them."""
        if self._resolve_storage is None or not isinstance(pid, tuple):
            raise pickle.UnpicklingError("a reference to a storage outside a torch file")
        return self._resolve_storage(pid)


def unpickle(
    file: io.BufferedIOBase | io.BytesIO,
    path: str,
    persistent_load: Callable[[tuple[Any, ...]], Any] | None = None,
) -> Any:
    """Read one pickle from ``file``; ``path`` is for errors.

    Raises:
        UnsafePickle: the pickle uses an object in a way that needs the object's code.
        DamagedCheckpoint: the pickle is malformed or truncated.
    """
    # Extension codes are looked up in this cache before `find_class` is called. The cache must not give the
    # pickle a registered function, and must not keep our replacement.
    copyreg.clear_extension_cache()
    try:
        refuse_deep_nesting(file)
        return RestrictedUnpickler(file, persistent_load).load()
    except CkptError:
        raise
    except (EOFError, pickle.UnpicklingError, UnicodeDecodeError) as error:
        raise DamagedCheckpoint(
            f"the pickle in it cannot be read ({error or 'it is truncated'})",
            path=path,
            hint="The file is truncated, or torch.save did not write it. Copy it anew.",
        ) from error
    except Exception as error:
        # Any error that a hostile or broken pickle causes in the interpreter is a fact about the file.
        raise UnsafePickle(
            f"the pickle in it cannot be read without running code from it "
            f"({type(error).__name__}: {error})",
            path=path,
            hint="No code from the file was run. If you trust the file, please report its layout.",
        ) from error
    finally:
        copyreg.clear_extension_cache()
