"""Owns the check of adapters as PEFT writes them: the config, the tensors, and their agreement.

The base model is not needed. LoRA and its variants are checked tensor by tensor. For other kinds the config
and the names are checked.

Sources: ``peft/utils/save_and_load.py`` (names), ``peft/utils/other.py`` (``get_pattern_key``),
``peft/tuners/tuners_utils.py`` (``check_target_module_exists``), ``peft/utils/peft_types.py`` (types).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ckpt_tools.errors import CkptError, listed
from ckpt_tools.errors import tensors as tensors_text
from ckpt_tools.hub.adapter_config import NAME as ADAPTER_CONFIG
from ckpt_tools.hub.adapter_values import odd_keys
from ckpt_tools.tensors.patterns import Allowance, Patterns
from ckpt_tools.verification.container import Entry
from ckpt_tools.verification.directory import read_object
from ckpt_tools.verification.peft_types import known_types
from ckpt_tools.verification.problem import Findings
from ckpt_tools.verification.run import Run

ORDER = 30
_PREFIX = "base_model.model."
# The prefix of tensors that several modules share, such as the projections of VeRA.
_SHARED_PREFIX = "base_model."
_LORA = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)(?:\.(?P<tail>.+))?"
)
_TAILS = {
    "A": ("weight",),
    "B": ("weight", "bias"),
    "embedding_A": (None,),
    "embedding_B": (None,),
    "magnitude_vector": (None, "weight"),
}
_PARTNERS = {"A": "B", "B": "A", "embedding_A": "embedding_B", "embedding_B": "embedding_A"}
_EMBEDDINGS = {
    "embed_tokens",
    "lm_head",
    "wte",
    "word_embeddings",
    "embed_in",
    "embed_out",
    "shared",
}
# PEFT names both in the config of a classifier; a model has only one of them.
_HEADS = {"classifier", "score"}
# Kinds with other tensor names, or without a prefix.
_PROMPTS = {
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
}
_ASK = "Use the config of the adapter's training run."


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor of a LoRA adapter.

    Attributes:
        entry: the tensor.
        module: the adapted module, below PEFT's prefix and without ``base_layer``.
        wrapper: the same with ``base_layer``. Several wrappers can adapt parameters of one module.
        part: ``A``, ``B``, ``embedding_A``, ``embedding_B`` or ``magnitude_vector``.
        tail: the rest of the name.
    """

    entry: Entry
    module: str
    wrapper: str
    part: str
    tail: str | None


def check(run: Run) -> None:
    """Check every adapter of the directory."""
    directory, findings = run.directory, run.findings
    for folder, tensors in directory.adapters.items():
        file = f"{folder}/{ADAPTER_CONFIG}" if folder else ADAPTER_CONFIG
        if file not in directory.files:
            findings.add(
                "adapter-config-invalid", "the tensors have no config beside them", file=file
            )
            continue
        config = read_object(directory, file, "adapter-config-invalid", findings)
        if config is None:
            continue
        config = _of_right_types(config, file, findings)
        kind = config.get("peft_type")
        if not isinstance(kind, str):
            findings.add("adapter-config-invalid", "peft_type is missing", file=file, hint=_ASK)
            continue
        known = known_types()
        if not known:
            findings.skipped.append(f"whether PEFT has the type {kind} (it cannot be read here)")
        elif kind not in known:
            findings.add(
                "adapter-type-unknown", f"the installed PEFT has no type {kind}", file=file
            )
        if not config.get("base_model_name_or_path"):
            findings.add(
                "adapter-base-unnamed",
                "base_model_name_or_path is empty: loaders of the adapter cannot find its base",
                file=file,
                hint="Set it to the Hub name or the directory of the base model.",
            )
        names = _check_names(tensors, kind, findings)
        if kind == "LORA":
            _Lora(file, config, names, findings).check()
        elif tensors:
            findings.skipped.append(
                f"ranks and targets of the adapter: its type is {kind}, not LORA"
            )
        findings.checked.append(f"{kind} adapter of {tensors_text(len(tensors))}, names and config")


def _of_right_types(config: dict[str, Any], file: str, findings: Findings) -> dict[str, Any]:
    """The config without values of a wrong type. Each of those is a problem."""
    wrong = odd_keys(config)
    for key in wrong:
        findings.add(
            "adapter-config-invalid", f"its {key} is {config[key]!r}", file=file, hint=_ASK
        )
    return {key: value for key, value in config.items() if key not in wrong}


def _check_names(tensors: Mapping[str, Entry], kind: str, findings: Findings) -> dict[str, Entry]:
    """The tensors by their names below PEFT's prefix. Names that PEFT does not read are a problem."""
    prefix = "" if kind in _PROMPTS else _PREFIX if kind == "LORA" else _SHARED_PREFIX
    plain: dict[str, Entry] = {}
    wrapped: list[str] = []
    for name, entry in tensors.items():
        bare = re.sub(
            r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|module(?=\.base_model))\.", "", name
        )
        if bare != name or not bare.startswith(prefix):
            wrapped.append(name)
        plain[bare.removeprefix(_PREFIX)] = entry
    if wrapped:
        findings.add(
            "adapter-name",
            f"{len(wrapped)} names do not start with {prefix} as PEFT's names do, or have a wrapper prefix",
            file=tensors[wrapped[0]].file,
            tensor=wrapped[0],
            hint="PEFT ignores such tensors without a warning. ckpt-tools extract-lora writes PEFT's names.",
        )
    return plain


class _Lora:
    """A LoRA adapter: its config and its tensors, by their names below PEFT's prefix."""

    def __init__(
        self,
        file: str,
        config: Mapping[str, Any],
        tensors: Mapping[str, Entry],
        findings: Findings,
    ) -> None:
        self._file = file
        self._config = config
        self._tensors = tensors
        self._findings = findings
        self._allowance = Allowance(None)

    def check(self) -> None:
        """Check everything."""
        self._check_numbers()
        if not self._tensors:
            return
        parts = self._parts()
        if not parts:
            self._add("adapter-empty", "no tensor of the adapter is a LoRA factor")
        self._check_pairs(parts)
        try:
            self._check_ranks(parts)
            self._check_targets({part.module for part in parts})
        except CkptError as error:
            self._add("adapter-target", error.fact, hint=error.hint)
        self._check_whole_modules()
        self._check_base(parts)

    def _add(self, kind: str, detail: str, entry: Entry | None = None, **more: Any) -> None:
        """Add a problem of a tensor, or of the config if no tensor is given."""
        self._findings.add(
            kind,
            detail,
            file=entry.file if entry else self._file,
            tensor=entry.name if entry else None,
            **more,
        )

    def _check_numbers(self) -> None:
        for key, patterns, kind in (
            ("r", "rank_pattern", "adapter-rank"),
            ("lora_alpha", "alpha_pattern", "adapter-alpha"),
        ):
            values = {key: self._config.get(key)} | {
                f"{patterns}[{name}]": v for name, v in (self._config.get(patterns) or {}).items()
            }
            for name, value in values.items():
                if not _is_positive(value, whole=key == "r"):
                    self._add(kind, f"{name} is {value!r}, not a positive number", hint=_ASK)

    def _parts(self) -> list[_Part]:
        parts, odd = [], []
        for name, entry in self._tensors.items():
            match = _LORA.fullmatch(name)
            if match is None:
                continue
            if match["tail"] not in _TAILS[match["part"]]:
                odd.append(entry)
                continue
            wrapper = match["module"]
            module = re.sub(r"(\.base_layer)+$", "", wrapper)
            parts.append(_Part(entry, module, wrapper, match["part"], match["tail"]))
        if odd:
            self._add(
                "adapter-name",
                f"{len(odd)} names still contain the adapter's name, or an unknown part",
                odd[0],
                hint="PEFT ignores such tensors without a warning. PEFT writes `lora_A.weight`.",
            )
        return parts

    def _check_pairs(self, parts: Iterable[_Part]) -> None:
        held = {(p.wrapper, p.part): p for p in parts if p.tail != "bias"}
        for (wrapper, name), part in held.items():
            partner = held.get((wrapper, _PARTNERS.get(name, name)))
            if partner is None:
                self._add("adapter-pair", f"its lora_{_PARTNERS[name]} is missing", part.entry)

    def _check_ranks(self, parts: Iterable[_Part]) -> None:
        parameters = self._config.get("target_parameters") or ()
        recorded = self._config.get("rank_pattern") or {}
        ranks = Patterns({rf"(.*\.)?({p})$": rank for p, rank in recorded.items()}, self._allowance)
        for part in parts:
            shape = part.entry.shape
            if part.part == "magnitude_vector" or part.tail == "bias":
                continue
            if len(shape) < 2 or 0 in shape:
                self._add(
                    "adapter-shape",
                    f"its shape is {list(shape)}: perhaps a shard of ZeRO-3 or FSDP that was not gathered",
                    part.entry,
                    hint="Run ckpt-tools extract-lora on the checkpoint. It writes whole tensors.",
                )
                continue
            found = shape[0] if part.part.endswith("A") else shape[1]
            wanted = self._rank(part.module, parameters, ranks)
            stacked = any(_ends(part.module, p.rpartition(".")[0]) for p in parameters)
            if not _is_positive(wanted, whole=True):
                continue
            if found != wanted and not (stacked and found % wanted == 0):
                self._add(
                    "adapter-rank",
                    f"its rank is {found} (shape {list(shape)}); the config has {wanted}",
                    part.entry,
                    hint=_ASK,
                )

    def _rank(self, module: str, parameters: Iterable[str], ranks: Patterns[Any]) -> Any:
        keys = [module, *(f"{module}.{p.rpartition('.')[2]}" for p in parameters)]
        found = (ranks.first(key) for key in keys)
        return next((rank for rank in found if rank is not None), self._config.get("r"))

    def _check_targets(self, modules: Collection[str]) -> None:
        targets = self._config.get("target_modules") or ()
        parameters = self._config.get("target_parameters") or ()
        if not targets and not parameters:
            self._add("adapter-target", "the config has no target_modules", hint=_ASK)
            return
        parents = [p.rpartition(".")[0] for p in parameters]
        targeted = {m for m in modules if self._is_targeted(m)}
        for module in sorted(modules):
            outer = module.removesuffix(".out_proj").removesuffix(".base_layer")
            if outer != module and outer in modules:
                continue  # of an adapted nn.MultiheadAttention
            if self._config.get("ensure_weight_tying") and _ends(module, "lm_head"):
                continue  # the config names the embedding, and PEFT adapts the tied head with it
            if module not in targeted and not any(_ends(module, p) for p in parents):
                self._add(
                    "adapter-target",
                    f"{module} has tensors, but the config does not target it: PEFT ignores them",
                    hint=_ASK,
                )
        if isinstance(targets, str):
            if not targeted and modules:
                self._add("adapter-target", f"no tensor matches target_modules {targets!r}")
            return
        # A pattern is matched with whole names, and those of the base are not known here.
        excluded = self._config.get("exclude_modules")
        without = excluded if isinstance(excluded, list) else ()
        bare = [
            t
            for t in targets
            if not any(_ends(m, t) for m in modules) and not any(_ends(t, e) for e in without)
        ]
        bare += [
            p
            for p, parent in zip(parameters, parents, strict=True)
            if not any(_ends(m, parent) for m in modules)
        ]
        if bare:
            self._add(
                "adapter-target",
                f"the config targets {listed(sorted(bare))}, but no tensor matches",
                severity="warning",
                hint="This is harmless if the base has no such module, or exclude_modules leaves it out. "
                "Otherwise tensors were lost.",
            )

    def _is_targeted(self, module: str) -> bool:
        targets = self._config.get("target_modules") or ()
        if isinstance(targets, str):
            return targets == "all-linear" or self._target.first(module) is not None
        return any(_ends(module, str(target)) for target in targets)

    @cached_property
    def _target(self) -> Patterns[bool]:
        return Patterns({self._config["target_modules"]: True}, self._allowance, whole=True)

    def _check_whole_modules(self) -> None:
        """Modules that are saved whole are present."""
        named = list(self._config.get("modules_to_save") or ())
        absent = [n for n in named if not any(_holds(n, tensor) for tensor in self._tensors)]
        if set(named) == _HEADS and len(absent) < 2:
            return
        if absent:
            self._add(
                "adapter-module-missing",
                f"modules_to_save names {listed(absent)}, but no tensor matches",
                hint="PEFT cannot load the adapter without them.",
            )

    def _check_base(self, parts: Iterable[_Part]) -> None:
        """Tensors that PEFT does not save in an adapter."""
        factors = {part.entry.name for part in parts}
        named = self._config.get("modules_to_save") or ()
        biases = str(self._config.get("bias") or "none") != "none"
        others = [
            entry
            for name, entry in self._tensors.items()
            if entry.name not in factors
            and not _LORA.fullmatch(name)
            and not any(_holds(module, name) for module in named)
            and not (biases and name.endswith(".bias"))
            and not _EMBEDDINGS & set(name.split("."))
            and "token_adapter" not in name
        ]
        if others:
            self._add(
                "adapter-base-tensor",
                f"the adapter holds {tensors_text(len(others))} of the base model",
                others[0],
                hint="PEFT ignores them and uses those of the base model.",
            )


def _is_positive(value: object, *, whole: bool) -> bool:
    kinds = int if whole else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and value > 0


def _ends(name: str, end: str) -> bool:
    """Whether ``name`` ends with the segments of ``end``."""
    return f".{name}".endswith(f".{end}")


def _holds(module: str, name: str) -> bool:
    """Whether a tensor name is below a module."""
    return f".{module}." in f".{name}"
