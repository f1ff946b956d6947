"""Owns the facts about adapters for the rules of ``verify --for sglang``.

docs/clients.md says which were confirmed with SGLang's own functions, and which were read from its source.
"""

from __future__ import annotations

import re

from ckpt_tools.errors import listed
from ckpt_tools.verification.reader_facts import Facts

_LAYER = re.compile(r"layers\.(\d+)\.")
_SCALES = ("use_rslora", "alpha_pattern", "lora_bias", "layer_replication", "modules_to_save")


def added_tokens(facts: Facts) -> str | None:
    """Added tokens."""
    ids = [number for number in facts.read("added_tokens.json").values() if isinstance(number, int)]
    return (
        "takes added tokens only with ids below the vocab_size of the base; the highest id in "
        f"added_tokens.json is {max(ids)}"
        if ids
        else None
    )


def targets(facts: Facts) -> str | None:
    """A pattern in target_modules."""
    value = facts.config.get("target_modules")
    if not isinstance(value, str) or value in ("all", "all-linear"):
        return None
    return "takes target_modules as a list of names, 'all' or 'all-linear', and not as a pattern"


def ranks(facts: Facts) -> str | None:
    """A rank in rank_pattern that is not r."""
    rank, pattern = facts.config.get("r"), facts.config.get("rank_pattern")
    others = [
        value for value in (pattern.values() if isinstance(pattern, dict) else ()) if value != rank
    ]
    return f"takes one rank; r is {rank}, and rank_pattern has {others[0]}" if others else None


def stacked(facts: Facts) -> str | None:
    """q_proj without v_proj, or without the k_proj of its layer."""
    for name in sorted(facts.tensors):
        layer = _LAYER.search(name)
        if layer is None or "q_proj" not in name:
            continue
        needed = [name.replace("q_proj", "v_proj")]
        if any("k_proj" in other for other in _of_layer(facts, layer[1])):
            needed.append(name.replace("q_proj", "k_proj"))
        if lost := [other for other in needed if other not in facts.tensors]:
            return f"stacks q_proj with the others of its layer, and fails without {listed(lost)}"
    return None


def left_out(facts: Facts) -> str | None:
    """k_proj or v_proj without q_proj."""
    odd = [
        name
        for name in sorted(facts.tensors)
        for part in ("k_proj", "v_proj")
        if part in name
        and _LAYER.search(name)
        and name.replace(part, "q_proj") not in facts.tensors
    ]
    return f"skips k_proj and v_proj in a layer without q_proj: {listed(odd)}" if odd else None


def not_read(facts: Facts) -> str | None:
    """Any of use_rslora, alpha_pattern, lora_bias, layer_replication, modules_to_save."""
    found = [key for key in _SCALES if facts.config.get(key)]
    return (
        f"scales every module by lora_alpha / r and does not read {listed(found)}"
        if found
        else None
    )


def _of_layer(facts: Facts, number: str) -> list[str]:
    """The tensors of a layer."""
    return [name for name in facts.tensors if (found := _LAYER.search(name)) and found[1] == number]
