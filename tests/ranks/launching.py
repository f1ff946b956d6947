"""Starts real torchruns: on one machine, and on two that are mount namespaces joined by loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).with_name("driver.py")
LIMIT_SECONDS = 150


@dataclass(frozen=True)
class Ended:
    """A torchrun that has ended."""

    status: int
    stdout: str
    stderr: str


def start(
    command: Sequence[str | Path],
    *,
    ranks: int,
    nodes: int = 1,
    node: int = 0,
    port: int | None = None,
    binds: Mapping[Path, Path] | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """A torchrun of one node; ``command`` is a script or ``-m module`` with its arguments.

    Args:
        command: what each rank runs.
        ranks: ranks of this node.
        nodes: number of nodes.
        node: which of them this is.
        port: where they meet.
        binds: directories that this node sees in the place of others, each as real -> seen.
        environment: more variables for the ranks.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    torchrun += [f"--nnodes={nodes}", f"--node-rank={node}", "--master-addr=127.0.0.1"]
    torchrun += [f"--master-port={port or free_port()}", *map(str, command)]
    if binds:
        mounts = "".join(f"mount --bind '{real}' '{seen}' && " for real, seen in binds.items())
        torchrun = ["unshare", "-m", "bash", "-c", f'{mounts}exec "$@"', "bash", *torchrun]
    return subprocess.Popen(
        torchrun,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
    )


def ended(process: subprocess.Popen[str], seconds: float = LIMIT_SECONDS) -> Ended:
    """Wait for it; one that hangs fails the test."""
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        stdout, stderr = process.communicate()
        raise AssertionError(f"it hangs\n{stdout}\n{stderr}") from None
    return Ended(process.returncode, stdout, stderr)


def launch(command: Sequence[str | Path], *, ranks: int) -> Ended:
    """Run to the end on one machine."""
    return ended(start(command, ranks=ranks))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory, by its path."""
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def _may_mount() -> bool:
    probe = ["unshare", "-m", "bash", "-c", "mount -t tmpfs none /mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


needs_namespaces = pytest.mark.skipif(
    not _may_mount(), reason="mount namespaces need privileges that this process has not"
)
