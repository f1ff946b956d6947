"""Starts real torchruns: on one machine, and on two that are namespaces joined by loopback or a cable."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.forked import Forked
from tests.support.waiting import LONGEST_SECONDS, wait_until

REPOSITORY = Path(__file__).resolve().parents[3]
DRIVER = Path(__file__).with_name("driver.py")
GATED = Path(__file__).with_name("gated.py")
# The path of many users leaves out where a system keeps it.
IP = shutil.which("ip", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin") or "ip"


@dataclass(frozen=True)
class Ended:
    """A torchrun that has ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def said(self) -> str:
        """What all ranks and torchrun printed."""
        return self.stdout + self.stderr


def start(
    command: Sequence[str | Path],
    *,
    ranks: int,
    nodes: int = 1,
    node: int = 0,
    port: int | None = None,
    address: str = "127.0.0.1",
    binds: Mapping[Path, Path] | None = None,
    within: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """A torchrun of one node; ``command`` is a script or ``-m module`` with its arguments.

    Args:
        command: what each rank runs.
        ranks: ranks of this node.
        nodes: number of nodes.
        node: which of them this is.
        port: where they meet.
        address: of the first node.
        binds: directories that this node sees in the place of others, each as real -> seen.
        within: a command that runs another somewhere, such as ``nsenter``.
        environment: more variables for the ranks.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    torchrun += [f"--nnodes={nodes}", f"--node-rank={node}", f"--master-addr={address}"]
    torchrun += [f"--master-port={port or free_port()}", *map(str, command)]
    if binds:
        mounts = "".join(f"mount --bind '{real}' '{seen}' && " for real, seen in binds.items())
        within = ["unshare", "-m", "bash", "-c", f'{mounts}exec "$@"', "bash"]
    # torchrun itself need not import torch anew; its ranks are new interpreters.
    return (subprocess.Popen if within else Forked)(
        [*within, *torchrun],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
    )


def ended(process: subprocess.Popen[str]) -> Ended:
    """Wait for it; one that hangs fails the test."""
    try:
        stdout, stderr = process.communicate(timeout=LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        kill_all(process)
        stdout, stderr = process.communicate()
        raise AssertionError(f"it hangs\n{stdout}\n{stderr}") from None
    return Ended(process.returncode, stdout, stderr)


def launch(command: Sequence[str | Path], *, ranks: int) -> Ended:
    """Run to the end on one machine."""
    return ended(start(command, ranks=ranks))


def ranks_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """Process ids of the ranks that a torchrun has started, by rank."""
    found = {}
    for pid in _children(process.pid):
        with contextlib.suppress(OSError):
            for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if variable.startswith(b"RANK="):
                    found[int(variable[5:])] = pid
    return found


def kill_all(process: subprocess.Popen[str]) -> None:
    """As a machine that loses its power: torchrun and its ranks, with no time for anything."""
    for pid in (process.pid, *_children(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    listed = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            listed += [int(child) for child in (task / "children").read_text().split()]
    return listed


def is_running(pid: int) -> bool:
    """Whether a process has not ended; a stopped one has not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(true: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait for something that a run does before it ends."""
    try:
        wait_until(true, process)
    except AssertionError as error:
        kill_all(process)
        raise AssertionError(f"{error}\n{ended(process).said}") from None


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextlib.contextmanager
def namespace(*kinds: str) -> Iterator[list[str]]:
    """The command that runs another in new namespaces, which last as long as the block."""
    holder = subprocess.Popen(["unshare", *kinds, "sleep", "infinity"])
    try:
        own = [Path(f"/proc/{pid}/ns/mnt") for pid in ("self", holder.pid)]
        nets = [Path(f"/proc/{pid}/ns/net") for pid in ("self", holder.pid)]
        wait_until(lambda: not _same(own) or not _same(nets))
        yield ["nsenter", *kinds, "-t", str(holder.pid)]
    finally:
        holder.kill()
        holder.wait()


def _same(links: Sequence[Path]) -> bool:
    return len({os.readlink(link) for link in links}) == 1


def _may(script: str, *kinds: str) -> bool:
    probe = ["unshare", *kinds, "bash", "-c", script]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


needs_namespaces = pytest.mark.skipif(
    not _may("mount -t tmpfs none /mnt", "-m"),
    reason="mount namespaces need privileges that this process has not",
)
needs_cables = pytest.mark.skipif(
    not _may(f"{IP} link add left type veth peer name right", "-n"),
    reason="network namespaces need the command ip, and privileges that this process has not",
)
