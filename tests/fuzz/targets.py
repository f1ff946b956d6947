"""What is fuzzed: each target takes bytes, and ends with nothing or with an error of ckpt-tools."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ckpt_tools import consolidate
from ckpt_tools.analysis.inspection import inspect
from ckpt_tools.errors import CkptError
from ckpt_tools.readers.containers.records import Records
from ckpt_tools.readers.containers.restricted_pickle import TensorRef, unpickle
from ckpt_tools.readers.containers.safetensors_file import read_safetensors
from ckpt_tools.readers.containers.torch_file import TorchFile, stored
from ckpt_tools.readers.opening import open_weights
from ckpt_tools.verification import verify

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
CORPUS = Path(__file__).resolve().parent / "corpus"
_LARGEST = 60_000


def unpickler(data: bytes, _scratch: Path) -> None:
    """One pickle; what was read can be shown and compared."""
    value = unpickle(io.BytesIO(data), "some/file")
    repr(value)
    assert value == value or value != value


def torch_zip(data: bytes, scratch: Path) -> None:
    path = scratch / "pytorch_model.bin"
    path.write_bytes(data)
    with Records(path, "Copy it anew.") as records:
        for record in records.holding(0, len(data)):
            records.read(record.start, record.stop)
    content = TorchFile(path).load()
    for value in content.values() if isinstance(content, dict) else ():
        if isinstance(value, TensorRef):
            for fragment in stored(value).fragments:
                assert 0 <= fragment.offset <= len(data)


def safetensors_header(data: bytes, scratch: Path) -> None:
    path = scratch / "model.safetensors"
    path.write_bytes(data)
    held = read_safetensors(path)
    assert sum(tensor.nbytes for tensor in held.tensors.values()) <= len(data)


def dcp_metadata(data: bytes, scratch: Path) -> None:
    directory = scratch / "dcp"
    directory.mkdir(exist_ok=True)
    (directory / ".metadata").write_bytes(data)
    _read(directory)


def weight_index(data: bytes, scratch: Path) -> None:
    directory = scratch / "hf"
    directory.mkdir(exist_ok=True)
    (directory / "model.safetensors.index.json").write_bytes(data)
    _read(directory)


def _read(path: Path) -> None:
    for problem in inspect(path).problems:
        assert "unforeseen" not in problem
    open_weights(path).catalogue()


def _verify(path: Path) -> None:
    verify(path, read_data=True)


TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    each.__name__: each
    for each in (unpickler, torch_zip, safetensors_header, dcp_metadata, weight_index)
}


def seeds(target: str) -> list[bytes]:
    """Inputs to begin with: the corpus, and small shipped files."""
    found = [path.read_bytes() for path in sorted((CORPUS / target).glob("*"))]
    patterns = {
        "unpickler": ("*.metadata", "*.pkl"),
        "torch_zip": ("*_model_states.pt", "*.bin", "*.pth"),
        "safetensors_header": ("*.safetensors",),
        "dcp_metadata": (".metadata",),
        "weight_index": ("*.index.json",),
    }
    for pattern in patterns[target]:
        paths = sorted(FIXTURES.rglob(pattern), key=lambda path: (path.stat().st_size, str(path)))
        found += [path.read_bytes() for path in paths[:6] if path.stat().st_size <= _LARGEST]
    return found


class Fixture:
    """A copy of a shipped checkpoint, one file of which is changed at a time.

    Args:
        source: the checkpoint.
        scratch: where the copy lies.
        finished: verify what is written from the checkpoint, instead of reading the checkpoint.
    """

    def __init__(self, source: Path, scratch: Path, *, finished: bool = False) -> None:
        self.path = scratch / "-".join(source.relative_to(FIXTURES).parts)
        self._try = _verify if finished else _read
        if finished:
            consolidate(source, self.path, weights_only=True, max_shard_size=40_000)
        else:
            shutil.copytree(source, self.path)
        files = sorted(path for path in self.path.rglob("*") if path.is_file())
        self.small = [path for path in files if path.stat().st_size < 400_000]

    def try_with(self, file: Path, data: bytes) -> None:
        """Read the checkpoint with other content in one file; an error must be of ckpt-tools."""
        whole = file.read_bytes()
        file.write_bytes(data)
        try:
            self._try(self.path)
        except CkptError:
            pass
        finally:
            file.write_bytes(whole)


def fixtures() -> Iterator[Path]:
    """The directories of shipped checkpoints."""
    for kind in ("zero", "dcp", "accelerate", "rank_files", "peft", "quantised", "layouts"):
        for case in sorted((FIXTURES / kind).iterdir()):
            for place in ("checkpoint", "adapter", "model"):
                if (case / place).is_dir():
                    yield case / place
                    break


# What is written from it has several shards, an index and a manifest.
FINISHED = FIXTURES / "zero" / "zero2-bf16-llama-3ranks" / "checkpoint"
