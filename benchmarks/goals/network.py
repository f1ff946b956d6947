"""Goal 9: `--node-local` between two machines that a link of 1 Gb/s joins, by network namespaces.

Each namespace has half of the ranks' files under the path of the checkpoint, by a mount of its own. A pair
of virtual devices joins the two, and a token bucket limits each direction.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from goals.raw import Line, add, column, has, load, middle

NAME = "network"
LINK_BYTES = 1e9 / 8
# Of each frame of 1,514 bytes on the device, so many are of the stream: the rest are headers.
SHARE = 1448 / 1514
# Of this process alone: a namespace that has such a name already belongs to somebody else.
HOSTS = (f"ckpt-bench-{os.getpid()}-0", f"ckpt-bench-{os.getpid()}-1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
# Both are made inside of the namespaces, so that none of another program has the name.
DEVICES = ("ckptbench0", "ckptbench1")
PORT = "29577"
BUCKET = "rate 1gbit burst 128kb latency 20ms"
# The path of many users leaves out where a system keeps `ip` and `tc`.
PATH = os.pathsep.join(
    [os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"]
)
ENVIRONMENT = os.environ | {"PATH": PATH}


def _must(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


@contextmanager
def machines() -> Iterator[None]:
    """Two namespaces with a link. Only what this process made is deleted.

    Raises:
        SystemExit: the user is not root, a command is missing, or the kernel refuses.
    """
    if os.geteuid():
        raise SystemExit("network namespaces need root")
    absent = [name for name in ("ip", "tc") if not shutil.which(name, path=PATH)]
    if absent:
        raise SystemExit(f"not installed: {', '.join(absent)} (iproute2 has ip and tc)")
    with contextlib.ExitStack() as made:
        for host in HOSTS:
            _must("ip", "netns", "add", host)
            made.callback(_must, "ip", "netns", "del", host)
        (here, there), (near, far) = HOSTS, DEVICES
        pair = f"ip -n {here} link add {near} type veth peer name {far} netns {there}"
        _must(*pair.split())
        for host, device, address in zip(HOSTS, DEVICES, ADDRESSES, strict=True):
            inside = ("ip", "-n", host)
            _must(*inside, "addr", "add", f"{address}/24", "dev", device)
            _must(*inside, "link", "set", "lo", "up")
            _must(*inside, "link", "set", device, "up")
            limit = f"tc qdisc add dev {device} root tbf {BUCKET}"
            _must("ip", "netns", "exec", host, *limit.split())
        yield


def sent(number: int) -> int:
    """Bytes that a machine sent."""
    command = ["ip", "-n", HOSTS[number], "-s", "-j", "link", "show", DEVICES[number]]
    done = subprocess.run(command, capture_output=True, check=True, env=ENVIRONMENT)
    return int(json.loads(done.stdout)[0]["stats64"]["tx"]["bytes"])


def run(checkpoint: Path) -> None:
    """One round."""
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as made, machines():
        scratch = Path(made)
        halves = [_half(checkpoint, scratch / f"half{number}", number) for number in range(2)]
        seen = scratch / "checkpoint"
        seen.mkdir()
        out = scratch / "out"
        before = [sent(number) for number in range(2)]
        with contextlib.ExitStack() as started:
            processes = []
            for number, half in enumerate(halves):
                tool = f"-m ckpt_tools consolidate {seen} {out} --config {checkpoint / 'hf'}"
                launch = (
                    f"mount --bind {half} {seen} && exec {sys.executable} -m torch.distributed.run "
                    f"--nnodes 2 --nproc-per-node 1 --node-rank {number} --master-addr {ADDRESSES[0]} "
                    f"--master-port {PORT} {tool} --dtype bf16 --node-local --json"
                )
                environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": DEVICES[number]}
                log = started.enter_context(open(scratch / f"log{number}", "w+"))
                process = subprocess.Popen(
                    ["ip", "netns", "exec", HOSTS[number], "sh", "-c", launch],
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=environment,
                )
                started.callback(process.kill)
                processes.append(process)
                time.sleep(0.2)
            texts = [process.communicate(timeout=300)[0] for process in processes]
            if any(process.returncode for process in processes):
                tail = "".join(
                    (scratch / f"log{number}").read_text()[-1500:] for number in range(2)
                )
                raise SystemExit(f"{tail}\na rank failed")
        report = json.loads(texts[0])
        seconds = report["seconds"]["move"]
        through = [sent(number) - before[number] for number in range(2)]
    print(f"{NAME}: {max(through) / 1e6:.0f} MB in {seconds:.2f} s", file=sys.stderr)
    add(NAME, [{"contender": NAME, "move_seconds": seconds, "sent_bytes": max(through)}])


def _half(checkpoint: Path, made: Path, number: int) -> Path:
    """The files of half of the ranks, as links; what all machines have is in both."""
    folder = made / "global_step100"
    folder.mkdir(parents=True)
    shutil.copy(checkpoint / "latest", made)
    names = sorted(path.name for path in (checkpoint / folder.name).iterdir())
    ranks = sorted({_rank(name) for name in names})
    mine = {rank for rank in ranks if (rank < len(ranks) // 2) == (number == 0)}
    for name in names:
        if _rank(name) in mine:
            os.link(checkpoint / folder.name / name, folder / name)
    return made


def _rank(name: str) -> int:
    return int(name.partition("pp_rank_")[2].partition("_")[0])


def lines() -> list[Line]:
    """What the rounds say."""
    raw = load(NAME)
    if not has(raw, NAME):
        return []
    volume = middle(raw, NAME, "sent_bytes")
    rates = tuple(volume / seconds / 1e6 for seconds in column(raw, NAME, "move_seconds"))
    return [
        Line(
            9,
            "link of 1 Gb/s between two machines, each direction, while bytes move",
            "torchrun --nnodes 2 -m ckpt_tools consolidate --node-local, bf16",
            rates,
            "MB/s",
            volume / middle(raw, NAME, "move_seconds") / LINK_BYTES,
            f"the link: {LINK_BYTES / 1e6:.0f} MB/s, of it headers {1 - SHARE:.0%}",
            least=0.85,
            limit=f"{volume / 1e9:.2f} GB through the link; the rest lies on the machine that needs it",
        )
    ]
