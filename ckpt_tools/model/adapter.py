"""An adapter in a state: its tensors, what they adapt, and the config that goes with them.

Owns the facts of an adapter that extracting and merging both need before data moves. A directory that PEFT
wrote is read into the form of a training checkpoint: a state whose names contain the adapter's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ckpt_tools.errors import (
    DamagedCheckpoint,
    MissingAsset,
    UnsupportedLayout,
    UsageError,
    listed,
    tensors,
)
from ckpt_tools.hub.adapter_config import (
    NAME,
    AdapterConfig,
    Evidence,
    check,
    find_adapter_config,
    infer,
)
from ckpt_tools.model.state import State
from ckpt_tools.readers.containers.weight_files import ADAPTER_FILES, entry_in, read_weight_files
from ckpt_tools.storage.absent import what_is_there
from ckpt_tools.tensors.catalogue import Catalogue, Shape
from ckpt_tools.tensors.dtypes import DType
from ckpt_tools.transforms.lora import (
    AdaptedNames,
    Part,
    adapted_names,
    plain_name,
    read_by_peft,
    with_adapter_name,
)
from ckpt_tools.transforms.lora_targets import Factors, Target, factors, find_targets
from ckpt_tools.transforms.quantised import storage_names

_NOT_GATHERED = (
    "A run under ZeRO-3 or FSDP saved it without gathering it from the ranks. Use the training checkpoint "
    "itself, which holds the adapter whole."
)


@dataclass(frozen=True)
class Adapter:
    """One adapter of a state.

    Attributes:
        name: its name.
        state: the state that holds it.
        names: the names of the state, sorted.
        base: shapes of the base by plain name; those of another model if the state holds no base.
    """

    name: str
    state: State
    names: AdaptedNames
    base: Mapping[str, Shape]

    @property
    def parts(self) -> tuple[Part, ...]:
        """Its tensors."""
        return self.names.adapters[self.name]

    @cached_property
    def pairs(self) -> dict[str, Factors]:
        """Its LoRA factors, by wrapper."""
        return factors(self.parts)

    @cached_property
    def targets(self) -> dict[str, Target]:
        """What each pair adapts."""
        catalogue = self.state.catalogue
        shapes = {
            name: catalogue[name].shape for pair in self.pairs.values() for name in pair.names
        }
        return find_targets(self.pairs, shapes, self.base)

    def refuse_empty(self) -> None:
        """Raise DamagedCheckpoint if one of its tensors has no elements."""
        empty = [part.name for part in self.parts if not self.state.catalogue[part.name].numel]
        if empty:
            raise DamagedCheckpoint(
                f"adapter {self.name!r} has {tensors(len(empty))} without elements: {listed(empty)}",
                hint=_NOT_GATHERED,
            )

    def configured(
        self,
        named: Path | None,
        search: Sequence[Path],
        architecture: str | None,
        base_model: str | None,
        *,
        follow_links: bool = False,
    ) -> AdapterConfig:
        """Its config: the one found, checked against the tensors, or one inferred from them.

        Args:
            named: ``--adapter-config``.
            search: where to look otherwise.
            architecture: class of the base model, if known.
            base_model: name of the base model, if known.
            follow_links: whether the one found may be a link that leads out of its directory.

        Raises:
            MissingAsset: there is none, and the tensors do not determine one.
            UsageError: the one found is of another adapter, or is such a link.
        """
        alone = len(self.names.adapters) == 1
        found = find_adapter_config(
            named, search, self.name, alone=alone, follow_links=follow_links
        )
        if found is not None:
            if found.is_lora and self.pairs:
                check(found, self._ranks(found))
            return found
        if any(not part.is_lora and not part.replaces for part in self.parts) or not self.pairs:
            kinds = {part.container for part in self.parts if not part.is_lora}
            raise MissingAsset(
                f"no {NAME} of adapter {self.name!r} was found, and only a LoRA config can be inferred "
                f"(it has {listed(sorted(kinds))})",
                hint=f"Pass --adapter-config FILE|DIR, the {NAME} of the training run.",
            )
        return infer(self._evidence(), architecture, base_model)

    def _ranks(self, config: AdapterConfig) -> dict[str, int]:
        """``r`` by key. Without the base, shapes do not tell the rank of stacked experts.

        Factors of a kind of layer that is not known here have none.
        """
        parameters = config.data.get("target_parameters")
        try:
            targets = self.targets
        except UnsupportedLayout:
            return {}
        return {
            target.key: target.rank
            for target in targets.values()
            if target.weight is not None or not parameters
        }

    def _evidence(self) -> Evidence:
        targets = self.targets
        wrapped = {module for module in self.pairs if ".base_layer" in module}
        if wrapped and not all(targets[module].is_parameter for module in wrapped):
            raise MissingAsset(
                "the adapter targets single parameters, and their names are unknown without the base",
                hint=f"Pass --adapter-config FILE|DIR, the {NAME} of the training run.",
            )
        plain = [(plain_name(inner), name) for name, inner in self.names.base.items()]
        matrices = [module for module, t in targets.items() if not self.pairs[module].embedding]
        ways = {targets[m].transposed for m in matrices if not targets[m].is_parameter}
        return Evidence(
            ranks={target.key: target.rank for target in targets.values()},
            parameters=frozenset(t.key for t in targets.values() if t.is_parameter),
            modules=frozenset(n.removesuffix(".weight") for n, _ in plain if n.endswith(".weight")),
            replaced=tuple(dict.fromkeys(p.module for p in self.parts if p.replaces)),
            dora=frozenset(targets[m].key for m, p in self.pairs.items() if p.magnitude),
            biased_factors=frozenset(targets[m].key for m, p in self.pairs.items() if p.bias),
            bias=self._bias(),
            transposed=ways.pop() if len(ways) == 1 and self.base else None,
        )

    def _bias(self) -> str | None:
        """Which biases of the base were trained, if the checkpoint tells."""
        biases = {name for name, inner in self.names.base.items() if inner.endswith(".bias")}
        if not biases:
            return "none"
        if "frozen" not in self.state.kinds.values():
            return None
        trained = {name for name in biases if self.state.kinds.get(name) == "parameter"}
        wrapped = {f"{module}.base_layer.bias" for module in self.pairs}
        of_lora = {name for name in biases if self.names.base[name] in wrapped}
        known = {
            frozenset[str](): "none",
            frozenset(of_lora): "lora_only",
            frozenset(biases): "all",
        }
        return known.get(frozenset(trained)) if trained else "none"


def base_shapes(catalogue: Catalogue, names: AdaptedNames) -> dict[str, Shape]:
    """Shapes of the base by plain name, but of quantised weights: those are the shapes of codes."""
    storage = storage_names(catalogue)
    return {
        plain: catalogue[name].shape for name, plain in names.plain.items() if name not in storage
    }


def state_names(state: State) -> AdaptedNames:
    """The names of a state, second names included, sorted into adapters and base."""
    return adapted_names([*state.catalogue, *state.catalogue.ties])


def trained_dtype(state: State, name: str) -> DType:
    """The dtype that a tensor had in the model; ``name`` may be a second name."""
    return state.dtypes[state.catalogue.ties.get(name, name)]


def as_live(saved: State, adapter: str) -> tuple[State, dict[str, str]]:
    """The state of an adapter's file under the names of a model in training.

    Returns:
        The state, and for each saved name that PEFT reads the name in it.
    """
    names = {name: with_adapter_name(name, adapter) for name in read_by_peft(saved.catalogue)}
    live = replace(
        saved,
        catalogue=Catalogue({new: saved.catalogue[old] for old, new in names.items()}),
        dtypes={new: saved.dtypes[old] for old, new in names.items()},
        kinds={new: saved.kinds[old] for old, new in names.items()},
    )
    return live, names


def read_adapter_directory(
    directory: Path, adapter: str, *, follow_links: bool = False
) -> tuple[State, AdapterConfig]:
    """The state and config of a directory that PEFT wrote.

    Args:
        directory: the directory.
        adapter: the name to give the adapter.
        follow_links: whether its config may be a link that leads out of the directory.

    Raises:
        MissingAsset: weights or config are not there.
        UsageError: its config is such a link, or it holds no adapter.
        DamagedCheckpoint: a file is truncated.
    """
    if not directory.exists():
        raise MissingAsset("no such directory", path=directory, hint=what_is_there(directory))
    entry = entry_in(directory, ADAPTER_FILES)
    config = find_adapter_config(None, [directory], adapter, alone=True, follow_links=follow_links)
    if entry is None or config is None:
        raise MissingAsset(
            f"it holds no {ADAPTER_FILES[0]}" if entry is None else f"it holds no {NAME}",
            path=directory,
            hint="Pass --adapter-dir with a directory that PEFT's save_pretrained wrote.",
        )
    held = Catalogue(dict(read_weight_files(entry).tensors))
    dtypes = {name: tensor.dtype for name, tensor in held.items()}
    state, _ = as_live(State(held, dtypes, dict.fromkeys(held, "parameter")), adapter)
    empty = [name for name, tensor in held.items() if not tensor.numel]
    if empty:
        raise DamagedCheckpoint(
            f"the adapter has {tensors(len(empty))} without elements: {listed(empty)}",
            path=entry,
            hint=_NOT_GATHERED,
        )
    if adapter not in state_names(state).adapters:
        raise UsageError("it holds no tensor of an adapter", path=entry, hint=_NOT_GATHERED)
    return state, config
