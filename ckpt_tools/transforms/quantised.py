"""Weights that a quantiser stored: found by their tensors, and made plain.

Owns the names and dtypes by which each quantiser is known. A weight that is stored so is several tensors: its
codes, and scales or states beside them. Which settings a scheme needs is read from the tensors where they
have them, and from ``quantization_config`` where only that has them. What is not on the list is refused.

Sources: ``bitsandbytes/functional.py`` (``QuantState.as_dict``), ``nn/modules.py`` (``SCB``,
``weight_format``), ``compressed_tensors/compressors``, ``auto_gptq/nn_modules/qlinear``,
``awq/modules/linear``, ``transformers/integrations/finegrained_fp8.py`` and ``mxfp4.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckpt_tools.errors import DamagedCheckpoint, UnsupportedLayout
from ckpt_tools.tensors.catalogue import Tensor
from ckpt_tools.tensors.dequantise import Dequantised, Setting, fits
from ckpt_tools.tensors.derived import view
from ckpt_tools.tensors.dtypes import BFLOAT16, BY_NAME, FLOAT32, DType
from ckpt_tools.tensors.gather import load

_QUANT_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
# bitsandbytes keeps these beside a four-bit weight, under the name of the weight.
_4BIT = {
    "absmax": "absmax",
    # The table of the codes, which is always the same.
    "quant_map": "table",
    "nested_absmax": "nested_absmax",
    "nested_quant_map": "nested_map",
}
# Scales of activations, which no weight needs.
_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
# Those of queries, keys and values lie beside the projections. Such a last name alone tells no quantiser.
_ATTENTION = tuple(f"{one}_{kind}" for one in "qkv" for kind in ("scale", "zero_point"))
_STATIC = "activation_scale"
# Last names of tensors that only quantisers keep.
_SIDES = frozenset(
    {"absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB", "weight_format"}
    | {"weight_scale_inv", "weight_scale", "weight_zero_point", "weight_packed", "weight_shape"}
    | {"weight_g_idx", "weight_global_scale", "input_global_scale", "qweight", "qzeros", "g_idx"}
    | {"W_q", "bitsandbytes__nf4", "bitsandbytes__fp4", "_data", "_scale", "qscales"}
    | {*_ACTIVATIONS}
)
_EIGHT_BITS = ("int8", "uint8", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")
_NAIVE = ("naive-quantized", "float-quantized", "int-quantized")
PLAIN_ELSEWHERE = (
    "merge-lora takes the 16-bit weights of another directory with --base DIR. Without one, load the model "
    "with the library that quantised it, dequantise it there, and save that."
)


@dataclass(frozen=True)
class Packed:
    """One weight as a quantiser stores it.

    Attributes:
        weight: the name of the plain weight.
        method: the quantiser, in its own words.
        parts: its tensors by their role; the names are those of the state.
    """

    weight: str
    method: str
    parts: Mapping[str, str]


def find_packed(tensors: Mapping[str, Tensor]) -> dict[str, Packed]:
    """The weights that are stored quantised, by name, whether they can be dequantised or not."""
    found: dict[str, Packed] = {}
    for name, tensor in tensors.items():
        packed = _packed(name, tensor, tensors)
        if packed is not None:
            found[packed.weight] = packed
    return found


def storage_names(tensors: Mapping[str, Tensor]) -> set[str]:
    """The names of every tensor that is a quantiser's: codes, scales, states."""
    named = {part for packed in find_packed(tensors).values() for part in packed.parts.values()}
    return named | {name for name in tensors if name.rpartition(".")[2] in _SIDES}


def _packed(name: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> Packed | None:
    state = _QUANT_STATE.fullmatch(name)
    module, _, last = name.rpartition(".")

    def beside(prefix: str, roles: Mapping[str, str]) -> dict[str, str]:
        names = {role: f"{prefix}{end}" for end, role in roles.items()}
        return {role: found for role, found in names.items() if found in tensors}

    if state is not None:
        weight = state[1]
        parts = {"codes": weight, "state": name, **beside(f"{weight}.", _4BIT)}
        return Packed(weight, "bitsandbytes 4-bit", parts)
    weight = f"{module}.weight"
    activations = beside(f"{module}.", {end: end for end in _ACTIVATIONS})
    around, dot, _ = module.rpartition(".")
    activations |= beside(f"{around}{dot}", {end: end for end in _ATTENTION})
    if last == "SCB" and weight in tensors:
        parts = {
            "codes": weight,
            "scale": name,
            **beside(f"{module}.", {"weight_format": "format"}),
        }
        return Packed(weight, "bitsandbytes 8-bit", parts)
    if name.endswith("_scale_inv") and name.removesuffix("_scale_inv") in tensors:
        weight = name.removesuffix("_scale_inv")
        before = weight.removesuffix("weight") if weight.endswith(".weight") else f"{weight}_"
        static = beside(before, {_STATIC: _STATIC})
        return Packed(weight, "fp8", {"codes": weight, "scale": name, **activations, **static})
    if last == "weight_scale" and weight in tensors:
        points = beside(f"{module}.", {"weight_zero_point": "zero_point", "weight_g_idx": "order"})
        parts = {"codes": weight, "scale": name, **points, **activations}
        return Packed(weight, "compressed-tensors", parts)
    if last == "weight_packed":
        ends = ("scale", "shape", "zero_point", "g_idx", "global_scale")
        sides = beside(f"{module}.", {f"weight_{end}": end for end in ends})
        return Packed(
            weight, "compressed-tensors (packed)", {"codes": name, **sides, **activations}
        )
    if last == "qweight":
        sides = beside(f"{module}.", {end: end for end in ("qzeros", "scales", "g_idx")})
        method = _method_of(tensor, {role: tensors[part] for role, part in sides.items()})
        return Packed(weight, method, {"codes": name, **sides})
    if name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in tensors:
        weight = name.removesuffix("_blocks")
        if tensor.dtype.name == "uint8" and len(tensor.shape) == 4:
            return Packed(weight, "mxfp4", {"blocks": name, "scales": f"{weight}_scales"})
    if last == "weight" and tensor.dtype.name in _EIGHT_BITS and not _has_sides(name, tensors):
        return Packed(name, f"an unknown quantiser ({tensor.dtype})", {"codes": name})
    return None


def _method_of(codes: Tensor, sides: Mapping[str, Tensor]) -> str:
    """GPTQ packs rows and AWQ columns; the scales have a column for each of the weight's."""
    columns = sides["scales"].shape[-1:] if "scales" in sides else ()
    if "g_idx" in sides or columns == codes.shape[-1:]:
        return "GPTQ"
    return "AWQ" if columns and columns > codes.shape[-1:] else "GPTQ or AWQ"


def _has_sides(weight: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether another tensor says how this weight is stored."""
    module = weight.rpartition(".")[0]
    sides = (f"{module}.SCB", f"{weight}_scale", f"{weight}_scale_inv")
    states = (f"{weight}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
    return any(side in tensors for side in (*sides, *states))


def dequantised(
    packed: Packed, tensors: Mapping[str, Tensor], quantizer: Mapping[str, Any], dtype: DType
) -> Tensor:
    """The plain weight, as the library that stored it dequantises it.

    Args:
        packed: how it is stored.
        tensors: the tensors of the state.
        quantizer: the ``quantization_config`` of the model; empty where there is none.
        dtype: the dtype of the model, for schemes that round to it.

    Raises:
        UnsupportedLayout: it is stored in a way that is not dequantised here.
        DamagedCheckpoint: its tensors do not fit each other.
    """
    parts = {role: tensors[name] for role, name in packed.parts.items()}
    try:
        match packed.method:
            case "bitsandbytes 4-bit":
                made = _of_4bit(packed, parts)
            case "bitsandbytes 8-bit":
                made = _of_8bit(packed, parts)
            case "fp8":
                made = _of_fp8(packed, parts, quantizer, dtype)
            case "compressed-tensors":
                made = _of_compressed(packed, parts, quantizer)
            case "mxfp4":
                made = _of_mxfp4(parts)
            case _:
                raise _refused(packed, "this way of storing weights is not dequantised here")
        fitting = fits(made)
    except (KeyError, TypeError, ValueError, IndexError):
        fitting = False
    if not fitting:
        raise DamagedCheckpoint(
            f"the tensors of its {packed.method} storage do not fit each other",
            tensor=packed.weight,
            hint=PLAIN_ELSEWHERE,
        )
    if packed.method != "mxfp4":
        return made
    # transformers keeps these matrices transposed.
    experts, rows, columns = made.shape
    return view(made, 0, (experts, columns, rows), (rows * columns, 1, columns))


def _of_4bit(packed: Packed, parts: Mapping[str, Tensor]) -> Dequantised:
    if parts["codes"].shape[0] == 1 and parts["codes"].numel > 1:
        raise _refused(packed, "it is stored transposed, which is not dequantised here")
    state = json.loads(bytes(load(parts["state"]).tolist()))
    settings: dict[str, Setting] = {
        "block": int(state["blocksize"]),
        "kind": state["quant_type"],
    }
    used = {role: parts[role] for role in ("codes", "absmax")}
    if "nested_absmax" in parts:
        used |= {role: parts[role] for role in ("nested_absmax", "nested_map")}
        # bitsandbytes keeps the offset in fp32.
        offset = load_float(state["nested_offset"])
        if any(used[role].dtype != FLOAT32 for role in ("nested_absmax", "nested_map")):
            raise _refused(packed, "its nested scales are not of fp32")
        settings |= {
            "nested_block": int(state["nested_blocksize"]),
            "nested_dtype": state["nested_dtype"],
            "offset": offset,
        }
    shape = tuple(int(size) for size in state["shape"])
    return Dequantised("bitsandbytes-4bit", used, settings, shape, BY_NAME[state["dtype"]])


def load_float(value: object) -> float:
    """A number rounded to fp32."""
    import torch

    return float(torch.tensor(float(str(value)), dtype=torch.float32))


def _of_8bit(packed: Packed, parts: Mapping[str, Tensor]) -> Dequantised:
    if "format" in parts and int(load(parts["format"])) != 0:
        raise _refused(packed, "its weight_format is not row-major, and only that is dequantised")
    used = {role: parts[role] for role in ("codes", "scale")}
    return Dequantised("bitsandbytes-8bit", used, {}, parts["codes"].shape, FLOAT32)


def _of_fp8(
    packed: Packed, parts: Mapping[str, Tensor], quantizer: Mapping[str, Any], dtype: DType
) -> Dequantised:
    codes, scale = parts["codes"], parts["scale"]
    method = quantizer.get("quant_method")
    if method != "fp8":
        raise _refused(packed, f"quantization_config names the method {method!r}, not 'fp8'")
    if codes.dtype.name not in ("float8_e4m3fn", "float8_e5m2") or not _is_plain(scale):
        raise _refused(packed, f"codes of {codes.dtype} and scales of {scale.dtype} are not known")
    # 128 x 128 is the default of transformers and DeepSeek.
    rows, columns = quantizer.get("weight_block_size") or (128, 128)
    if scale.numel == 1:
        rows, columns = codes.shape[-2:]
    elif scale.shape != (
        *codes.shape[:-2],
        -(-codes.shape[-2] // rows),
        -(-codes.shape[-1] // columns),
    ):
        raise ValueError("the scales are not those of the blocks")
    settings: dict[str, Setting] = {"rows": rows, "columns": columns, "within": "float32"}
    return Dequantised("scaled", {"codes": codes, "scale": scale}, settings, codes.shape, dtype)


def _of_compressed(
    packed: Packed, parts: Mapping[str, Tensor], quantizer: Mapping[str, Any]
) -> Dequantised:
    codes, scale = parts["codes"], parts["scale"]
    method, form = quantizer.get("quant_method"), quantizer.get("format")
    if method != "compressed-tensors" or form not in _NAIVE:
        raise _refused(packed, f"quantization_config names method {method!r} and format {form!r}")
    if "order" in parts:
        raise _refused(packed, "columns in another order (weight_g_idx) are not dequantised here")
    if codes.dtype.name not in ("float8_e4m3fn", "int8") or not _is_plain(scale):
        raise _refused(packed, f"codes of {codes.dtype} and scales of {scale.dtype} are not known")
    rows, columns = codes.shape[-2:]
    if scale.numel > 1:
        high, wide = scale.shape[-2:]
        if high == rows and not columns % wide:
            rows, columns = 1, columns // wide
        else:
            groups = quantizer.get("config_groups", {}).values()
            (block,) = {tuple(group["weights"]["block_structure"]) for group in groups}
            if (high, wide) != (-(-rows // block[0]), -(-columns // block[1])):
                raise ValueError("the scales are not those of the blocks")
            rows, columns = block
    used = {role: parts[role] for role in ("codes", "scale", "zero_point") if role in parts}
    settings: dict[str, Setting] = {"rows": rows, "columns": columns, "within": scale.dtype.name}
    return Dequantised("scaled", used, settings, codes.shape, scale.dtype)


def _of_mxfp4(parts: Mapping[str, Tensor]) -> Dequantised:
    experts, rows, groups, half = parts["blocks"].shape
    return Dequantised("mxfp4", dict(parts), {}, (experts, rows, groups * half * 2), BFLOAT16)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype.is_floating and tensor.dtype.itemsize > 1


def _refused(packed: Packed, why: str) -> UnsupportedLayout:
    return UnsupportedLayout(
        f"the weight is quantised ({packed.method}), and {why}",
        tensor=packed.weight,
        hint=PLAIN_ELSEWHERE,
    )
