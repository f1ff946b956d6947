"""Owns the allow-list of the restricted unpickler, and what its functions do instead of those of their names.

Their arguments come from a pickle. So each takes plain values of the form that picklers write, and counts
what it copies.

Source of the list: ``torch/_utils.py`` and ``torch/_weights_only_unpickler.py``.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

from ckpt_tools.readers.containers.pickle_keys import Key
from ckpt_tools.readers.containers.pickle_limits import Meter, is_plain_key
from ckpt_tools.readers.containers.pickled import (
    LazyTensor,
    Opaque,
    Sealed,
    StorageRef,
    TensorRef,
    UnknownTensor,
)
from ckpt_tools.tensors.dtypes import BY_NAME, BY_STORAGE_CLASS, DType

# Nested classes have the names of all outer classes, so their names can take the square of the pickle's size.
_LONGEST_NAME = 10_000
# Each becomes a class, which takes a kilobyte. A checkpoint names a few dozen.
_MOST_NAMES = 4_096
# torch's iterators over tensors take 64.
_MOST_DIMENSIONS = 64
# Larger frozen sets are no keys of frameworks.
_LARGEST_SET = 64
_MAX_INT = (1 << 63) - 1


def _rebuild_tensor(
    storage: Any, storage_offset: int, size: Any, stride: Any, dtype: Any = None
) -> TensorRef | Opaque:
    if isinstance(storage, Opaque) or isinstance(dtype, type):
        return UnknownTensor(storage, storage_offset, size, stride, dtype)
    shape, strides = _ints(size), _ints(stride)
    if not _is_size(storage_offset) or len(shape) != len(strides):
        raise pickle.UnpicklingError("a tensor with malformed sizes")
    if not isinstance(storage, StorageRef):
        raise pickle.UnpicklingError("a tensor without a storage that can be read")
    dtype = storage.dtype if dtype is None else dtype
    if not isinstance(dtype, DType):
        raise pickle.UnpicklingError("a tensor with a malformed dtype")
    return TensorRef(storage, dtype, storage_offset, shape, strides)


def _plain(tensor: TensorRef | Opaque, metadata: tuple[Any, ...]) -> TensorRef | Opaque:
    """The tensor, if its elements are the stored ones: torch marks a lazy conjugate or negative by a bit."""
    return LazyTensor(tensor, *metadata) if any(metadata) else tensor


def _ints(items: Any) -> tuple[int, ...]:
    """Sizes or strides of one tensor."""
    if not isinstance(items, tuple | list) or len(items) > _MOST_DIMENSIONS:
        raise pickle.UnpicklingError("a tensor with malformed sizes")
    for item in items:
        if type(item) is not int or not 0 <= item <= _MAX_INT:
            raise pickle.UnpicklingError("a tensor with malformed sizes")
    return tuple(items)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_INT


def _size(items: Any = ()) -> tuple[int, ...]:
    """``torch.Size``. Only numbers are allowed, because nested tuples in it would not be counted."""
    if not isinstance(items, tuple | list) or len(items) > _MOST_DIMENSIONS:
        raise pickle.UnpicklingError("a torch.Size that is not a short list of numbers")
    for item in items:
        if type(item) is not int or not -_MAX_INT <= item <= _MAX_INT:
            raise pickle.UnpicklingError("a torch.Size with an item that is not a number")
    return tuple(items)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    if not isinstance(data, TensorRef | Opaque):
        raise pickle.UnpicklingError("a parameter that is not a tensor")
    return data


def _rebuild_from_type(func: Callable[..., Any], _type: Any, args: Any, state: Any) -> Any:
    """A tensor with attributes becomes the tensor; a subclass such as DTensor keeps its state."""
    if isinstance(func, _Function) and func._do is _rebuild_from_type:
        raise pickle.UnpicklingError("a tensor that is rebuilt in itself")
    rebuilt = func(*args)
    if isinstance(rebuilt, Opaque):
        rebuilt.state = state
    return rebuilt


class _Function(Sealed):
    """A function of the allow-list."""

    __slots__ = ("_do",)

    def __init__(self, do: Callable[..., Any]) -> None:
        self._do = do

    def __call__(self, *args: Any) -> Any:
        return self._do(*args)


class _Mapping(dict[Any, Any]):
    """An ``OrderedDict`` or another mapping, without the attributes that a pickle gives it."""

    def __setstate__(self, state: object) -> None:
        """Ignore the attributes, such as ``_metadata`` of a state dict."""


class Names:
    """The inert classes of one pickle, each made once."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self.classes: dict[str, type[Opaque]] = {}

    def of(self, global_name: str) -> type[Opaque]:
        """The class of a name."""
        known = self.classes.get(global_name)
        if known is not None:
            return known
        if len(self.classes) >= _MOST_NAMES:
            raise pickle.UnpicklingError(f"it names more than {_MOST_NAMES:,} classes or functions")
        if len(global_name) > _LONGEST_NAME:
            raise pickle.UnpicklingError("the name of a class is too long")
        name = global_name.rpartition(".")[2] or "Opaque"
        body = {"__slots__": (), "global_name": global_name, "meter": self._meter}
        made = self.classes[global_name] = type(name, (Opaque,), body)
        return made

    def nested(self, owner: Any, name: Any) -> Any:
        """An inert class for ``getattr(Class, "Inner")`` in a pickle. No attribute is looked up."""
        if isinstance(owner, type) and issubclass(owner, Opaque) and isinstance(name, str):
            return self.of(f"{owner.global_name}.{name}")
        return Opaque(owner, name)


class _Functions:
    """What functions of the allow-list do instead of the functions that the pickle names."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def mapping(self, items: Any = ()) -> _Mapping:
        """``OrderedDict`` or ``Counter`` of another mapping or of pairs."""
        self._meter.mappings += 1
        made = _Mapping()
        if items:
            self._meter.spend(len(items))
            pairs = items.items() if isinstance(items, dict) else items
            for key, value in pairs:
                made[self._key(key)] = value
        return made

    def set(self, items: Any = ()) -> Any:
        """``set`` of a list; inert where its items are not hashed at once."""
        self._meter.spend(len(items))
        if not isinstance(items, list | tuple) or not all(map(_is_item, items)):
            return Opaque(items)
        return {*map(self._key, items)}

    def frozenset(self, items: Any = ()) -> Any:
        """``frozenset`` of a list; a large one is inert, because it may be a key."""
        made = self.set(items)
        small = isinstance(made, set) and len(made) <= _LARGEST_SET
        return frozenset(made) if small else Opaque(items)

    def _key(self, key: Any) -> Any:
        """A key as it is, or inert if it is not hashed at once, or is one of many of one hash."""
        return key if isinstance(key, Opaque | type) or self._meter.admits(key) else Key(key)

    def bytearray(self, *args: Any) -> bytearray:
        """``bytearray`` of bytes."""
        given = args[0] if args and isinstance(args[0], bytes | bytearray) else b""
        self._meter.spend(len(given))
        return bytearray(given)

    def encode(self, text: str, encoding: str = "utf-8") -> bytes:
        """``_codecs.encode``, by which old protocols write bytes."""
        self._meter.spend(len(text))
        return text.encode("latin1" if encoding == "latin1" else "utf-8")

    def device(self, *args: Any) -> str:
        """``torch.device`` as text."""
        if len(args) > 2 or not all(type(arg) in (str, int) for arg in args):
            raise pickle.UnpicklingError("a malformed torch.device")
        text = ":".join(map(str, args))
        self._meter.spend(len(text))
        return text

    def complex(self, *args: Any) -> complex:
        """``complex`` of two numbers."""
        if not all(isinstance(arg, int | float) for arg in args):
            raise pickle.UnpicklingError("a malformed complex number")
        return complex(*args)


def _is_item(value: object) -> bool:
    """Whether a value can be put into a set at once; inert objects are hashed by their identity."""
    return isinstance(value, Opaque | type) or is_plain_key(value)


def allowed(meter: Meter, names: Names) -> dict[tuple[str, str], Any]:
    """The allow-list, with new functions for each load, so that a pickle cannot change ours."""
    do = _Functions(meter)
    functions: dict[tuple[str, str], Callable[..., Any]] = {
        ("collections", "OrderedDict"): do.mapping,
        # No defaultdict, because freeing nested ones recurses in C without a limit.
        ("collections", "defaultdict"): lambda *_: do.mapping(),
        ("collections", "Counter"): do.mapping,
        ("builtins", "set"): do.set,
        ("builtins", "frozenset"): do.frozenset,
        ("builtins", "complex"): do.complex,
        ("builtins", "bytearray"): do.bytearray,
        ("builtins", "getattr"): lambda *a: names.nested(*a[:2]),
        ("_codecs", "encode"): do.encode,
        ("torch", "Size"): _size,
        ("torch", "device"): do.device,
        ("torch._utils", "_rebuild_tensor"): lambda *a: _rebuild_tensor(*a[:4]),
        ("torch._utils", "_rebuild_tensor_v2"): lambda *a: _plain(_rebuild_tensor(*a[:4]), a[6:7]),
        ("torch._utils", "_rebuild_tensor_v3"): lambda *a: _plain(
            _rebuild_tensor(a[0], a[1], a[2], a[3], a[6]), a[7:8]
        ),
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
        ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    }
    table: dict[tuple[str, str], Any] = {key: _Function(each) for key, each in functions.items()}
    for name, dtype in BY_STORAGE_CLASS.items():
        table["torch", name] = table["torch.storage", name] = dtype
    for name, dtype in BY_NAME.items():
        table["torch", name] = dtype
    # Python 2 names of the same builtins, written by pickle protocols 0 to 2.
    for (module, name), value in list(table.items()):
        if module == "builtins":
            table["__builtin__", name] = value
    return table
