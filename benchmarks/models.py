"""The models of the benchmarks: their sizes, their names and shapes, and the truth in them.

Knows no checkpoint format. Values are cheap but never constant, and every element follows from
(seed, name, index) alone, so any slice of the truth is recomputed without reading a file.
"""

from __future__ import annotations

import math
import zlib
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import transformers

Floats = npt.NDArray[np.float32]

ARCHITECTURES = {"olmo2": transformers.Olmo2Config, "llama": transformers.LlamaConfig}


@dataclass(frozen=True)
class Size:
    """A model to start from; only `intermediate` is then moved to reach the wanted count."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    vocabulary: int

    def parameters_but_mlp(self) -> int:
        key_value = self.hidden // self.heads * self.key_value_heads
        attention = 2 * self.hidden * (self.hidden + key_value)
        return 2 * self.vocabulary * self.hidden + self.layers * attention

    def parameters(self) -> int:
        return self.parameters_but_mlp() + 3 * self.hidden * self.layers * self.intermediate


# From 1.5e9 on these are OLMo-2's own sizes. The smallest are odd on purpose: they need padding.
SIZES = (
    Size(60, 3, 3, 1, 211, 4001),
    Size(128, 4, 4, 2, 512, 16_384),
    Size(512, 8, 8, 8, 2048, 50_304),
    Size(1024, 12, 16, 16, 4096, 100_352),
    Size(2048, 16, 16, 16, 8192, 100_352),
    Size(4096, 32, 32, 32, 11_008, 100_352),
    Size(5120, 40, 40, 40, 13_824, 100_352),
    Size(5120, 64, 40, 8, 27_648, 100_352),
)


class Values:
    """The truth: element `i` of a tensor depends on the seed, the tensor's name and `i` only."""

    # A prime, so that no shape, shard or buffer size is a multiple of the period.
    BLOCK = 1_048_573

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._block = np.random.default_rng(seed).standard_normal(self.BLOCK, dtype=np.float32)

    def fill(self, name: str, start: int, out: Floats) -> None:
        """Writes elements `start ...` of tensor `name` into `out`."""
        key = zlib.crc32(f"{self._seed}/{name}".encode())
        scale = 0.01 + key % 997 / 50_000
        done = 0
        while done < out.size:
            tile, at = divmod(start + done + key % self.BLOCK, self.BLOCK)
            count = min(self.BLOCK - at, out.size - done)
            # The factor moves with the tile: a slice taken one period off is not the same.
            factor = np.float32(scale * (1 + tile / 1024))
            np.multiply(self._block[at : at + count], factor, out=out[done : done + count])
            done += count

    def take(self, name: str, start: int, stop: int) -> Floats:
        out = np.empty(stop - start, dtype=np.float32)
        self.fill(name, start, out)
        return out


@dataclass(frozen=True)
class Parameter:
    index: int
    name: str
    shape: torch.Size
    start: int  # offset in the concatenation of all parameters, which is how stage 2 cuts them

    @property
    def numel(self) -> int:
        return self.shape.numel()


def choose_config(architecture: str, wanted: int) -> transformers.PretrainedConfig:
    fitting = [size for size in SIZES if size.parameters_but_mlp() < wanted * 0.9]
    if not fitting:
        raise SystemExit(f"the smallest model has {SIZES[0].parameters():,} parameters")
    base = min(fitting, key=lambda size: abs(math.log(size.parameters() / wanted)))
    # Real models have widths that divide well; small ones stay odd so that paddings are seen.
    step = 8 if base.hidden >= 1024 else 1
    exact = (wanted - base.parameters_but_mlp()) / (3 * base.hidden * base.layers)
    intermediate = max(step, round(exact / step) * step)
    config_class = ARCHITECTURES[architecture]
    config: transformers.PretrainedConfig = config_class(
        vocab_size=base.vocabulary,
        hidden_size=base.hidden,
        intermediate_size=intermediate,
        num_hidden_layers=base.layers,
        num_attention_heads=base.heads,
        num_key_value_heads=base.key_value_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        pad_token_id=1,  # the defaults lie outside a small vocabulary
        eos_token_id=2,
        dtype="bfloat16",
    )
    return config


def lay_out(
    config: transformers.PretrainedConfig,
) -> tuple[tuple[Parameter, ...], OrderedDict[str, torch.Tensor]]:
    """The parameters in order, and the state dict of the model on the meta device."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    parameters, start = [], 0
    for index, (name, parameter) in enumerate(model.named_parameters()):
        parameters.append(Parameter(index, name, parameter.shape, start))
        start += parameter.numel()
    state = model.state_dict()
    if list(state) != [parameter.name for parameter in parameters]:
        raise SystemExit("models with buffers or tied weights are not generated")
    config.architectures = [type(model).__name__]
    return tuple(parameters), state
