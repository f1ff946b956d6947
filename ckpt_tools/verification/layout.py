"""Owns the names of weight files in a finished directory, and the agreement of an index with its shards.

:mod:`~ckpt_tools.verification.container` reads one file.

Sources: ``transformers/modeling_utils.py`` (``_get_resolved_checkpoint_files``: which file is taken
first), ``transformers/utils/hub.py`` (``get_checkpoint_shard_files``: what an index needs).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ckpt_tools.errors import AmbiguousCheckpoint, CkptError, listed, tensors
from ckpt_tools.hub.adapter_config import NAME as ADAPTER_CONFIG
from ckpt_tools.readers.containers.weight_files import ADAPTER_FILES
from ckpt_tools.verification.container import Entry, read_container, read_pickled
from ckpt_tools.verification.directory import CONFIG, Directory, read_object
from ckpt_tools.verification.problem import Findings

_INDEX_SUFFIX = ".index.json"
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?P<suffix>\.\w+)")

Tensors = dict[str, Entry]
_Reader = Callable[[str], "Tensors | None"]


@dataclass(frozen=True, slots=True)
class _Family:
    """The file names of one weight format.

    Attributes:
        single: the name of a file with all weights.
        is_pickled: whether ``torch.save`` writes it.
    """

    single: str
    is_pickled: bool

    @property
    def index(self) -> str:
        """The index of the shards."""
        return self.single + _INDEX_SUFFIX

    def files(self, names: Iterable[str]) -> list[str]:
        """The weight files of this format in ``names``."""
        if self.is_pickled:
            return [n for n in names if re.fullmatch(r"pytorch_model.*\.bin", n)]
        return [n for n in names if n.endswith(".safetensors") and n != ADAPTER_FILES[0]]


_SAFETENSORS = _Family("model.safetensors", False)
_PICKLED = _Family("pytorch_model.bin", True)


def read_weights(directory: Directory, findings: Findings) -> None:
    """Find the weights, read every header, and keep the tensors in ``directory``."""
    names = directory.root_files
    _read_adapters(directory, findings)
    held = {f: f.files(names) for f in (_SAFETENSORS, _PICKLED)}
    is_model = any(held.values()) or any(f.index in names for f in held)
    if not is_model:
        if not directory.adapters:
            below = _models_below(directory.files)
            findings.add(
                "no-weights",
                "no file of the directory holds weights that a loader would find",
                hint=f"Name one of the directories in it: {listed(below)}."
                if below
                else _how_to_convert(directory.path)
                or f"A model needs {_SAFETENSORS.single} or {_SAFETENSORS.index}.",
            )
        return
    safe = bool(held[_SAFETENSORS]) or _SAFETENSORS.index in names
    family = _SAFETENSORS if safe else _PICKLED
    directory.tensors = _Weights(directory, family, held[family], findings).read()
    findings.checked.append(
        f"{tensors(len(directory.tensors))} in the weight files, their places and sizes"
    )
    if family is _PICKLED:
        findings.add(
            "pickled-weights",
            "the weights are pickles, which can run code when they are loaded",
            file=held[_PICKLED][0] if held[_PICKLED] else _PICKLED.index,
            hint="Save them as safetensors with ckpt-tools consolidate DIR OUT.",
        )
    for name in held[_PICKLED] if family is _SAFETENSORS else ():
        findings.add(
            "pickled-weights-beside",
            "pickled weights lie beside safetensors, and need not be the same",
            file=name,
            hint="Delete the file. Loaders use the safetensors.",
        )


def _models_below(files: Collection[str]) -> list[str]:
    """The folders with a config and weights."""
    held: dict[str, list[str]] = {}
    for file in files:
        folder, _, name = file.rpartition("/")
        held.setdefault(folder, []).append(name)
    families = (_SAFETENSORS, _PICKLED)
    return [
        folder
        for folder, names in held.items()
        if CONFIG in names and any(family.files(names) for family in families)
    ]


def _how_to_convert(path: Path) -> str | None:
    """The next step where the directory is a checkpoint of training; None where it is none."""
    from ckpt_tools.readers import locate

    named = shlex.quote(str(path))
    try:
        found = locate(path)
    except AmbiguousCheckpoint:
        return f"It holds checkpoints of training. List them: ckpt-tools inspect {named}."
    except CkptError:
        return None
    return (
        f"It is a checkpoint of training ({found.format}). Convert it, and verify the output: "
        f"ckpt-tools consolidate {named} OUT."
    )


def _read_adapters(directory: Directory, findings: Findings) -> None:
    """Read every adapter, in the directory itself or in folders with the adapters' names."""
    wanted = (ADAPTER_CONFIG, *ADAPTER_FILES)
    places = (file.rpartition("/") for file in directory.files)
    folders = {folder for folder, _, name in places if name in wanted and "/" not in folder}
    for folder in sorted(folders):
        prefix = f"{folder}/" if folder else ""
        present = [prefix + n for n in ADAPTER_FILES if prefix + n in directory.files]
        read = _reader(directory, present[0].endswith(".bin") if present else False, findings)
        directory.adapters[folder] = (read(present[0]) or {}) if present else {}
        if not present:
            findings.add(
                "no-weights",
                "the file with the adapter's tensors is missing beside its config",
                file=prefix + ADAPTER_CONFIG,
                hint=f"An adapter needs {ADAPTER_FILES[0]}.",
            )
        if len(present) == 2:
            findings.add(
                "pickled-weights-beside",
                "pickled weights lie beside safetensors, and need not be the same",
                file=present[1],
                hint="Delete the file. PEFT uses the safetensors.",
            )


def _reader(directory: Directory, is_pickled: bool, findings: Findings) -> _Reader:
    """A function that reads the tensors of one file; None if it cannot be read."""

    def read(file: str) -> Tensors | None:
        if is_pickled:
            return read_pickled(directory.path, file, findings)
        container = read_container(directory.path, file, findings)
        if container is None:
            return None
        directory.containers[file] = container
        return dict(container.entries)

    return read


class _Weights:
    """The weight files of a model. Files that belong to it are read, others are reported."""

    def __init__(
        self, directory: Directory, family: _Family, present: list[str], findings: Findings
    ) -> None:
        self._directory = directory
        self._family = family
        self._present = present
        self._findings = findings
        self._read = _reader(directory, family.is_pickled, findings)

    def read(self) -> Tensors:
        """The model's tensors."""
        single, index = self._family.single, self._family.index
        if index in self._directory.root_files:
            if single in self._present:
                self._findings.add(
                    "single-and-sharded",
                    f"{single} is beside {index}; loaders use the single file and not the shards",
                    file=single,
                    hint="Delete the single file, or the shards and their index.",
                )
                self._read(single)
            return self._indexed(index)
        if single in self._present:
            self._judge_strays([name for name in self._present if name != single], single)
            return self._all_of([single])
        return self._unindexed()

    def _unindexed(self) -> Tensors:
        numbered = [name for name in self._present if _NUMBERED.fullmatch(name)]
        chosen = numbered or self._present
        self._findings.add(
            "index-missing",
            f"there are {len(numbered)} shards, but no index"
            if numbered
            else f"no loader looks for weights with the name {', '.join(chosen)}",
            file=self._family.index if numbered else chosen[0],
            hint=None if numbered else f"Rename the file to {self._family.single}.",
        )
        self._check_numbers(chosen)
        return self._all_of(chosen)

    def _all_of(self, names: Iterable[str]) -> Tensors:
        """The tensors of files without an index."""
        held = {name: self._read(name) for name in names}
        self._directory.unread += [name for name, entries in held.items() if entries is None]
        return self._merged(held)

    def _indexed(self, index: str) -> Tensors:
        findings = self._findings
        data = read_object(self._directory, index, "index-invalid", findings)
        weight_map = _weight_map(data, index, findings)
        if weight_map is None:
            return self._all_of(n for n in self._present if _NUMBERED.fullmatch(n))
        indexed = sorted(set(weight_map.values()))
        for name in indexed:
            if name not in self._directory.files:
                findings.add(
                    "index-missing-shard",
                    f"the index lists {_count(weight_map, name)} tensors in it",
                    file=name,
                    hint="Copy or download the file.",
                )
        present = [name for name in indexed if name in self._directory.files]
        strays = [n for n in self._present if n not in indexed and n != self._family.single]
        self._judge_strays(strays, index)
        self._check_numbers(indexed)
        held = {name: self._read(name) for name in present}
        tensors = self._merged(held)
        readable = {name: entries for name, entries in held.items() if entries is not None}
        self._compare(index, weight_map, readable)
        self._directory.lost = weight_map.keys() - tensors.keys()
        if len(readable) == len(indexed):
            self._check_total(index, data or {}, readable)
        return tensors

    def _merged(self, held: Mapping[str, Tensors | None]) -> Tensors:
        tensors: Tensors = {}
        for file, entries in held.items():
            for name, entry in (entries or {}).items():
                if name in tensors:
                    self._findings.add(
                        "tensor-duplicate",
                        f"it is in {tensors[name].file} too",
                        file=file,
                        tensor=name,
                    )
                tensors.setdefault(name, entry)
        return tensors

    def _compare(
        self, index: str, weight_map: Mapping[str, str], held: Mapping[str, Tensors]
    ) -> None:
        places = {name: file for file, entries in held.items() for name in entries}
        for name, file in weight_map.items():
            if file in held and name not in held[file]:
                found = f"; it is in {places[name]}" if name in places else ""
                self._findings.add(
                    "index-tensor-missing",
                    f"the index lists it in {file}{found}",
                    file=index,
                    tensor=name,
                )
        for file, entries in held.items():
            for name in entries.keys() - weight_map.keys():
                self._findings.add(
                    "index-tensor-unlisted",
                    f"it is in {file} but not in the index: loaders ignore it",
                    file=index,
                    tensor=name,
                )

    def _check_total(
        self, index: str, data: Mapping[str, Any], held: Mapping[str, Tensors]
    ) -> None:
        said = data["metadata"].get("total_size")
        total = sum(e.nbytes for entries in held.values() for e in entries.values())
        # Most writers count tensors that share their bytes in a pickle once.
        places = {(e.file, e.start): e.nbytes for es in held.values() for e in es.values()}
        if said is None or said not in (total, sum(places.values())):
            self._findings.add(
                "index-total-size",
                f"total_size is {said}; the tensors have {total} bytes",
                file=index,
                hint=f"Set metadata.total_size to {total}.",
            )

    def _judge_strays(self, strays: list[str], instead: str) -> None:
        for name in strays:
            is_shard = _NUMBERED.fullmatch(name) is not None
            self._findings.add(
                "shard-stray",
                f"it does not belong to the model in {instead}"
                + ("" if is_shard else ", but some loaders read every weight file"),
                file=name,
                severity="error" if is_shard else "warning",
                hint="Delete the file if an earlier save left it.",
            )

    def _check_numbers(self, names: Collection[str]) -> None:
        """Check numbers such as ``-00001-of-00003``: one stem, one count, every number once."""
        matches = {name: m for name in names if (m := _NUMBERED.fullmatch(name))}
        series: dict[tuple[str, int], set[int]] = {}
        for match in matches.values():
            key = (match["stem"], int(match["count"]))
            series.setdefault(key, set()).add(int(match["number"]))
        if len(series) > 1:
            found = [f"{stem} of {count}" for stem, count in sorted(series)]
            self._findings.add(
                "shard-numbering",
                f"shards of different series: {listed(found)}",
                file=next(iter(matches)),
                hint="Delete the series that an earlier save left.",
            )
        for (stem, count), numbers in sorted(series.items()):
            # A name can state any count, so the absent numbers are not enumerated.
            within = {number for number in numbers if 1 <= number <= count}
            absent = count - len(within)
            if absent or within != numbers:
                some = [*islice((n for n in range(1, count + 1) if n not in within), 6)]
                wrong = (
                    f"lack {listed(some, total=absent)}"
                    if absent
                    else f"go up to {max(numbers - within)}"
                )
                self._findings.add(
                    "shard-numbering",
                    f"the shards {stem}-...-of-{count:05} {wrong}",
                    file=next(name for name, m in matches.items() if m["stem"] == stem),
                )


def _weight_map(
    data: dict[str, Any] | None, index: str, findings: Findings
) -> dict[str, str] | None:
    """The map of an index; None if it has no valid map."""
    if data is None:
        return None
    weight_map = data.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        findings.add("index-invalid", "its weight_map is missing or empty", file=index)
        return None
    odd = [n for n, f in weight_map.items() if not isinstance(f, str) or not _is_inside(f)]
    for name in odd:
        findings.add(
            "index-invalid",
            f"{weight_map[name]!r} is not a file of the directory",
            file=index,
            tensor=name,
        )
    if not isinstance(data.get("metadata"), dict):
        findings.add(
            "index-invalid",
            "metadata is missing; transformers needs it to load the weights",
            file=index,
        )
        data["metadata"] = {}
    return {name: file for name, file in weight_map.items() if name not in odd}


def _is_inside(file: str) -> bool:
    parts = file.split("/")
    return bool(file) and not any(part in ("", ".", "..") for part in parts)


def _count(weight_map: Mapping[str, str], file: str) -> int:
    return sum(place == file for place in weight_map.values())
