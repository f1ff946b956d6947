"""Weights in files of ``torch.save``: where their tensors lie, as far as the package's own reader tells.

Owns the crossing from the reader of pickles, which stops at its first problem and never runs code, to the
entries that all checks look at. It must not know which files make a model.
"""

from __future__ import annotations

from pathlib import Path

from ckpt_tools.errors import CkptError
from ckpt_tools.readers.containers.weight_files import read_weight_files
from ckpt_tools.tensors.catalogue import FlatRange, Stored
from ckpt_tools.verification.container import Entry
from ckpt_tools.verification.problem import Findings


def read_pickled(directory: Path, file: str, findings: Findings) -> dict[str, Entry] | None:
    """The tensors of one file; None, and a problem, where it cannot be read.

    Second names of a tensor are entries at the place of the first.
    """
    try:
        held = read_weight_files(directory / file)
        entries = {name: _entry(name, held.tensors[name], file) for name in held.tensors}
    except CkptError as error:
        findings.add("pickled-invalid", error.fact, file=file, tensor=error.tensor, hint=error.hint)
        return None
    except OSError as error:
        findings.add("file-unreadable", f"cannot be read ({error.strerror})", file=file)
        return None
    seconds = {name: entries[first] for name, first in held.ties.items()}
    return entries | {
        name: Entry(name, first.code, first.shape, file, first.start, first.stop)
        for name, first in seconds.items()
    }


def _entry(name: str, tensor: Stored, file: str) -> Entry:
    start = 0
    for fragment in tensor.fragments:
        assert isinstance(fragment.region, FlatRange)
        start = fragment.offset
    return Entry(name, tensor.dtype.safetensors, tensor.shape, file, start, start + tensor.nbytes)
