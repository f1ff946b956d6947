"""Owns the reading of pickles without running any code that they name.

A pickle builds containers, strings and numbers by itself. Everything else needs a *global*, which is here
one of two:

* an allowed global is replaced by a function of :mod:`~ckpt_tools.readers.containers.pickle_functions`:
  tensors become :class:`TensorRef`, dtypes our :class:`~ckpt_tools.tensors.dtypes.DType`, ``torch.Size`` a
  tuple;
* any other global becomes a new, inert class that keeps its arguments and state as data (:class:`Opaque`).
  Unknown objects of a user's client state do no harm, and DeepSpeed's small objects are read as a name and
  a few numbers.

Nothing is imported, and no function that a pickle names is called. A pickle can also kill the process, or
take its memory and time, by what it builds. So :mod:`~ckpt_tools.readers.containers.pickle_limits` looks at
its opcodes first, and :mod:`~ckpt_tools.readers.containers.pickle_sharing` at what was built.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Callable
from typing import Any

from ckpt_tools.errors import CkptError, DamagedCheckpoint, UnsafePickle
from ckpt_tools.readers.containers.pickle_alike import follow_alike
from ckpt_tools.readers.containers.pickle_functions import Names, allowed
from ckpt_tools.readers.containers.pickle_keys import ApartUnpickler
from ckpt_tools.readers.containers.pickle_limits import MOST_ODD_KEYS, Followed, Meter, follow
from ckpt_tools.readers.containers.pickle_sharing import may_expand, without_expansion
from ckpt_tools.readers.containers.pickled import Opaque as Opaque
from ckpt_tools.readers.containers.pickled import StorageRef as StorageRef
from ckpt_tools.readers.containers.pickled import TensorRef as TensorRef
from ckpt_tools.readers.containers.suspicion import note


class _Source(io.BytesIO):
    """The bytes of a pickle. The unpickler asks for them part by part, and a signal is answered then."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._data = data

    def peek(self, size: int, /) -> bytes:
        """The bytes that follow, without moving on."""
        at = self.tell()
        return self._data[at : at + size]


class _Restricted:
    """What an unpickler gives a pickle instead of what it names.

    Args:
        meter: counts the work of the functions of the allow-list.
        persistent_load: the storage of a persistent id, in torch files.

    Attributes:
        meter: see above.
        unknown: module and name of every global that is not on the allow-list.
    """

    def __init__(
        self, meter: Meter, persistent_load: Callable[[tuple[Any, ...]], Any] | None
    ) -> None:
        self.meter = meter
        self._names = Names(meter)
        self._allowed = allowed(meter, self._names)
        self._resolve_storage = persistent_load
        self.unknown: set[tuple[str, str]] = set()

    def find_class(self, module: str, name: str, /) -> Any:
        """Return the allowed replacement of a global, or a new inert class."""
        key = (module, name)
        if key in self._allowed:
            return self._allowed[key]
        self.unknown.add(key)
        return self._names.of(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        """Return the storage of a persistent id, as torch files have them."""
        if self._resolve_storage is None or not isinstance(pid, tuple):
            raise pickle.UnpicklingError("a reference to a storage outside a torch file")
        return self._resolve_storage(pid)


class RestrictedUnpickler(_Restricted, pickle.Unpickler):
    """An unpickler that imports nothing and calls only functions of the allow-list."""

    def __init__(
        self,
        data: bytes,
        meter: Meter,
        persistent_load: Callable[[tuple[Any, ...]], Any] | None = None,
    ) -> None:
        pickle.Unpickler.__init__(self, _Source(data), encoding="utf-8")
        _Restricted.__init__(self, meter, persistent_load)


class _OfManyKeys(_Restricted, ApartUnpickler):
    """The same, of a pickle with many keys that may have one hash."""

    memo: dict[int, Any]

    def __init__(
        self,
        data: bytes,
        meter: Meter,
        persistent_load: Callable[[tuple[Any, ...]], Any] | None = None,
    ) -> None:
        ApartUnpickler.__init__(self, _Source(data), encoding="utf-8")
        _Restricted.__init__(self, meter, persistent_load)


def _may_expand(followed: Followed, unpickler: RestrictedUnpickler | _OfManyKeys) -> bool:
    """Whether values with several places may expand without end."""
    if not (followed.has_containers or unpickler.meter.mappings):
        return False
    memo = unpickler.memo.copy()
    places = followed.shares.places.items()
    return may_expand(((memo[index], n) for index, n in places), len(followed.data))


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
        followed = follow_alike(file) if isinstance(file, io.BytesIO) else follow(file)
        kind = RestrictedUnpickler if followed.odd_keys <= MOST_ODD_KEYS else _OfManyKeys
        unpickler = kind(followed.data, Meter(len(followed.data)), persistent_load)
        try:
            value = unpickler.load()
        finally:
            note(path, unpickler.unknown)
        if followed.is_odd or _may_expand(followed, unpickler):
            value = without_expansion(value, len(followed.data))
        return value
    except CkptError:
        raise
    except (EOFError, pickle.UnpicklingError, UnicodeDecodeError) as error:
        raise DamagedCheckpoint(
            f"the pickle in it cannot be read ({str(error) or 'it is truncated'})",
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
