"""Owns the question which names in pickles no known framework writes, and the memory of where they were read.

Nothing that a pickle names is run, so such a checkpoint can be converted. But somebody has put a name such as
``os.system`` into it, and other programs would run that.

Expected are the classes of any library or training script (``__main__.RunInfo``), the plain classes of the
standard library that are listed here, and the functions by which torch and numpy rebuild their objects.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

from ckpt_tools.tensors.dtypes import BY_NAME

# What training scripts keep of the standard library, by module.
_STANDARD = {
    "argparse": {"Namespace"},
    "builtins": {
        *("Ellipsis", "NotImplemented", "bool", "bytearray", "bytes", "complex", "dict", "float"),
        *("frozenset", "int", "list", "object", "range", "set", "slice", "str", "tuple", "type"),
    },
    "collections": {"ChainMap", "Counter", "OrderedDict", "UserDict", "UserList", "deque"},
    "copyreg": {"__newobj__", "__newobj_ex__", "_reconstructor"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "fractions": {"Fraction"},
    "functools": {"partial"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "random": {"Random"},
    "re": {"_compile"},
    "types": {"MappingProxyType", "SimpleNamespace"},
    "uuid": {"UUID"},
    "zoneinfo": {"ZoneInfo", "_unpickle"},
}
_OLD = {"__builtin__": "builtins", "copy_reg": "copyreg", "pathlib._local": "pathlib"}
_FUNCTIONS = {
    "deepspeed": {"fragment_address"},
    "numpy": {
        *("__bit_generator_ctor", "__generator_ctor", "__randomstate_ctor", "_frombuffer"),
        *("_reconstruct", "dtype", "ndarray", "scalar"),
    },
    "torch": {
        *("_get_layout", "_remote_device", "_rebuild_device_tensor_from_numpy", "device", "dtype"),
        *("_rebuild_device_tensor_from_cpu_tensor", "_rebuild_meta_tensor_no_storage"),
        *("_rebuild_nested_tensor", "_rebuild_parameter_with_state", "_rebuild_qtensor"),
        *("_rebuild_sparse_csr_tensor", "_rebuild_sparse_tensor", "_rebuild_wrapper_subclass"),
        *("memory_format", "_set_obj_state", *BY_NAME),
        # dtypes of torchao, of which no tensor is made
        *(f"{kind}{bits}" for kind in ("int", "uint") for bits in range(1, 8)),
    },
}
# Functions in pickled modules: activations.
_ACTIVATIONS = ("torch.nn.functional", "torch._C._nn", "torch.nn.init")
_MOST_FILES = 10_000

_found: dict[str, tuple[tuple[int, int], frozenset[str]]] = {}
_lock = threading.Lock()


def is_expected(module: str, name: str) -> bool:
    """Whether a framework or a training script is known to write a name, as far as its form tells."""
    module = _OLD.get(module, module)
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names and top != "__main__":
        return name in _STANDARD.get(module, ())
    if name in _FUNCTIONS.get(top, ()) or (module in _ACTIVATIONS and name.isidentifier()):
        return True
    # A class, by its spelling; nested classes have dots.
    return all(part.lstrip("_")[:1].isupper() for part in name.split("."))


def note(path: str, names: Iterable[tuple[str, str]]) -> None:
    """Remember the names in a file's pickle that are not expected."""
    odd = {f"{module}.{name}" for module, name in names if not is_expected(module, name)}
    if odd:
        stamp = _stamp(path)
        with _lock:
            known, before = _found.get(path, (stamp, frozenset()))
            if path in _found or len(_found) < _MOST_FILES:
                _found[path] = stamp, frozenset(odd | before) if known == stamp else frozenset(odd)


def suspicious(files: Iterable[Path], directory: Path) -> dict[str, list[str]]:
    """The names that were read in files of a checkpoint and are not expected, by file.

    Args:
        files: the files of the checkpoint.
        directory: its directory; files below it count, too.
    """
    with _lock:
        if not _found:
            return {}
        known = {str(file) for file in files}
        below = f"{directory}{os.sep}"
        return {
            path: sorted(names)
            for path, (stamp, names) in sorted(_found.items())
            if (path in known or path == str(directory) or path.startswith(below))
            and stamp == _stamp(path)
        }


def _stamp(path: str) -> tuple[int, int]:
    try:
        held = os.stat(path)
    except OSError:
        return (0, 0)
    return held.st_mtime_ns, held.st_size
