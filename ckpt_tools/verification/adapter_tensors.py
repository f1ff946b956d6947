"""Owns whether an adapter holds every tensor that its config calls for.

The check starts from the config: tensors at all, modules that are saved whole, and, where the base is at
hand, every layer of the base that the config targets. The check of names and ranks starts from the tensors,
and finds no problem where there are none.

Sources: ``peft/tuners/tuners_utils.py`` (``check_target_module_exists``), ``peft/utils/other.py``
(``ModulesToSaveWrapper``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ckpt_tools.errors import CkptError, listed
from ckpt_tools.hub.adapter_config import NAME as ADAPTER_CONFIG
from ckpt_tools.readers.containers.weight_files import ADAPTER_FILES
from ckpt_tools.tensors.patterns import Allowance, Patterns
from ckpt_tools.verification.adapter_base import Base, find_base, read_base
from ckpt_tools.verification.container import Entry
from ckpt_tools.verification.directory import Directory, read_object
from ckpt_tools.verification.problem import Findings
from ckpt_tools.verification.run import Run

ORDER = 31
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+?)(\.base_layer)*\.lora_(?P<part>A|B)\.weight")
# Types that keep tensors for every module that target_modules names, and how those names begin.
_LAYERED = {"LORA", "IA3", "LOHA", "LOKR", "OFT"}
_ADAPTED = re.compile(r"(.+?)(\.base_layer)*\.(lora_|ia3_|hada_|lokr_|oft_)")
# PEFT makes these with two dimensions or more.
_NEVER_FLAT = re.compile(r"(^|\.)(ia3_l|hada_w\w+|lokr_w\w+|prompt_embeddings)$")
# Their weights are matrices in every model: one row for each token or label.
_MATRICES = {"embed_in", "embed_out", "embed_tokens", "lm_head", "word_embeddings", "wte"}
_HEADS = {"classifier", "score"}
# transformers keeps the experts of a layer in one parameter; their files may have one module for each.
_EXPERTS = re.compile(r"(^|\.)experts\.\d+(\.|$)")
_LAYER = re.compile(r".*?\.(?P<pattern>[^.]*)\.(?P<number>\d+)\.")
_GATHERED = "ckpt-tools extract-lora takes the whole tensors from the checkpoint."


def check(run: Run) -> None:
    """Check that every adapter of the directory holds what its config calls for."""
    directory = run.directory
    for folder, tensors in directory.adapters.items():
        prefix = f"{folder}/" if folder else ""
        file = prefix + ADAPTER_CONFIG
        config = read_object(directory, file, "adapter-config-invalid", Findings())
        if not config or not isinstance(config.get("peft_type"), str):
            continue  # the check of the config says so
        if not tensors:
            _note_empty(directory, prefix, run.findings)
            continue
        adapter = _Adapter(file, config, tensors, run.findings)
        adapter.check_alone()
        if config["peft_type"] in _LAYERED:
            _check_with_base(adapter, directory.path / folder, run)


def _note_empty(directory: Directory, prefix: str, findings: Findings) -> None:
    """A file that cannot be read, or is not there, is a problem of its own."""
    held = [prefix + name for name in ADAPTER_FILES if prefix + name in directory.files]
    file = held[0] if held else None
    if file is not None and (file in directory.containers or not file.endswith(".safetensors")):
        if file in directory.unread:
            return
        findings.add(
            "adapter-empty",
            "the file holds no tensors, and the config describes an adapter",
            file=file,
            hint=_GATHERED,
        )


def _check_with_base(adapter: _Adapter, folder: Path, run: Run) -> None:
    path = find_base(folder, adapter.config, run.request.base)
    base = None if path is None else read_base(path)
    if base is None:
        run.findings.skipped.append("layers of the base that the adapter lacks: no base is at hand")
    else:
        adapter.check_with(base)


class _Adapter:
    """An adapter: its config and its tensors, by their names below PEFT's prefix."""

    def __init__(
        self,
        file: str,
        config: Mapping[str, Any],
        tensors: Mapping[str, Entry],
        findings: Findings,
    ) -> None:
        self.file = file
        self.config = config
        self.tensors = {name.removeprefix(_PREFIX): entry for name, entry in tensors.items()}
        self.findings = findings
        self._saved = _names(config.get("modules_to_save"))

    def check_alone(self) -> None:
        """Check what needs no base."""
        for name, entry in self.tensors.items():
            if re.search(r"\.lora_[AB]\.", name):
                continue  # the check of ranks looks at them
            module, _, last = name.rpartition(".")
            flat = last == "weight" and len(entry.shape) != 2 and self._is_matrix(module)
            flat = flat or (len(entry.shape) < 2 and _NEVER_FLAT.search(name) is not None)
            if 0 in entry.shape or flat:
                self._note_shape(entry, "a shard of ZeRO-3 or FSDP that was not gathered?")
        self._check_magnitudes()
        absent = [m for m in self._saved if not any(_is_of(m, name) for name in self.tensors)]
        if absent and self.config["peft_type"] != "LORA":
            self._note_absent(absent)

    def _check_magnitudes(self) -> None:
        """Under DoRA every adapted module has a vector of magnitudes."""
        if self.config["peft_type"] != "LORA" or not self.config.get("use_dora"):
            return
        found = ((name.rpartition(".lora_")[0], name, e) for name, e in self.tensors.items())
        factors = {module: e for module, name, e in found if re.search(r"\.lora_\w*A(\.|$)", name)}
        held = {n.rpartition(".lora_magnitude_vector")[0] for n in self.tensors}
        for module in sorted(factors.keys() - held):
            self.findings.add(
                "adapter-pair",
                "its lora_magnitude_vector is missing, and the config says use_dora",
                file=factors[module].file,
                tensor=factors[module].name,
                hint=_GATHERED,
            )

    def _is_matrix(self, module: str) -> bool:
        last = module.removesuffix(".base_layer").rpartition(".")[2]
        return last in _MATRICES or (last == "score" and last in self._saved)

    def _note_shape(self, entry: Entry, why: str) -> None:
        self.findings.add(
            "adapter-shape",
            f"its shape is {list(entry.shape)}: {why}",
            file=entry.file,
            tensor=entry.name,
            hint=_GATHERED,
        )

    def _note_absent(self, modules: list[str]) -> None:
        self.findings.add(
            "adapter-module-missing",
            f"modules_to_save names {listed(modules)}, and no tensor is of it",
            file=self.file,
            hint="PEFT cannot load the adapter without them.",
        )

    def check_with(self, base: Base) -> None:
        """Check what the base has against what the adapter has."""
        adapted = {match[1] for name in self.tensors if (match := _ADAPTED.match(name))}
        modules = {name.rpartition(".")[0] for name in base.shapes}
        if not adapted <= modules:
            self.findings.skipped.append(
                "layers of the base that the adapter lacks: the base's files name its modules otherwise"
            )
            return
        try:
            lacking = sorted(set(self._targeted(base)) - adapted)
        except CkptError as error:
            self.findings.add("adapter-target", error.fact, file=self.file, hint=error.hint)
            lacking = []
        if lacking:
            self.findings.add(
                "adapter-layer-missing",
                f"the config targets {len(lacking)} modules of the base that have no tensors: "
                f"{listed(lacking, 3)}",
                file=self.file,
                hint=_GATHERED,
            )
        self._check_saved(base, modules)
        if not base.quantized:
            self._check_shapes(base)
        self.findings.checked.append(f"adapter against the layers of its base {base.path}")

    def _targeted(self, base: Base) -> Iterator[str]:
        """The modules that PEFT adapts in the base; none where their names do not say it."""
        targets = self.config.get("target_modules")
        if not targets or targets == "all-linear":
            return  # which modules are linear is known to the model's code
        allowance = Allowance(None)
        is_target = _selector(targets, allowance)
        is_excluded = _selector(self.config.get("exclude_modules"), allowance)
        for name, shape in base.shapes.items():
            module, _, last = name.rpartition(".")
            if last != "weight" or len(shape) != 2 or _EXPERTS.search(module):
                continue
            if self._is_saved(module) or not self._in_layers(module):
                continue
            if is_target(module) and not is_excluded(module):
                yield module

    def _is_saved(self, module: str) -> bool:
        return any(_is_of(saved, f"{module}.weight") for saved in self._saved)

    def _in_layers(self, module: str) -> bool:
        """Whether ``layers_to_transform`` lets PEFT adapt a module."""
        wanted = self.config.get("layers_to_transform")
        if wanted is None or isinstance(self.config.get("target_modules"), str):
            return True
        patterns = self.config.get("layers_pattern")
        patterns = [patterns] if isinstance(patterns, str) else patterns or []
        found = None
        if patterns:
            for pattern in patterns:
                found = found or re.match(rf".*\.{re.escape(pattern)}\.(?P<number>\d+)\.", module)
        else:
            found = _LAYER.match(module)
        numbers = [wanted] if isinstance(wanted, int) else wanted
        return found is not None and int(found["number"]) in numbers

    def _check_saved(self, base: Base, modules: set[str]) -> None:
        """Every module of the base that is saved whole is there, with the base's shape."""
        absent = [
            module
            for module in sorted(modules)
            if any(module == saved or module.endswith(f".{saved}") for saved in self._saved)
            and any(_is_of(module, name) for name in base.shapes)
            and not any(name.startswith(f"{module}.") for name in self.tensors)
        ]
        named = {saved for saved in self._saved if saved in _HEADS}
        absent = [module for module in absent if module.rpartition(".")[2] not in named]
        if absent and any(_is_of(saved, name) for saved in self._saved for name in self.tensors):
            self._note_absent(absent)
        for name, entry in self.tensors.items():
            shape = base.shapes.get(name)
            if shape is None or 0 in entry.shape or not self._is_saved(name.rpartition(".")[0]):
                continue
            resized = name.rpartition(".")[0].rpartition(".")[2] in _MATRICES | _HEADS
            if len(shape) != len(entry.shape) or shape[resized:] != entry.shape[resized:]:
                self._note_shape(entry, f"the base's is {list(shape)}")

    def _check_shapes(self, base: Base) -> None:
        """The outer sizes of each pair are those of the weight that it adapts."""
        stacked = {p.rpartition(".")[0] for p in _names(self.config.get("target_parameters"))}
        for name, entry in self.tensors.items():
            match = _FACTOR.fullmatch(name)
            if match is None or len(entry.shape) != 2 or 0 in entry.shape:
                continue
            module = match["module"]
            shape = base.shapes.get(f"{module}.weight")
            if shape is None or len(shape) != 2 or any(_ends(module, p) for p in stacked):
                continue
            size = entry.shape[1] if match["part"] == "A" else entry.shape[0]
            if size not in shape:
                self._note_shape(entry, f"it adapts a weight of the shape {list(shape)}")


def _names(value: object) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def _is_of(module: str, name: str) -> bool:
    return f".{module}." in f".{name}"


def _ends(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def _selector(named: object, allowance: Allowance) -> Callable[[str], bool]:
    """What tells whether a setting names a module, by a pattern or in a list."""
    if isinstance(named, str) and named:
        pattern = Patterns({named: True}, allowance, whole=True)
        return lambda module: pattern.first(module) is not None
    names = _names(named)
    return lambda module: any(_ends(module, name) for name in names)
