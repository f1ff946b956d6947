"""Merged directories beside what PEFT makes of the same live values on the spot.

PEFT's sums are computed twice. In fp64 they tell the exact merge to some 15 digits, whatever the processor; a
merged tensor must be that, rounded. In fp32 they are what a user of PEFT gets; where all products and sums
are exact in fp32, the order of the sums makes no difference, and every bit must be the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.support.models import State
from tests.support.peft_models import live_adapted, merged_by_peft, rounded

SINGLE = "model.safetensors"
# Of the largest element of a tensor. Each of two fp64 merges is off by at most
# (n + r + 6) 2**-53 (|W| + |s| sum |b a|), where DoRA's norms add n, the length of a row; see
# ckpt_tools.transforms.merge. In the fixtures n and r are below 128 and 8, and no sum of magnitudes is
# 16 times the largest element.
_FP64_ERROR = 2.0**-40
FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


def assert_merged(out: Path, source: Path, adapter: str, scratch: Path) -> None:
    """Assert that a directory is PEFT's exact merge of a fixture's live model, rounded to its dtype.

    Names, shapes, dtypes and their order in the file are those that ``save_pretrained`` writes. What is not
    merged has the live bits.
    """
    model = live_adapted(source)
    dtype = model.get_base_model().get_input_embeddings().weight.dtype
    merged = merged_by_peft(model, adapter, torch.float64)
    rounded(source, merged, torch.float64).save_pretrained(scratch / "exact")
    rounded(source, merged, dtype).save_pretrained(scratch / "rounded")

    assert _header(out / SINGLE) == _header(scratch / "rounded" / SINGLE)
    assert ties(out) == ties(scratch / "rounded")
    assert_all_rounded(load_file(out / SINGLE), load_file(scratch / "exact" / SINGLE))


def assert_all_rounded(found: State, exact: State) -> None:
    """Assert that a state is a merge in fp64, rounded.

    A tensor that needs no rounding must be the same bit for bit.
    """
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        nearest = value.float().to(found[name].dtype)
        if torch.equal(nearest.double(), value):
            assert torch.equal(found[name], nearest), name
        else:
            assert_rounded(found[name], value, float(value.abs().max()) * _FP64_ERROR)


def assert_rounded(found: torch.Tensor, exact: torch.Tensor, error: float | torch.Tensor) -> None:
    """Assert that each element is one of those to which numbers within ``error`` of ``exact`` are rounded.

    Rounding is by way of fp32, as a merge is rounded.
    """
    low, high = ((exact + sign * error).float().to(found.dtype) for sign in (-1, 1))
    outside = (found < low) | (found > high)
    assert not outside.any(), f"{int(outside.sum())} of {outside.numel()} elements"


def with_exact_factors(state: State) -> dict[str, torch.Tensor]:
    """A live state whose LoRA factors are small integers over 64: ``B A`` is exact in fp32 in any order."""
    generator = torch.Generator().manual_seed(2)

    def small(value: torch.Tensor) -> torch.Tensor:
        return torch.randint(-8, 9, value.shape, generator=generator).to(value.dtype) / 64

    return {
        name: small(value) if set(FACTORS) & set(name.split(".")) else value
        for name, value in state.items()
    }


def merged_in_fp32(source: Path, adapter: str, state: State) -> Any:
    """PEFT's fp32 merge of a fixture's model with other values, rounded once to its dtype."""
    model = live_adapted(source, state)
    dtype = model.get_base_model().get_input_embeddings().weight.dtype
    return rounded(source, merged_by_peft(model, adapter, torch.float32), dtype)


def ties(directory: Path) -> bool:
    """Whether the config of a directory ties the embeddings."""
    return bool(json.loads((directory / "config.json").read_text())["tie_word_embeddings"])


def _header(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]
