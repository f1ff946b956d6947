"""Owns the writing of one weight file, ``model.safetensors`` or ``pytorch_model.bin``, into any directory.

The file appears complete or not at all. An existing file is replaced only if that is asked for. The new file
can be compared with its source first.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ckpt_tools.errors import OutputExists, OutputFailed
from ckpt_tools.readers.containers.weight_files import read_weight_files
from ckpt_tools.tensors.catalogue import Catalogue
from ckpt_tools.tensors.checksums import ReadLog
from ckpt_tools.tensors.gather import Gatherer
from ckpt_tools.tensors.threads import default_workers
from ckpt_tools.tensors.windows import first_difference
from ckpt_tools.writing.bytes import Outputs, lay_out, write
from ckpt_tools.writing.closing import close_files
from ckpt_tools.writing.layout import OutputFormat, Plan, plan
from ckpt_tools.writing.publish import check_room, partial_directory
from ckpt_tools.writing.source import COPY_AGAIN, check_sources
from ckpt_tools.writing.units import Units

SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"


def write_single_file(
    tensors: Catalogue, path: Path, *, prove: bool, overwrite: bool = False
) -> None:
    """Write all tensors unchanged into one file.

    Args:
        tensors: the tensors. Second names of a tensor are left out.
        path: the file; ``model.safetensors`` is safetensors, ``pytorch_model.bin`` is ``torch.save``
            of a dict. Its directory is made if it does not exist.
        prove: read the file and compare it with ``tensors`` bit for bit before it appears.
        overwrite: replace a file that is there, once the new one is complete.

    Raises:
        OutputExists: the file exists already, or its directory is a file.
        OutputFailed: the disk is full or refused a write, or the file differs from ``tensors``.
        DamagedCheckpoint: a source file ended early, cannot be read, or is not what was saved.
    """
    directory = path.parent
    if directory.exists() and not directory.is_dir():
        raise OutputExists("it exists and is not a directory", path=directory)
    if path.is_dir() or (not overwrite and (path.exists() or path.is_symlink())):
        raise OutputExists(
            "the output exists already", path=path, hint="Remove it, or name another directory."
        )
    format: OutputFormat = "bin" if path.name == TORCH else "safetensors"
    layout = plan(dict(tensors), max_shard_size=tensors.nbytes + 1, format=format)
    check_room(directory, layout.nbytes)
    with _stage(path, overwrite=overwrite) as stage:
        _write(layout, stage)
        if prove:
            _prove(tensors, stage / path.name)


def _write(layout: Plan, directory: Path) -> None:
    lay_out(layout, directory)
    units = Units(layout)
    with Outputs(layout, directory) as outputs:
        log = ReadLog()
        write(units, outputs, [range(len(units))], log=log)
    check_sources(log, hint=COPY_AGAIN)
    close_files(layout, directory, default_workers())


@contextmanager
def _stage(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary directory. Its file moves to ``path`` if the block ends without an error."""
    directory = path.parent
    if not directory.is_dir() or not any(directory.iterdir()):
        with partial_directory(directory, overwrite=False) as partial:
            yield partial.path
        return
    stage = directory / f"{path.name}.partial-{secrets.token_hex(4)}"
    try:
        try:
            stage.mkdir()
        except OSError as error:
            raise OutputFailed(
                f"cannot be made ({error.strerror})", path=stage, hint="Check the permissions."
            ) from error
        yield stage
        _put_in_place(stage / path.name, path, overwrite=overwrite)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _put_in_place(source: Path, path: Path, *, overwrite: bool) -> None:
    try:
        _sync(source)
        try:
            if overwrite:
                source.replace(path)
                _sync(path.parent)
                return
            os.link(source, path)  # unlike a rename, it never replaces a file
        except FileExistsError:
            raise OutputExists("it appeared while the output was written", path=path) from None
        except OSError:
            source.rename(path)  # some file systems have no hard links
        _sync(path.parent)
    except OSError as error:
        raise OutputFailed(f"cannot be put in place ({error.strerror})", path=path) from error


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _prove(tensors: Catalogue, path: Path) -> None:
    """Raise OutputFailed unless the file holds exactly these tensors, bit for bit."""
    held = read_weight_files(path).tensors
    for name in tensors.keys() ^ held.keys():
        raise OutputFailed(
            "the written file lacks the tensor, or the source does",
            path=path,
            tensor=name,
        )
    with Gatherer() as gatherer:
        for name, tensor in tensors.items():
            found = held[name]
            if (found.dtype, found.shape) != (tensor.dtype, tensor.shape) or first_difference(
                gatherer, found, tensor
            ) is not None:
                raise OutputFailed(
                    "the written tensor differs from its source",
                    path=path,
                    tensor=name,
                    hint="Nothing was kept or removed. Check the disk and the memory.",
                )
