"""Owns ``adapter_config.json``: the search for it, its inference from tensors, its check against tensors.

A value is taken from a file, from the names and shapes of tensors, or from the user, and never invented.
The user must give alpha and the name of the base model if no file has them.

Sources: ``peft/config.py`` (``save_pretrained``: sorted keys, two spaces, no newline at the end),
``peft/utils/other.py`` (``get_pattern_key``), ``peft/tuners/tuners_utils.py``
(``check_target_module_exists``).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ckpt_tools.errors import DamagedCheckpoint, MissingAsset, UsageError
from ckpt_tools.hub.adapter_values import odd_keys
from ckpt_tools.hub.files import AssetFile, read_object
from ckpt_tools.hub.links import refuse_leaving
from ckpt_tools.tensors.patterns import Allowance, Patterns

NAME = "adapter_config.json"
_DEFAULT = "default"
# Characters of a value in a message.
_LONGEST = 100
# PEFT's EMBEDDING_LAYER_NAMES.
_EMBEDDINGS = ("embed_tokens", "lm_head")
# PEFT's task name for the end of a class name; other class names have no certain task.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of an adapter.

    Attributes:
        data: the content of ``adapter_config.json``.
        path: the file it is from; None if it was inferred.
        notes: what was decided.
    """

    data: Mapping[str, Any]
    path: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_lora(self) -> bool:
        """Whether the adapter is LoRA or a variant of it."""
        return self.data.get("peft_type") == "LORA"

    @property
    def bias(self) -> str:
        """The setting ``bias``: which biases belong to the adapter."""
        return str(self.data.get("bias") or "none")

    @property
    def token_indices(self) -> Any:
        """Rows of the embedding that are trained: a list, or a list by module."""
        return self.data.get("trainable_token_indices") or self.data.get("token_indices")

    @property
    def task(self) -> str | None:
        """PEFT's task type, such as ``SEQ_CLS``, if the config states one."""
        stated = self.data.get("task_type")
        return stated if isinstance(stated, str) else None

    def rank(self, module: str) -> int:
        """``r`` of a module: the value of the first pattern that matches, or the common value.

        Raises:
            MissingAsset: the config has none.
        """
        value = self._by_pattern("rank_pattern", "r", module)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._lacks("r", value)
        return value

    def alpha(self, module: str) -> float:
        """``lora_alpha`` of a module.

        Raises:
            MissingAsset: the config has no ``lora_alpha``, or one that is not positive.
        """
        value = self._by_pattern("alpha_pattern", "lora_alpha", module)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self._lacks("lora_alpha", value)
        return value

    def scale(self, module: str) -> float:
        """``alpha / r`` of a module; ``alpha / sqrt(r)`` under rsLoRA."""
        rank = self.rank(module)
        return self.alpha(module) / (math.sqrt(rank) if self.data.get("use_rslora") else rank)

    def targets_embeddings(self, modules: Iterable[str]) -> bool:
        """Whether PEFT takes one of ``modules`` for a targeted embedding."""
        named = self.data.get("target_modules") or ()
        if named == "all-linear":
            return False
        if not isinstance(named, str):
            return any(name in named for name in _EMBEDDINGS)
        last = {module: module.rpartition(".")[2] for module in modules}
        return any(self.targets(module) for module in modules if last[module] in _EMBEDDINGS)

    def targets(self, module: str) -> bool:
        """Whether ``target_modules`` names a module, by a pattern or in a list."""
        named = self.data.get("target_modules") or ()
        if isinstance(named, str):
            return named == "all-linear" or self._target.first(module) is not None
        return is_listed(module, named)

    def _by_pattern(self, patterns: str, common: str, module: str) -> Any:
        found = self._patterns[patterns].first(module)
        return found if found is not None else self.data.get(common)

    @cached_property
    def _allowance(self) -> Allowance:
        return Allowance(self.path)

    @cached_property
    def _target(self) -> Patterns[bool]:
        return Patterns({self.data["target_modules"]: True}, self._allowance, whole=True)

    @cached_property
    def _patterns(self) -> dict[str, Patterns[Any]]:
        """The patterns of modules with a rank or an alpha of their own, as PEFT compares them."""
        return {
            key: Patterns(
                {rf"(.*\.)?({name})$": value for name, value in (self.data.get(key) or {}).items()},
                self._allowance,
            )
            for key in ("rank_pattern", "alpha_pattern")
        }

    def _lacks(self, key: str, value: object) -> MissingAsset:
        option = " --lora-alpha X or" if key == "lora_alpha" else ""
        return MissingAsset(
            f"the adapter's config has no usable {key} (its value is {json.dumps(value)})",
            path=self.path,
            hint=f"Pass{option} --adapter-config FILE|DIR, the config of the training run.",
        )


def find_adapter_config(
    named: Path | None,
    search: Sequence[Path],
    adapter: str,
    *,
    alone: bool,
    follow_links: bool = False,
) -> AdapterConfig | None:
    """The config of an adapter: the one given, else the nearest one; None if there is none.

    PEFT writes the config of ``default`` into the directory itself, and others into folders named after the
    adapters.

    Args:
        named: ``--adapter-config``, a file or a directory.
        search: directories near the checkpoint, nearest first.
        adapter: the adapter's name.
        alone: whether it is the only adapter; any config that is found then belongs to it.
        follow_links: whether a config may be a link that leads out of the directory.

    Raises:
        MissingAsset: ``named`` holds no config of the adapter.
        UsageError: it is a link that leads out of its directory.
        DamagedCheckpoint: a file is not a JSON object, or a value in it has another type than PEFT's.
    """
    if named is not None and named.is_file():
        return _read(named)
    for directory in (named,) if named is not None else search:
        places = [directory / adapter / NAME]
        # A folder that PEFT named after the adapter may be the one that was named.
        is_its_own = named is not None and directory.absolute().name == adapter
        if adapter == _DEFAULT or alone or is_its_own:
            places.append(directory / NAME)
        path = next((path for path in places if path.is_file()), None)
        if path is not None:
            if not follow_links:
                refuse_leaving(path, directory)
            return _read(path)
    if named is None:
        return None
    raise MissingAsset(
        f"--adapter-config has no {NAME} of adapter {adapter!r}",
        path=named,
        hint=f"Pass the file, or a directory with {NAME} or {adapter}/{NAME}."
        if adapter == _DEFAULT or alone
        else f"Pass the file, or a directory with {adapter}/{NAME}.",
    )


def _read(path: Path) -> AdapterConfig:
    data = read_object(path)
    if not isinstance(data.get("peft_type"), str):
        raise MissingAsset(
            "not an adapter config: peft_type is missing",
            path=path,
            hint=f"Pass --adapter-config with the {NAME} that PEFT wrote.",
        )
    if odd := odd_keys(data):
        value = json.dumps(data[odd[0]])
        raise DamagedCheckpoint(
            f"its {odd[0]} is {value[:_LONGEST]}, which PEFT does not write",
            path=path,
            hint=f"Pass --adapter-config with the {NAME} that PEFT wrote.",
        )
    return AdapterConfig(data, path)


def with_given(
    config: AdapterConfig, *, lora_alpha: float | None, base_model: str | None, for_file: bool
) -> AdapterConfig:
    """The config with the user's values, complete enough to be written or used.

    Args:
        config: as found or inferred.
        lora_alpha: ``--lora-alpha``.
        base_model: ``--base-model``.
        for_file: whether it will be written; the base model must then be known.

    Raises:
        MissingAsset: alpha or the base model is unknown.
        UsageError: alpha is not positive.
    """
    data = dict(config.data)
    notes = list(config.notes)
    if lora_alpha is not None:
        if not (math.isfinite(lora_alpha) and lora_alpha > 0):
            raise UsageError(
                f"--lora-alpha must be positive, not {lora_alpha:g}",
                hint="Pass the lora_alpha of the training run.",
            )
        before = data.get("lora_alpha")
        data["lora_alpha"] = int(lora_alpha) if float(lora_alpha).is_integer() else lora_alpha
        if before is not None and before != lora_alpha:
            notes.append(f"lora_alpha set to {lora_alpha:g} (was {before})")
    if base_model is not None:
        data["base_model_name_or_path"] = base_model
    changed = AdapterConfig(data, config.path, tuple(notes))
    if config.is_lora:
        changed.alpha("")
    if for_file and not data.get("base_model_name_or_path"):
        raise MissingAsset(
            "the base model of the adapter is unknown",
            path=config.path,
            hint="Pass --base-model NAME, the Hub name or directory that the training run started from.",
        )
    return changed


def adapter_config_file(config: AdapterConfig) -> AssetFile:
    """The file as PEFT writes it, in inference mode."""
    data = {**config.data, "inference_mode": True}
    content = json.dumps(data, indent=2, sort_keys=True).encode()
    return AssetFile(NAME, content=content)


@dataclass(frozen=True)
class Evidence:
    """The facts about a LoRA config that the adapter's tensors show.

    Attributes:
        ranks: ``r`` of each adapted module.
        parameters: the entries of ``ranks`` that are parameters of a module (``target_parameters``).
        modules: all modules of the base that have a weight; empty if the base is absent.
        replaced: modules saved whole.
        dora: modules with a magnitude vector.
        biased_factors: modules whose ``B`` has a bias.
        bias: ``none``, ``all`` or ``lora_only``; None if the tensors do not show it.
        transposed: whether weights are stored (in, out); None if shapes do not show it.
    """

    ranks: Mapping[str, int]
    parameters: frozenset[str]
    modules: frozenset[str]
    replaced: tuple[str, ...]
    dora: frozenset[str]
    biased_factors: frozenset[str]
    bias: str | None
    transposed: bool | None


def infer(evidence: Evidence, architecture: str | None, base_model: str | None) -> AdapterConfig:
    """The config of a LoRA adapter, from its tensors.

    Raises:
        MissingAsset: the tensors do not determine a setting that loading needs.
    """
    modules = [module for module in evidence.ranks if module not in evidence.parameters]
    _require(evidence.bias is not None, "whether biases were trained")
    _require(evidence.dora in (frozenset(), frozenset(modules)), "which modules use DoRA")
    _require(
        evidence.biased_factors in (frozenset(), frozenset(modules)), "which modules use lora_bias"
    )
    rank = Counter(evidence.ranks.values()).most_common(1)[0][0]
    data: dict[str, Any] = {
        "base_model_name_or_path": base_model,
        "bias": evidence.bias,
        "inference_mode": True,
        "lora_bias": bool(evidence.biased_factors),
        "modules_to_save": list(evidence.replaced) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {m: r for m, r in evidence.ranks.items() if r != rank},
        "target_modules": _targets(modules, evidence.modules),
        "use_dora": bool(evidence.dora),
    }
    if evidence.transposed is not None:
        # PEFT determines it by itself if it is absent.
        data["fan_in_fan_out"] = evidence.transposed
    if evidence.parameters:
        data["target_parameters"] = sorted(evidence.parameters)
    ends = (task for end, task in _TASKS.items() if architecture and architecture.endswith(end))
    if (task := next(ends, None)) is not None:
        data["task_type"] = task
    notes = (
        f"no {NAME} was found: written from the tensors (r {rank}, {len(modules)} modules)",
        "use_rslora and alpha_pattern are not visible in tensors and are off; --adapter-config sets them",
    )
    return AdapterConfig(data, None, notes)


def _require(known: bool, what: str) -> None:
    if not known:
        raise MissingAsset(
            f"no {NAME} was found, and the tensors do not show {what}",
            hint=f"Pass --adapter-config FILE|DIR, the {NAME} of the training run.",
        )


def _targets(modules: Iterable[str], all_modules: frozenset[str]) -> list[str]:
    """The last part of a module's name if every module with it is adapted, else the full name."""
    adapted = set(modules)
    known = {_last(module) for module in all_modules}
    partly = {_last(module) for module in all_modules - adapted}
    whole = known - partly
    return sorted({_last(module) if _last(module) in whole else module for module in adapted})


def check(config: AdapterConfig, ranks: Mapping[str, int]) -> None:
    """Refuse a LoRA config that does not belong to these tensors.

    Args:
        config: a config that was found.
        ranks: ``r`` of each adapted module or parameter, from the shapes.

    Raises:
        UsageError: the config belongs to another adapter.
    """
    parameters = config.data.get("target_parameters") or ()
    hint = "Pass --adapter-config FILE|DIR, the config of this adapter's training run."
    for module, rank in ranks.items():
        if config.rank(module) != rank:
            raise UsageError(
                f"r of {module} is {rank} in the checkpoint and {config.rank(module)} in the config",
                path=config.path,
                hint=hint,
            )
        # The weight of a linear layer can be named as a parameter.
        named = any(is_listed(key, parameters) for key in (module, f"{module}.weight"))
        # The config names the embedding, and PEFT adapts what is tied to it too.
        named = named or (
            bool(config.data.get("ensure_weight_tying"))
            and _last(module) in _EMBEDDINGS
            and any(config.targets(key) for key in ranks if _last(key) in _EMBEDDINGS)
        )
        module = _attention_of(module, ranks) or module
        if not named and not config.targets(module):
            raise UsageError(
                f"the checkpoint adapts {module}, which the config does not target",
                path=config.path,
                hint=hint,
            )


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def _attention_of(module: str, adapted: Collection[str]) -> str | None:
    """The adapted ``nn.MultiheadAttention`` of an output projection, which PEFT adapts with it."""
    parent, _, last = module.rpartition(".")
    return parent if last == "out_proj" and parent in adapted else None


def is_listed(module: str, names: Iterable[str]) -> bool:
    """Whether a list names a module, by its whole name or the end of it."""
    return any(module == name or module.endswith(f".{name}") for name in names)
