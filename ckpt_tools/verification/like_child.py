"""The child process that fills in the defaults of configs as transformers does.

Two versions of transformers write the same config with different keys. With the defaults filled in, configs
of the same model have the same keys. No code beside a config is run.

Reads a JSON list of configs on standard input. Prints a JSON list: each filled in, or null where transformers
does not know its model.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

_ABSENT = ("torch", "accelerate", "peft", "deepspeed", "sklearn", "tensorflow", "flax")


def main() -> None:
    """Answer the question on standard input."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for name in _ABSENT:
        sys.modules[name] = None  # type: ignore[assignment]
    json.dump([filled(config) for config in json.load(sys.stdin)], answers, default=str)
    answers.close()


def filled(config: dict[str, Any]) -> dict[str, Any] | None:
    """The config with every default; None where transformers cannot read it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        known: Any = CONFIG_MAPPING[config["model_type"]]
        return dict(known.from_dict(config).to_dict())
    except Exception:
        return None


if __name__ == "__main__":
    main()
