"""Hostile pickles: real attacks, each of which runs under plain ``pickle``, as opcodes to splice in.

A payload is a function from the path of a canary to a fragment of a pickle: opcodes that leave one object on
the stack. If any of its code runs, the canary appears.
"""

from __future__ import annotations

import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import damage

Payload = Callable[[Path], bytes]
PROTOCOL_4 = b"\x80\x04"  # from here on names may have dots


def value(plain: Any) -> bytes:
    """The opcodes of a plain value."""
    return pickle.dumps(plain, 2)[2:-1]


def name(module: str, attribute: str) -> bytes:
    """GLOBAL, the old way to name something."""
    return f"c{module}\n{attribute}\n".encode()


def stack_name(module: str, attribute: str) -> bytes:
    """STACK_GLOBAL, which alone reaches attributes of attributes."""
    return value(module) + value(attribute) + b"\x93"


def call(function: bytes, *args: bytes) -> bytes:
    """REDUCE."""
    return function + b"(" + b"".join(args) + b"tR"


def touch(canary: Path) -> bytes:
    return value(f"touch {canary}")


def python(canary: Path) -> bytes:
    return value(f"__import__('pathlib').Path({str(canary)!r}).touch()")


class _WithStateSetter:
    """Reduces to six parts, the last a function that is called with the object and its state."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return str, (__file__,), str(self.canary), None, None, shutil.copyfile


CALLS: dict[str, Payload] = {
    "os.system by REDUCE": lambda c: call(name("os", "system"), touch(c)),
    "posix.system by REDUCE": lambda c: call(name("posix", "system"), touch(c)),
    "builtins.eval": lambda c: call(name("builtins", "eval"), python(c)),
    "builtins.exec": lambda c: call(name("builtins", "exec"), python(c)),
    "builtins.open for writing": lambda c: call(
        name("builtins", "open"), value(str(c)), value("w")
    ),
    "getattr chain": lambda c: call(
        call(
            name("builtins", "getattr"),
            call(name("builtins", "__import__"), value("os")),
            value("system"),
        ),
        touch(c),
    ),
    "getattr chain through a dictionary": lambda c: (
        call(
            call(
                name("builtins", "getattr"),
                call(
                    name("builtins", "getattr"),
                    call(name("importlib", "import_module"), value("os")),
                    value("__dict__"),
                ),
                value("get"),
            ),
            value("system"),
        )
        + touch(c)
        + b"\x85R"
    ),
    "os.system by STACK_GLOBAL": lambda c: call(stack_name("os", "system"), touch(c)),
    "an attribute of our own module": lambda c: call(
        PROTOCOL_4 + stack_name("ckpt_tools.storage.places", "os.system"), touch(c)
    ),
    "an attribute of torch": lambda c: call(
        PROTOCOL_4 + stack_name("torch", "os.system"), touch(c)
    ),
    "os.system by INST": lambda c: b"(" + touch(c) + b"ios\nsystem\n",
    "os.system by OBJ": lambda c: b"(" + name("os", "system") + touch(c) + b"o",
    "subprocess.call": lambda c: call(name("subprocess", "call"), value(["touch", str(c)])),
    "functools.partial that is called": lambda c: call(
        call(name("functools", "partial"), name("os", "system"), touch(c))
    ),
    "operator.methodcaller": lambda c: call(
        call(name("operator", "methodcaller"), value("system"), touch(c)),
        call(name("importlib", "import_module"), value("os")),
    ),
    "a pickle in the pickle": lambda c: call(
        name("pickle", "loads"), value(b"\x80\x02" + call(name("os", "system"), touch(c)) + b".")
    ),
    "a class of its own made by type": lambda c: (
        call(name("builtins", "type"), value("X"), value(()), value({}))
        + call(name("os", "system"), touch(c))
        + b"\x86"
    ),
    "os.system in a list of arguments": lambda c: (
        b"]" + call(name("os", "system"), touch(c)) + b"a"
    ),
    "os.system as key of a dictionary": lambda c: (
        b"}" + call(name("os", "system"), touch(c)) + b"Ns"
    ),
    "a state setter": lambda c: pickle.dumps(_WithStateSetter(c), 2)[2:-1],
    "torch's hook for tensor subclasses": lambda c: call(
        name("torch._tensor", "_rebuild_from_type_v2"),
        name("os", "system"),
        name("builtins", "int"),
        b"(" + touch(c) + b"t",
        value({}),
    ),
    "torch.load from bytes": lambda c: call(
        name("torch.storage", "_load_from_bytes"),
        value(damage.torch_zip(b"\x80\x02" + call(name("os", "system"), touch(c)) + b".")),
    ),
}


def splice(path: Path, key: str, fragment: bytes) -> None:
    """Give the dictionary that a shard holds one more entry, or another value for an old one."""

    def change(records: dict[str, bytes]) -> None:
        data = records["data.pkl"]
        assert data.endswith(b".")
        records["data.pkl"] = data[:-1] + value(key) + fragment + b"s."

    assert zipfile.is_zipfile(path)
    damage.repack(path, change)
