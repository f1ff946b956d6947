"""Owns the names of the types of adapters that the installed PEFT knows."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path


@cache
def known_types() -> frozenset[str]:
    """PEFT's types, read from its source because the import takes seconds. Empty if it cannot be read."""
    try:
        spec = importlib.util.find_spec("peft")
        if spec is None or spec.origin is None:
            return frozenset()
        source = Path(spec.origin).parent / "utils" / "peft_types.py"
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (ImportError, OSError, SyntaxError, ValueError, RecursionError):
        return frozenset()  # it is damaged, or something else of this name
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "PeftType":
            values = (item.value for item in node.body if isinstance(item, ast.Assign))
            return frozenset(v.value for v in values if isinstance(v, ast.Constant))  # type: ignore[misc]
    return frozenset()
