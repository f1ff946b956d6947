"""Which settings of an adapter's config a merge knows, and which of them forbid it.

Owns the allow-list. A setting that is not on it may change the sum ``W + s B A`` or the ``W`` that it starts
from, so any value but an empty one is refused by name. Another PEFT may bring such a setting at any time.

Source: ``peft/tuners/lora/config.py``, ``layer.py`` (``pissa_init``, ``olora_init``, ``corda_init``,
``loftq_init``, ``lora_ga_init`` subtract ``s B A`` from the base; ``eva``, ``orthogonal``, ``mica_init`` and
``reset_lora_parameters`` leave the base alone), ``variants.py`` (what ``merge_safe`` of a variant adds).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ckpt_tools.errors import UnsupportedLayout, counted, listed
from ckpt_tools.hub.adapter_config import AdapterConfig

# Settings that the merge reads, or that the tensors state by themselves.
_READ = frozenset(
    {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"}
    | {"fan_in_fan_out", "bias", "lora_bias", "modules_to_save", "trainable_token_indices"}
    | {"token_indices", "target_modules", "target_parameters", "init_lora_weights"}
)
# Settings of training, of loading, and of how values start that are stored anyway.
_WITHOUT_EFFECT = frozenset(
    {
        "task_type",
        "auto_mapping",
        "peft_version",
        "ensure_weight_tying",
        "base_model_name_or_path",
        "revision",
    }
    | {"inference_mode", "exclude_modules", "lora_dropout", "layers_to_transform"}
    | {"layers_pattern", "megatron_core", "runtime_config", "qalora_group_size", "init_weights"}
    | {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}
    # LoRA+ of ms-swift: learning rates, and the dtype of the factors.
    | {"lorap_lr_ratio", "lorap_emb_lr", "lora_dtype"}
)
_TYPES = ("LORA", "TRAINABLE_TOKENS")
# Values of init_lora_weights that leave the base as it is, and those that change it.
_KEEPS_BASE = frozenset({"gaussian", "eva", "orthogonal", "mica"})
# The SVD of pissa_niter is random, so PEFT cannot repeat it. The base of LoftQ differs by more than s B A.
_PEFT_REBUILDS = re.compile(r"pissa|olora")
_PEFT_CONVERTS = re.compile(r"pissa_niter_\d+|corda|lora_ga")
_CHANGES_BASE = re.compile(r"pissa(_niter_\d+)?|olora|corda|loftq|lora_ga")

_EXTRACT = (
    "Write it as an adapter with extract-lora; PEFT's from_pretrained and merge_and_unload may merge "
    "that."
)


def refuse_unknown_settings(config: AdapterConfig) -> None:
    """Refuse a config with a setting whose effect on the merge is not known.

    Raises:
        UnsupportedLayout: it has one.
    """
    kind = config.data.get("peft_type")
    if kind not in _TYPES:
        raise UnsupportedLayout(
            f"merging an adapter of type {kind!r} is not supported; LoRA and trainable tokens are",
            path=config.path,
            hint=_EXTRACT,
        )
    known = _READ | _WITHOUT_EFFECT
    odd = [key for key, value in config.data.items() if key not in known and not _is_empty(value)]
    if "layer_replication" in odd:
        raise UnsupportedLayout(
            "merging is not supported with layer_replication: copies of a layer share one weight, and their "
            "updates differ; PEFT's merge_and_unload adds all of them to that weight, and changes "
            "the model",
            path=config.path,
            hint="Write the adapter with extract-lora, and load it with PEFT's from_pretrained without "
            "merging it.",
        )
    if odd:
        raise UnsupportedLayout(
            f"merging is not supported with these settings of the adapter: {listed(sorted(odd))}",
            path=config.path,
            hint=_EXTRACT,
        )
    start = config.data.get("init_lora_weights")
    if not _starts_on_the_base(start) and not changes_the_base(start):
        raise UnsupportedLayout(
            f"init_lora_weights {start!r} is not known: it may have changed the base",
            path=config.path,
            hint=_EXTRACT,
        )


def refuse_another_base(config: AdapterConfig, elsewhere: Iterable[str]) -> None:
    """Refuse a merge into a base that is not the one that the adapter was trained on.

    Args:
        config: the adapter's config.
        elsewhere: adapted weights that are from a plain model, not from the training run.

    Raises:
        UnsupportedLayout: ``init_lora_weights`` changed the base before training.
    """
    start, names = config.data.get("init_lora_weights"), list(elsewhere)
    if not names or not changes_the_base(start):
        return
    value = str(start).lower()
    other = ""
    if _PEFT_REBUILDS.fullmatch(value):
        other = "Let PEFT merge it, which rebuilds that base: PeftModel.from_pretrained, merge_and_unload. "
    elif _PEFT_CONVERTS.fullmatch(value):
        other = (
            "While the model is live, PEFT's save_pretrained(path_initial_model_for_weight_conversion=DIR) "
            "converts the adapter to plain LoRA, if DIR holds the adapter as it was before training. "
        )
    raise UnsupportedLayout(
        f"init_lora_weights {start!r} changed the base before training, and "
        f"{counted(len(names), 'weight')} here came from the base before that: {listed(names)}",
        path=config.path,
        hint="Merge the whole checkpoint of the run, which holds the changed base, without --base. "
        + other
        + "If the base here is the changed one, pass --adapter-config with init_lora_weights true.",
    )


def _is_empty(value: object) -> bool:
    return value is None or value is False or value in ({}, [], "")


def _starts_on_the_base(start: object) -> bool:
    return start is None or isinstance(start, bool) or str(start).lower() in _KEEPS_BASE


def changes_the_base(start: object) -> bool:
    """Whether a value of ``init_lora_weights`` changed the base before training."""
    return isinstance(start, str) and _CHANGES_BASE.fullmatch(start.lower()) is not None
