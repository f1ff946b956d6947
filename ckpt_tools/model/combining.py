"""Several LoRA adapters of one base as one adapter: what PEFT's ``add_weighted_adapter`` makes.

Owns the weights, and the two ways that only move and add elements. ``cat`` stacks the factors, so that the
update is the weighted sum of the updates. ``linear`` adds the factors, and needs equal ranks.

Source: ``peft/tuners/lora/model.py`` (``add_weighted_adapter``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ckpt_tools.errors import MissingAsset, UnsupportedLayout, UsageError, listed
from ckpt_tools.hub.adapter_config import NAME, AdapterConfig
from ckpt_tools.model.adapter import Adapter, read_adapter_directory, state_names
from ckpt_tools.model.settings import changes_the_base, refuse_unknown_settings
from ckpt_tools.model.state import State
from ckpt_tools.tensors.catalogue import Catalogue, Tensor
from ckpt_tools.tensors.derived import Concat
from ckpt_tools.tensors.dtypes import FLOAT32
from ckpt_tools.transforms.average import Mean
from ckpt_tools.transforms.lora_targets import Factors

Combination = Literal["cat", "linear"]
COMBINATIONS: tuple[Combination, ...] = ("cat", "linear")
_COMBINED = "combined"


@dataclass(frozen=True)
class Weighted:
    """An adapter with its config and its weight."""

    adapter: Adapter
    config: AdapterConfig
    weight: float

    def scale(self, key: str) -> float:
        """What its update of a module is multiplied with."""
        return self.weight * self.config.scale(key)


def weights_of(text: str | None) -> dict[str, float] | None:
    """The adapters of ``--adapter a=0.7,b=0.3`` with their weights; None where it is one name.

    Raises:
        UsageError: an entry is not ``name=number``.
    """
    if text is None or "=" not in text:
        return None
    weights: dict[str, float] = {}
    for entry in text.split(","):
        name, _, number = entry.strip().rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or name in weights or not math.isfinite(weight):
            raise UsageError(
                f"{entry!r} is not an adapter with its weight",
                hint="Write each adapter once, as in --adapter a=0.7,b=0.3.",
            )
        weights[name] = weight
    return weights


def read_adapter_directories(
    directory: Path, names: Sequence[str], *, follow_links: bool
) -> tuple[State, dict[str, AdapterConfig]]:
    """The adapters of a directory as PEFT writes several: ``default`` in it, others in folders.

    Raises:
        MissingAsset: one of them is not there.
        UnsupportedLayout: one holds tensors that replace those of the base.
    """
    tensors: dict[str, Tensor] = {}
    configs: dict[str, AdapterConfig] = {}
    for name in names:
        folder = directory if name == "default" else directory / name
        if not folder.is_dir():
            held = sorted(path.parent.name for path in directory.glob(f"*/{NAME}"))
            raise MissingAsset(
                f"it holds no adapter {name!r}",
                path=directory,
                hint=f"It holds: {listed(['default', *held])}.",
            )
        state, config = read_adapter_directory(folder, name, follow_links=follow_links)
        _refuse_whole(name, state)
        tensors |= dict(state.catalogue.items())
        configs[name] = config
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    return State(Catalogue(tensors), dtypes, dict.fromkeys(tensors, "parameter")), configs


def combined(
    several: Sequence[Weighted], taken: Callable[[str], Tensor], how: Combination
) -> tuple[State, AdapterConfig]:
    """One adapter of several, and its config.

    Args:
        several: the adapters, of one state.
        taken: gives a tensor of the state in the dtype in which it is used.
        how: ``cat`` or ``linear``.

    Raises:
        UnsupportedLayout: an adapter holds more than plain LoRA factors of modules.
        UsageError: ``linear``, and the ranks differ.
    """
    for one in several:
        refuse_unknown_settings(one.config)
        _refuse_others(one)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for module in dict.fromkeys(module for one in several for module in one.adapter.pairs):
        having = [one for one in several if module in one.adapter.pairs]
        pairs = [one.adapter.pairs[module] for one in having]
        key = having[0].adapter.targets[module].key
        scales = [one.scale(key) for one in having]
        a, b = _factors(pairs, scales, taken, how, key)
        first, name = pairs[0], having[0].adapter.name
        tensors[_renamed(first.a, name)] = a
        tensors[_renamed(first.b, name)] = b
        ranks[key] = a.shape[0]
    # With alpha equal to r the scale is 1: the factors hold the scales.
    data = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "rank_pattern": ranks}
    data |= {"alpha_pattern": ranks, "fan_in_fan_out": several[0].config.data.get("fan_in_fan_out")}
    made = " and ".join(f"{one.weight:g} of {one.adapter.name!r}" for one in several)
    note = f"merged {made}, combined as PEFT's {how!r}"
    if several[0].config.data.get("use_rslora"):
        note += (
            "; PEFT's own update is larger by sqrt(r), because it scales the result as rsLoRA again"
        )
    dtypes = dict.fromkeys(tensors, FLOAT32)
    state = State(Catalogue(tensors), dtypes, dict.fromkeys(tensors, "parameter"))
    return state, AdapterConfig(data, several[0].config.path, (note,))


def _factors(
    pairs: Sequence[Factors],
    scales: Sequence[float],
    taken: Callable[[str], Tensor],
    how: Combination,
    key: str,
) -> tuple[Tensor, Tensor]:
    a, b = [taken(pair.a) for pair in pairs], [taken(pair.b) for pair in pairs]
    if how == "cat":
        scaled = [Mean((one,), (scale,)) for one, scale in zip(a, scales, strict=True)]
        plain = [Mean((one,), (1.0,)) for one in b]
        return Concat(tuple(scaled), 0), Concat(tuple(plain), 1)
    if len({one.shape for one in a}) > 1:
        found = listed([str(one.shape[0]) for one in a])
        raise UsageError(
            f"the adapters have different ranks at {key} ({found}), so their factors cannot be added",
            hint="Pass --combination cat, which adds the updates.",
        )
    roots = [math.sqrt(abs(scale)) for scale in scales]
    signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
    return Mean(tuple(a), tuple(signed)), Mean(tuple(b), tuple(roots))


def _renamed(name: str, adapter: str) -> str:
    head, _, tail = name.rpartition(f".{adapter}")
    return f"{head}.{_COMBINED}{tail}"


def _refuse_whole(name: str, state: State) -> None:
    """Refuse an adapter's directory with saved modules, biases or resized embeddings: these have no sum.

    The file of an adapter on an embedding holds the embedding too, as it was before training.
    """
    names = state_names(state)
    targets = {part.module for part in names.adapters[name] if part.is_lora}
    wrapped = {f"{module}.base_layer.weight" for module in targets}
    whole = [saved for saved, inner in names.base.items() if inner not in wrapped]
    if whole:
        raise _not_plain(name, listed(whole))


def _refuse_others(one: Weighted) -> None:
    name = one.adapter.name
    odd = [part.name for part in one.adapter.parts if not part.is_lora]
    odd += [n for p in one.adapter.pairs.values() for n in (p.bias, p.magnitude) if n is not None]
    start: Mapping[str, object] = one.config.data
    if odd or start.get("target_parameters") or changes_the_base(start.get("init_lora_weights")):
        raise _not_plain(name, listed(odd) if odd else "target_parameters or init_lora_weights")


def _not_plain(name: str, what: str) -> UnsupportedLayout:
    return UnsupportedLayout(
        f"adapter {name!r} is not plain LoRA on modules ({what}), so it cannot be combined with others",
        hint="Merge one adapter after the other: the output of one merge-lora is the CKPT of the next.",
    )
