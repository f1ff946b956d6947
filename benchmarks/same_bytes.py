"""Digests of what conversions of every fixture write, to compare two commits.

    python benchmarks/same_bytes.py write BEFORE.json     # in a checkout of one commit
    python benchmarks/same_bytes.py write AFTER.json      # in a checkout of the other
    python benchmarks/same_bytes.py compare BEFORE.json AFTER.json

Weights, index, config, generation config, tokenizer and adapter files count; model cards and manifests hold
versions and wording and do not. The script runs the package of the checkout that it is started in, so that it
can be copied into an older one.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
FIXTURES = Path("fixtures")
# Wording and versions.
LEFT_OUT = {"README.md", "ckpt_tools_manifest.json"}

Call = Callable[[Path], object]


def main(arguments: list[str]) -> int:
    match arguments:
        case ["write", file]:
            found = {name: digests(call) for name, call in conversions()}
            Path(file).write_text(json.dumps(found, indent=0, sort_keys=True))
            refused = sum(isinstance(value, str) for value in found.values())
            print(f"{len(found)} conversions, {refused} of them refused: {file}")
            return 0
        case ["compare", first, second]:
            before, after = (json.loads(Path(file).read_text()) for file in (first, second))
            odd = [name for name in {**before, **after} if before.get(name) != after.get(name)]
            for name in odd:
                print(f"{name}: {before.get(name)} -> {after.get(name)}")
            print(f"{len(before)} and {len(after)} conversions, {len(odd)} differ")
            return 1 if odd else 0
        case _:
            print(__doc__)
            return 2


def conversions() -> Iterator[tuple[str, Call]]:
    import ckpt_tools as tool

    for checkpoint in sorted(FIXTURES.glob("*/*/checkpoint")):
        case, hf = checkpoint.parent, checkpoint.parent / "hf"
        kind, name = case.parent.name, f"{case.parent.name}/{case.name}"
        model: dict[str, Any] = {"config": hf} if hf.is_dir() else {}
        if any(hf.glob("tokenizer*")):
            model["tokenizer"] = hf
        convert = partial(tool.consolidate, checkpoint)
        yield f"{name} auto", partial(convert, **model)
        small = {"dtype": "fp32", "weights_only": True, "max_shard_size": 40000}
        yield f"{name} fp32, weights only", partial(convert, **small)
        yield f"{name} 16-bit weights", partial(convert, weights="model", weights_only=True)
        for attribute in ("policy", "value", "model") if kind == "composite" else ():
            yield f"{name} {attribute}", partial(convert, attribute=attribute, **model)
        if kind == "peft" or "lora" in case.name:
            truth = case / "truth" / "adapter"
            own = {"adapter_config": truth} if truth.is_dir() else {"lora_alpha": 16}
            named = own if truth.is_dir() else own | {"base_model": "base"}
            extract = partial(tool.extract_lora, checkpoint, **named, **model)
            yield f"{name} adapters", partial(extract, adapter="all")
            yield f"{name} adapter", extract
            base = {"base": case / "base"} if (case / "base").is_dir() else {}
            yield f"{name} merged", partial(tool.merge_lora, checkpoint, **own, **base, **model)


def digests(call: Call) -> dict[str, str] | str:
    """Digest of each file that a conversion writes; the kind of error where it is refused."""
    from ckpt_tools import CkptError

    with tempfile.TemporaryDirectory() as made:
        out = Path(made, "out")
        try:
            call(out)
        except CkptError as error:
            return type(error).__name__
        return {
            path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            for path in sorted(out.rglob("*"))
            if path.is_file() and path.name not in LEFT_OUT
        }


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    sys.exit(main(sys.argv[1:]))
