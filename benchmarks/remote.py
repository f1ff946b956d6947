"""Measures the conversion of a checkpoint in a store with latency and a limited rate of each answer.

The store is the web server of the tests, in a process of its own: 30 ms before each answer, 100 MB/s a
stream. Beside the conversion stands the plain download of the same number of bytes by the same client, the
download of all bytes followed by ``zero_to_fp32.py``, and the download through s3fs, if it is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LATENCY, RATE = 0.030, 100e6
REQUEST_BYTES = 8 << 20
AT_ONCE = 32


def serve(root: Path) -> None:
    """Serve a directory; each line of stdin asks for what was sent since the last one."""
    from tests.support.remote.web import serving

    with serving(root, latency=LATENCY, rate=RATE) as web:
        print(web.url, flush=True)
        for _ in sys.stdin:
            with web.lock:
                print(json.dumps([len(web.asked), web.other, web.nbytes]), flush=True)
                web.asked.clear()
                web.other = web.nbytes = 0


class Server:
    """The server, and what it sent."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None and process.stdin is not None
        self._answers, self._questions = process.stdout, process.stdin
        self.url = self._answers.readline().strip()

    def sent(self) -> tuple[int, int, int]:
        """Requests for ranges, other requests and bytes since the last question."""
        self._questions.write("\n")
        self._questions.flush()
        found = json.loads(self._answers.readline())
        return found[0], found[1], found[2]


@contextmanager
def served(root: Path) -> Iterator[Server]:
    command = [sys.executable, __file__, "--serve", str(root)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Server(process)
    finally:
        process.kill()
        process.wait()


def timed(work: Callable[[], Any]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def needed_ranges(checkpoint: Path) -> list[tuple[str, int, int]]:
    """The bytes that a conversion needs, in requests of 8 MiB, by file."""
    from ckpt_tools import open_checkpoint

    opened = open_checkpoint(checkpoint)
    runs: dict[str, list[tuple[int, int]]] = {}
    for tensor in opened.catalogue("master").values():
        for move in tensor.moves(0, tensor.numel):
            name = Path(str(move.file)).relative_to(checkpoint).as_posix()
            runs.setdefault(name, []).append((move.offset, move.offset + move.nbytes))
    found = []
    for name, parts in runs.items():
        joined: list[list[int]] = []
        for start, stop in sorted(parts):
            if joined and start <= joined[-1][1]:
                joined[-1][1] = max(joined[-1][1], stop)
            else:
                joined.append([start, stop])
        for start, stop in joined:
            found += [
                (name, at, min(at + REQUEST_BYTES, stop))
                for at in range(start, stop, REQUEST_BYTES)
            ]
    return found


def download(url: str, ranges: list[tuple[str, int, int]], into: Path | None) -> None:
    """Fetch ranges with obstore, as many at a time as a conversion does."""
    import obstore
    from obstore.store import HTTPStore

    store = HTTPStore(url, client_options={"allow_http": True})

    def fetch(part: tuple[str, int, int]) -> None:
        name, start, stop = part
        data = obstore.get_range(store, name, start=start, end=stop)
        if into is not None:
            fd = os.open(into / name, os.O_WRONLY | os.O_CREAT)
            os.pwrite(fd, data, start)
            os.close(fd)

    with ThreadPoolExecutor(AT_ONCE) as threads:
        list(threads.map(fetch, ranges))


def through_s3fs(url: str, ranges: list[tuple[str, int, int]]) -> None:
    import s3fs

    store = s3fs.S3FileSystem(
        key="k", secret="s", client_kwargs={"endpoint_url": url, "region_name": "us-east-1"}
    )
    for at in range(0, len(ranges), AT_ONCE):
        part = ranges[at : at + AT_ONCE]
        names, starts, stops = zip(*part, strict=True)
        store.cat_ranges(list(names), list(starts), list(stops))


def peak_of(process: subprocess.Popen[str]) -> int:
    """The largest resident memory of a process, in bytes."""
    peak = 0
    while process.poll() is None:
        try:
            text = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        found = [line for line in text.splitlines() if line.startswith("VmHWM")]
        peak = int(found[0].split()[1]) << 10 if found else peak
        time.sleep(0.05)
    return peak


def convert(url: str, out: Path) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "ckpt_tools",
        "consolidate",
        url,
        str(out),
        "--weights-only",
        "--json",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peaks: list[int] = []
    watch = threading.Thread(target=lambda: peaks.append(peak_of(process)))
    watch.start()
    stdout, _ = process.communicate()
    watch.join()
    return {**json.loads(stdout), "peak": peaks[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="what make_zero.py wrote")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--everything", action="store_true", help="also download all, and run zero_to_fp32.py"
    )
    asked = parser.parse_args()
    if asked.serve:
        serve(asked.checkpoint)
        return
    root = asked.checkpoint.resolve()
    ranges = needed_ranges(root)
    needed = sum(stop - start for _, start, stop in ranges)
    print(f"needed: {needed:,} bytes in {len(ranges)} ranges")
    with served(root.parent) as server, tempfile.TemporaryDirectory(dir=root.parent) as scratch:
        url = f"{server.url}/{root.name}"
        named = [(f"{root.name}/{name}", start, stop) for name, start, stop in ranges]
        for _ in range(asked.repeat):
            server.sent()
            seconds = timed(lambda: download(server.url, named, None))
            print(f"plain download: {seconds:.2f} s, {needed / seconds / 1e6:.0f} MB/s")
            kept = Path(scratch) / "kept"
            (kept / root.name).mkdir(parents=True)
            for name in {name for name, _, _ in named}:
                (kept / name).parent.mkdir(exist_ok=True)
            seconds = timed(lambda kept=kept: download(server.url, named, kept))
            shutil.rmtree(kept)
            print(f"plain download into files: {seconds:.2f} s, {needed / seconds / 1e6:.0f} MB/s")
            server.sent()
            began = time.monotonic()
            report = convert(url, Path(scratch) / "out")
            whole = time.monotonic() - began
            requests, other, nbytes = server.sent()
            moved = report["seconds"]["move"]
            print(
                f"ckpt-tools: {whole:.2f} s, of it {moved:.2f} s to move {needed / moved / 1e6:.0f} MB/s; "
                f"{requests} ranges and {other} other requests, {nbytes:,} bytes = {nbytes / needed:.4f} of "
                f"the needed; peak {report['peak'] / 1e6:.0f} MB; {report['seconds']}"
            )
        try:
            seconds = timed(lambda: through_s3fs(server.url, named))
            print(f"s3fs, plain download: {seconds:.2f} s, {needed / seconds / 1e6:.0f} MB/s")
        except ImportError:
            print("s3fs is not installed")
        if asked.everything:
            everything(root, server, Path(scratch))


def everything(root: Path, server: Server, scratch: Path) -> None:
    """Download every file, then run DeepSpeed's script."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    parts = []
    for path in files:
        name = path.relative_to(root.parent).as_posix()
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        size = path.stat().st_size
        parts += [(name, at, min(at + REQUEST_BYTES, size)) for at in range(0, size, REQUEST_BYTES)]
    server.sent()
    first = timed(lambda: download(server.url, parts, scratch))
    _, _, nbytes = server.sent()
    script = [sys.executable, str(scratch / root.name / "zero_to_fp32.py")]
    second = timed(
        lambda: subprocess.run(
            [*script, str(scratch / root.name), str(scratch / "fp32"), "--safe_serialization"],
            check=True,
            capture_output=True,
        )
    )
    print(
        f"download of everything: {first:.2f} s, {nbytes:,} bytes; zero_to_fp32.py: {second:.2f} s"
    )


if __name__ == "__main__":
    main()
