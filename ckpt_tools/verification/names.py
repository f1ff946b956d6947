"""Owns the names that a finished model does not have: those of wrappers, of PEFT and of adapters.

The other checks continue with the plain names, so that one mistake is one problem. Names that the model has
are never treated as wrapper names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from ckpt_tools.errors import tensors
from ckpt_tools.verification.problem import Findings

# Written by torch's own wrappers at any depth.
_ANYWHERE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Written by DDP, DataParallel and engines, around the whole model.
_IN_FRONT = "module."
_PEFT = "base_model.model."
_LORA = re.compile(r"(^|\.)lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.|$)")
_PEFT_PARTS = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")

_ANEW = "Write the directory again with ckpt-tools consolidate, which removes them."
_MERGE = (
    "ckpt-tools merge-lora writes the merged model, ckpt-tools extract-lora writes the adapter."
)


def plain_names(names: Iterable[str], known: Collection[str], findings: Findings) -> dict[str, str]:
    """Remove wrapper segments from names, and add a problem for each wrapper.

    Args:
        names: the names in the files.
        known: names of the model; empty if the model is not known.
        findings: takes the problems.

    Returns:
        For each plain name, the name in the files. Names of adapters are left out.
    """
    plain = {name: name for name in names}
    for wrapper in _ANYWHERE:
        _strip(plain, known, rf"(^|\.){wrapper}(?=\.)", wrapper + ".", "name-wrapped", findings)
    if plain and all(name.startswith(_IN_FRONT) for name in plain.values()):
        _strip(plain, known, rf"^{re.escape(_IN_FRONT)}", _IN_FRONT, "name-wrapped", findings)
    _strip(plain, known, rf"^{re.escape(_PEFT)}", _PEFT, "name-peft", findings)
    _strip(plain, known, _PEFT_PARTS.pattern, "base_layer.", "name-peft", findings)
    lora = [name for name in plain if _LORA.search(name) and name not in known]
    if lora:
        findings.add(
            "name-lora",
            f"the model's files hold {tensors(len(lora))} of an adapter",
            tensor=lora[0],
            hint=_MERGE,
        )
    for name in lora:
        del plain[name]
    return {new: old for old, new in plain.items()}


def _strip(
    plain: dict[str, str],
    known: Collection[str],
    pattern: str,
    shown: str,
    kind: str,
    findings: Findings,
) -> None:
    hits = {
        old: re.sub(pattern, "", name).removeprefix(".")
        for old, name in plain.items()
        if name not in known and re.search(pattern, name)
    }
    if not hits:
        return
    first = next(iter(hits))
    findings.add(
        kind,
        f"{len(hits)} names contain {shown!r}; this one should be {hits[first]}",
        tensor=first,
        hint=_MERGE if kind == "name-peft" else _ANEW,
    )
    plain.update(hits)


def common_prefix(names: Collection[str]) -> str:
    """The common first segments of all names, with the last dot; empty if there are none."""
    paths = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for column in zip(*paths, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return "".join(f"{segment}." for segment in shared)
