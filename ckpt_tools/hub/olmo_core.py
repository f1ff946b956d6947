"""Owns the translation of OLMo-core's saved config to a Hugging Face config of Olmo2, Olmo3 or OlmoHybrid.

Every value is taken from OLMo-core's ``config.json``. A setting that is unknown here and not empty is
refused, because it may change what the model computes.

Sources: OLMo-core ``nn/hf/config.py`` (``get_hf_config``, ``get_hybrid_hf_config``),
``nn/hf/convert_checkpoint.py`` (token ids and positions), ``nn/attention/__init__.py`` (sliding windows) and
``nn/attention/recurrent.py`` (sizes of a gated delta net), read at commit fa6c5014 (3.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt_tools.errors import UnsupportedLayout

_ABSENT = object()
_MIXER = "sequence_mixer"
# Known settings. Those that are not read here say how a model is made or runs, not what it computes.
_MODEL = {
    "_CLASS_", "block", "block_overrides", "block_pattern", "d_model", "dtype", "embedding_init_std",
    "freeze_params", "init_method", "init_seed", "init_std", "lm_head", "n_layers", "name",
    "tie_word_embeddings", "vocab_size",
}  # fmt: skip
_BLOCK = {
    "_CLASS_", "attention", "dropout", "feed_forward", "layer_norm", "name", "sequence_mixer",
}  # fmt: skip
_ATTENTION = {
    "_CLASS_", "backend", "bias", "dropout", "dtype", "head_dim", "n_heads", "n_kv_heads", "name",
    "qk_norm", "rope", "sliding_window", "type", "use_flash",
}  # fmt: skip
_DELTA_NET = {
    "_CLASS_", "allow_neg_eigval", "conv_bias", "conv_size", "dtype", "expand_v", "head_dim", "n_heads",
    "n_v_heads", "norm_eps", "type",
}  # fmt: skip
_ROPE = {"_CLASS_", "full_precision", "name", "partial_rotary_factor", "theta"}
_FEED_FORWARD = {"_CLASS_", "activation", "bias", "dtype", "hidden_size", "name"}
_NORM = {"_CLASS_", "bias", "dtype", "eps", "full_precision", "name"}
_HEAD = {"_CLASS_", "bias", "dtype", "layer_norm", "loss_implementation", "name"}


def is_experiment(data: Mapping[str, Any]) -> bool:
    """Whether OLMo-core's trainer saved this ``config.json``."""
    model = data.get("model")
    return isinstance(model, Mapping) and {"d_model", "n_layers", "block"} <= model.keys()


def hub_config(experiment: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The Hugging Face config of an experiment's model.

    Args:
        experiment: the content of OLMo-core's ``config.json``.
        path: this file, for errors.

    Returns:
        A config of model type ``olmo2``, ``olmo3`` or ``olmo_hybrid``, the first two in a form that
        transformers 4 and 5 both read.

    Raises:
        UnsupportedLayout: the model is none of these, or the file lacks a needed value.
    """
    return _Experiment(experiment, path).config()


class _Experiment:
    def __init__(self, data: Mapping[str, Any], path: Path) -> None:
        self._data = data
        self._path = path

    def config(self) -> dict[str, Any]:
        model = self._section(self._data, "model", _MODEL)
        self._require(model, "model", name="default", block_overrides=None)
        if model.get("block_pattern") is not None:
            return self._hybrid(model)
        config = self._transformer(model, self._section(model, "block", _BLOCK))
        name = "Olmo3" if "layer_types" in config else "Olmo2"
        return {
            "architectures": [f"{name}ForCausalLM"],
            "model_type": name.lower(),
            **config,
        }

    def _hybrid(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """The config of a model of gated delta nets and attention, each with a block of its own."""
        pattern, blocks = model["block_pattern"], model.get("block")
        if not isinstance(blocks, Mapping) or not isinstance(pattern, list) or not pattern:
            raise self._refused("a block_pattern without named blocks")
        sections = {name: self._section(blocks, name, _BLOCK) for name in dict.fromkeys(pattern)}
        linear = [name for name in sections if _is_delta_net(sections[name])]
        attention = [name for name in sections if name not in linear]
        if len(linear) != 1 or len(attention) != 1:
            raise self._refused(f"blocks {', '.join(sections)} in its block_pattern")
        block = sections[linear[0]]
        config = self._transformer(model, sections[attention[0]])
        if "layer_types" in config:
            raise self._refused("a sliding_window beside a gated delta net")
        self._require(block, linear[0], name="default")
        if self._feed_forward(block) != config["intermediate_size"]:
            raise self._refused("blocks with feed_forward of two sizes")
        if self._epsilons(self._section(block, "layer_norm", _NORM)) != {config["rms_norm_eps"]}:
            raise self._refused("norms with several eps")
        layers, net = config["num_hidden_layers"], self._section(block, _MIXER, _DELTA_NET)
        # The norm behind a gated delta net of transformers has no other epsilon.
        self._require(net, _MIXER, conv_bias=False, norm_eps=1e-5)
        heads = self._stated(net, "n_heads")
        size = net.get("head_dim") or config["hidden_size"] // heads
        kinds = ["linear_attention" if name in linear else "full_attention" for name in pattern]
        return {
            "architectures": ["OlmoHybridForCausalLM"],
            "model_type": "olmo_hybrid",
            **config,
            "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]},
            "layer_types": [kinds[layer % len(kinds)] for layer in range(layers)],
            "linear_num_key_heads": heads,
            "linear_num_value_heads": net.get("n_v_heads") or heads,
            "linear_key_head_dim": size,
            "linear_value_head_dim": int(size * self._stated(net, "expand_v")),
            "linear_conv_kernel_dim": self._stated(net, "conv_size"),
            "linear_allow_neg_eigval": bool(net.get("allow_neg_eigval", False)),
        }

    def _transformer(self, model: Mapping[str, Any], block: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a model of such blocks of attention."""
        self._require(block, "block", name="reordered_norm")
        mixer = _MIXER if _MIXER in block else "attention"
        attention = self._section(block, mixer, _ATTENTION)
        self._require(attention, mixer, name="default", type="attention")
        rope = self._section(attention, "rope", _ROPE)
        self._require(rope, "rope", partial_rotary_factor=1.0)
        head = self._section(model, "lm_head", _HEAD)
        self._require(head, "lm_head", bias=False)
        heads = self._stated(attention, "n_heads")
        config = {
            "vocab_size": self._stated(model, "vocab_size"),
            "hidden_size": self._stated(model, "d_model"),
            "intermediate_size": self._feed_forward(block),
            "num_hidden_layers": self._stated(model, "n_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": attention.get("n_kv_heads") or heads,
            "hidden_act": "silu",
            "max_position_embeddings": self._positions(),
            # OLMo-core does not write None, and None means True here.
            "attention_bias": bool(attention.get("bias", True)),
            "rope_theta": self._stated(rope, "theta"),
            "rms_norm_eps": self._epsilon(block, attention, head),
            "tie_word_embeddings": bool(model.get("tie_word_embeddings", False)),
            **self._tokens(),
            **self._layer_types(attention, self._stated(model, "n_layers")),
            "dtype": self._stated(model, "dtype"),
        }
        size = config["hidden_size"] // heads
        if attention.get("head_dim", size) != size:
            raise self._refused(f"heads of {attention['head_dim']} elements")
        return config

    def _feed_forward(self, block: Mapping[str, Any]) -> int:
        """The hidden size of the feed-forward part of a block."""
        feed_forward = self._section(block, "feed_forward", _FEED_FORWARD)
        self._require(feed_forward, "feed_forward", bias=False, activation="silu")
        return int(self._stated(feed_forward, "hidden_size"))

    def _section(self, parent: Mapping[str, Any], key: str, known: set[str]) -> Mapping[str, Any]:
        section = parent.get(key)
        if not isinstance(section, Mapping):
            raise self._refused(f"no single `{key}`")
        odd = [k for k, value in section.items() if k not in known and value not in (None, False)]
        if odd:
            raise self._refused(f"`{key}` with {', '.join(f'{k}={section[k]!r}' for k in odd)}")
        return section

    def _require(self, section: Mapping[str, Any], where: str, **values: object) -> None:
        for key, value in values.items():
            found = section.get(key, _ABSENT)
            if found is not _ABSENT and found != value:
                raise self._refused(f"`{where}` with {key}={found!r}")

    def _stated(self, section: Mapping[str, Any], key: str) -> Any:
        value = section.get(key)
        if value is None:
            raise self._refused(f"no {key}")
        return value

    def _epsilon(self, *sections: Mapping[str, Any]) -> float:
        """The common epsilon of all norms."""
        norms = [
            self._section(section, key, _NORM)
            for section, key in zip(sections, ("layer_norm", "qk_norm", "layer_norm"), strict=True)
        ]
        epsilons = self._epsilons(*norms)
        if len(epsilons) != 1:
            raise self._refused(f"norms with eps {sorted(epsilons)}")
        return epsilons.pop()

    def _epsilons(self, *norms: Mapping[str, Any]) -> set[float]:
        for norm in norms:
            self._require(norm, "norm", name="rms", bias=False)
        return {float(self._stated(norm, "eps")) for norm in norms}

    def _positions(self) -> int:
        """The sequence length of the training run."""
        for section, key in (
            ("train_module", "max_sequence_length"),
            ("dataset", "max_target_sequence_length"),
            ("dataset", "sequence_length"),
        ):
            value = (self._data.get(section) or {}).get(key)
            if isinstance(value, int):
                return value
        raise self._refused("no max_sequence_length")

    def _tokens(self) -> dict[str, int | None]:
        tokenizer = (self._data.get("dataset") or {}).get("tokenizer") or {}
        keys = ("pad_token_id", "bos_token_id", "eos_token_id")
        return {key: tokenizer.get(key) for key in keys}

    def _layer_types(self, attention: Mapping[str, Any], layers: int) -> dict[str, Any]:
        """Which layers use a sliding window; only Olmo3 has such layers."""
        window = attention.get("sliding_window")
        if window is None:
            return {}
        pattern = list(window["pattern"])
        # If the first layer always has full attention, the pattern starts after it.
        skipped = int(bool(window["force_full_attention_on_first_layer"]))
        sizes = [pattern[(layer - skipped) % len(pattern)] for layer in range(layers)]
        if skipped:
            sizes[0] = -1
        if window["force_full_attention_on_last_layer"]:
            sizes[-1] = -1
        found = {size for size in sizes if size != -1}
        if len(found) > 1:
            raise self._refused(f"windows of {sorted(found)} elements")
        if not found:
            return {}
        kinds = ["full_attention" if size == -1 else "sliding_attention" for size in sizes]
        return {"sliding_window": found.pop(), "layer_types": kinds}

    def _refused(self, what: str) -> UnsupportedLayout:
        return UnsupportedLayout(
            f"OLMo-core's config has {what}, so no Olmo2, Olmo3 or OlmoHybrid config can be "
            "made of it",
            path=self._path,
            hint="Pass --config with the config.json of the Hugging Face model.",
        )


def _is_delta_net(block: Mapping[str, Any]) -> bool:
    mixer = block.get(_MIXER)
    return isinstance(mixer, Mapping) and mixer.get("type") == "gated_delta_net"
