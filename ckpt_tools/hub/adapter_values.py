"""Owns the types of the values in ``adapter_config.json`` that are looked at, as PEFT writes them.

Source: ``peft/tuners/lora/config.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping


def odd_keys(config: Mapping[str, object]) -> list[str]:
    """The keys of a config whose values have a type that PEFT does not write, in alphabetical order."""
    return sorted(key for key, is_right in _TYPES.items() if not is_right(config.get(key)))


def _is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_names(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value))


def _is_text_or_names(value: object) -> bool:
    return isinstance(value, str) or _is_names(value)


def _is_by_name(value: object) -> bool:
    return value is None or isinstance(value, dict)


def _is_indices(value: object) -> bool:
    """Row numbers: one list, or a list for each module."""
    lists = list(value.values()) if isinstance(value, dict) else [value]
    return value is None or all(
        isinstance(rows, list) and all(type(row) is int for row in rows) for rows in lists
    )


_TYPES: Mapping[str, Callable[[object], bool]] = {
    "alpha_pattern": _is_by_name,
    "base_model_name_or_path": _is_text,
    "bias": _is_text,
    "modules_to_save": _is_names,
    "rank_pattern": _is_by_name,
    "target_modules": _is_text_or_names,
    "target_parameters": _is_names,
    "token_indices": _is_indices,
    "trainable_token_indices": _is_indices,
}
