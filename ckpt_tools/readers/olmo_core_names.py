"""Owns the names of OLMo-core's tensors in Hugging Face's Olmo2, Olmo3 and OlmoHybrid: a renaming alone.

The kind of a block decides the name of its norms, and the kind of its mixer (attention or a gated delta net)
all others. Other models of OLMo-core (pre-norm, mixtures of experts) keep their names.

Sources: OLMo-core ``nn/hf/convert.py`` (``convert_state_to_hf``, ``convert_hybrid_state_to_hf``), read at
3.0.0; transformers 5.23 ``conversion_mapping.py`` (OlmoHybrid on the hub). OLMo-core's own converter writes
``linear_attn.out_proj`` and ``linear_attn.norm``, which transformers calls ``o_proj`` and ``o_norm``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_ENDS = {
    "embeddings": "model.embed_tokens",
    "lm_head.norm": "model.norm",
    "lm_head.w_out": "lm_head",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_FEED_FORWARD = {
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_ATTENTION = {
    "attention.w_q": "self_attn.q_proj",
    "attention.w_k": "self_attn.k_proj",
    "attention.w_v": "self_attn.v_proj",
    "attention.w_out": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention_norm": "post_attention_layernorm",
    "feed_forward_norm": "post_feedforward_layernorm",
    **_FEED_FORWARD,
}
_DELTA_NET = {
    **{f"attention.w_{part}": f"linear_attn.{part}_proj" for part in "qkvabg"},
    **{f"attention.{part}_conv1d": f"linear_attn.{part}_conv1d" for part in "qkv"},
    "attention.w_out": "linear_attn.o_proj",
    "attention.o_norm": "linear_attn.o_norm",
    "attention_norm": "attention_layer_norm",
    "feed_forward_norm": "feedforward_layer_norm",
    **_FEED_FORWARD,
}
_BARE = {"attention.A_log": "linear_attn.A_log", "attention.dt_bias": "linear_attn.dt_bias"}


@dataclass(frozen=True)
class Layer:
    """What a layer is, as OLMo-core's config states it.

    Attributes:
        norms: the name of the block, which says where the norms are.
        mixer: the type of the sequence mixer.
    """

    norms: str
    mixer: str


_OLMO2 = Layer("reordered_norm", "attention")
_LINEAR = Layer("default", "gated_delta_net")


def hub_names(
    shapes: Mapping[str, tuple[int, ...]], experiment: Mapping[str, Any]
) -> tuple[dict[str, str], str | None]:
    """Each tensor's name in Hugging Face's Olmo2, Olmo3 or OlmoHybrid.

    In OLMo-core's pre-norm models the norms have the same names but another place, so the kind of block
    decides. Without a config that states it, norms over all heads of queries and keys decide: no other dense
    model on the Hub has them.

    Args:
        shapes: OLMo-core's names, with shapes.
        experiment: the content of OLMo-core's config; empty if there is none.

    Returns:
        The names, empty for another model, and a remark for the report.
    """
    model = experiment.get("model")
    stated = layers_of(model) if isinstance(model, Mapping) else None
    if stated is not None:
        odd = {
            kind for kind in stated if kind != _OLMO2 and (kind != _LINEAR or _OLMO2 not in stated)
        }
        if odd:
            return {}, f"{_KEPT} have no {', '.join(sorted(map(_described, odd)))}"
    names = {name: hub for name in shapes if (hub := _hub_name(name, stated)) is not None}
    unknown = [name for name in shapes if name not in names]
    if unknown:
        return {}, f"{_KEPT} have no name for {unknown[0]}"
    if stated is not None:
        return names, None
    norms = [name for name in shapes if name.endswith(".attention.q_norm.weight")]
    if norms and all(
        shapes[name] == shapes[name.replace("q_norm", "w_q")][:1]
        for name in norms
        if name.replace("q_norm", "w_q") in shapes
    ):
        return names, (
            "there is no config of OLMo-core: the model is taken for an Olmo2 or Olmo3, because its q_norm "
            "spans all heads"
        )
    return (
        {},
        "tensors keep OLMo-core's names: there is no config of OLMo-core that states the model",
    )


_KEPT = "tensors keep OLMo-core's names: Olmo2, Olmo3 and OlmoHybrid"


def _described(layer: Layer) -> str:
    if layer == _LINEAR:
        return f"model of {layer.mixer} blocks alone"
    mixer = "" if layer.mixer == "attention" else f" of {layer.mixer}"
    return f"{layer.norms} blocks{mixer}"


def layers_of(model: Mapping[str, Any]) -> list[Layer]:
    """The layers of a model in order; they repeat from the first on where the model has more."""
    block, pattern = model.get("block"), model.get("block_pattern")
    layers = [_layer(block)]
    if isinstance(block, Mapping) and isinstance(pattern, list) and pattern:
        layers = [_layer(block.get(name)) for name in pattern]
    overrides = {int(number): _layer(each) for number, each in _overrides(model).items()}
    if overrides:
        count = max(int(model.get("n_layers") or 0), *overrides, 0) + 1
        layers = [overrides.get(n, layers[n % len(layers)]) for n in range(count)]
    return layers


def _overrides(model: Mapping[str, Any]) -> Mapping[str, Any]:
    overrides = model.get("block_overrides")
    return overrides if isinstance(overrides, Mapping) else {}


def _layer(block: object) -> Layer:
    if not isinstance(block, Mapping):
        return Layer("unknown", "attention")
    mixer = block.get("sequence_mixer", block.get("attention"))
    kind = mixer.get("type", "attention") if isinstance(mixer, Mapping) else "attention"
    return Layer(str(block.get("name")), str(kind))


def _hub_name(name: str, layers: list[Layer] | None) -> str | None:
    module, _, leaf = name.rpartition(".")
    if module in _ENDS and leaf in ("weight", "bias"):
        return f"{_ENDS[module]}.{leaf}"
    match = _BLOCK.fullmatch(name)
    if match is None:
        return None
    number = int(match[1])
    layer = _OLMO2 if layers is None else layers[number % len(layers)]
    inner, _, leaf = match[2].rpartition(".")
    if layer == _LINEAR and leaf == "weight" and inner in _DELTA_NET:
        return f"model.layers.{number}.{_DELTA_NET[inner]}.weight"
    if layer == _LINEAR and match[2] in _BARE:
        return f"model.layers.{number}.{_BARE[match[2]]}"
    if layer == _OLMO2 and leaf in ("weight", "bias") and inner in _ATTENTION:
        return f"model.layers.{number}.{_ATTENTION[inner]}.{leaf}"
    return None
