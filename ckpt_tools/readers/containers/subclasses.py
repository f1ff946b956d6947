"""Owns what stands in a state dict in place of a plain tensor: wrappers, subclasses, sparse and other kinds.

A wrapper that adds behaviour to one plain tensor is read as that tensor. Every other kind is refused by its
name. The wrappers are listed here, because only their source tells that the inner tensor is the weight.

Sources: ``torch/_utils.py`` (the functions that rebuild each kind), ``torch/_tensor.py``
(``_reduce_ex_internal``), torchao 0.18 (``float8/fsdp_utils.py``, ``prototype/quantized_training``,
``prototype/moe_training/tensor.py``, ``quantization/qat/affine_fake_quantized_tensor.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt_tools.errors import CkptError, DamagedCheckpoint, UnsafePickle, UnsupportedLayout
from ckpt_tools.readers.containers.pickled import (
    LazyTensor,
    Opaque,
    TensorRef,
    UnknownTensor,
)

SUBCLASS = "torch._utils._rebuild_wrapper_subclass"
# torchao's wrappers, each with the attribute that is the weight in the precision of the optimizer.
_WRAPPERS = {
    "WeightWithDynamicFloat8CastTensor": "_tensor",
    "WeightWithDelayedFloat8CastTensor": "_tensor",
    "WeightWithStaticFloat8CastTensor": "_tensor",
    "Int8MixedPrecisionTrainingLinearWeight": "_data",
    "BitNetTrainingLinearWeight": "_data",
    "TrainingWeightWrapperBaseTensor": "_data",
    "Float8TrainingWeightWrapperTensor": "_data",
    "MXFP8TrainingWeightWrapperTensor": "_data",
    "ScaledGroupedMMTensor": "_data",
    "AffineFakeQuantizedTensor": "original_tensor",
    "_AffineFakeQuantizedTensor": "original_tensor",
    "ActivationLoggingTensor": "original_weight_tensor",
}
_MOST_NESTED = 8
_DENSE = "Call to_dense() on it in the training script, and save again."
_DEQUANTIZE = (
    "Load the state dict in Python with its library installed (a distributed checkpoint into the quantised "
    "model), replace each such tensor by tensor.dequantize(), and save it with torch.save."
)
_CAST = "Cast it to another dtype in the training script, and save again."
_PACKED = (
    "torch cannot cast it. Save tensor.view(torch.uint8) in its place, which has the same bytes."
)
_PLAIN = "Replace it by a plain tensor in the training script, and save the state dict again."
_KINDS = {
    "torch._utils._rebuild_sparse_tensor": ("a sparse tensor", _DENSE),
    "torch._utils._rebuild_sparse_csr_tensor": ("a sparse tensor", _DENSE),
    "torch._utils._rebuild_mkldnn_tensor": ("an mkldnn tensor", _DENSE),
    "torch._utils._rebuild_qtensor": ("a quantised tensor of torch", _DEQUANTIZE),
    "torch._utils._rebuild_nested_tensor": (
        "a nested tensor",
        "Save the tensors of its unbind() under names of their own.",
    ),
    "torch._utils._rebuild_meta_tensor_no_storage": (
        "a tensor on the meta device, which has no values",
        "The model was not initialised on the rank that saved it. Save it again after it got its weights.",
    ),
    "torch._utils._rebuild_device_tensor_from_numpy": (
        "a tensor that another device saved as an array of numpy",
        "Move it to the CPU in the training script, and save again.",
    ),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": (
        "a tensor of a device of its own",
        "Move it to the CPU in the training script, and save again.",
    ),
}


def class_of(value: object) -> str | None:
    """The full name of the class of a tensor subclass in a pickle; None for all other values."""
    if isinstance(value, Opaque) and value.global_name == SUBCLASS and value.args:
        return str(getattr(value.args[0], "global_name", "")) or None
    return None


def plain(value: object, path: Path, name: str) -> TensorRef | None:
    """The plain tensor that a value is, or that it wraps.

    Args:
        value: an entry of a state dict.
        path: the file, for errors.
        name: the name of the tensor, for errors.

    Returns:
        The tensor, or None if the value has nothing of a tensor.

    Raises:
        UnsupportedLayout: it is a tensor of another kind; the error names it.
        UnsafePickle: it is an object that only code from the file can build.
    """
    for _ in range(_MOST_NESTED):
        if isinstance(value, TensorRef):
            return value
        if not isinstance(value, Opaque):
            return None
        value = _unwrapped(value, path, name)
    raise DamagedCheckpoint("its wrappers are nested too deeply", path=path, tensor=name)


def _unwrapped(value: Opaque, path: Path, name: str) -> object:
    """The tensor in a wrapper of the list.

    Raises:
        CkptError: it is of another kind.
    """
    kind = class_of(value)
    package, _, called = (kind or "").rpartition(".")
    attribute = _WRAPPERS.get(called) if package.split(".")[0] == "torchao" else None
    if attribute is None:
        raise refusal(value, path, name)
    state = value.state[0] if isinstance(value.state, tuple) and value.state else value.state
    inner = state.get(attribute) if isinstance(state, Mapping) else None
    stated = value.args[1:3]
    found = (inner.dtype, inner.shape) if isinstance(inner, TensorRef) else stated
    if inner is None or found != stated:
        raise UnsupportedLayout(
            f"a {kind} whose {attribute} is not a tensor of its dtype and shape",
            path=path,
            tensor=name,
            hint=_PLAIN,
        )
    return inner


def refusal(value: Opaque, path: Path, name: str) -> CkptError:
    """The error for a tensor that is not plain, or for an object in place of one."""
    if isinstance(value, UnknownTensor):
        dtype = _dtype_of(value)
        return UnsupportedLayout(
            f"its dtype is {dtype}, which ckpt-tools does not read",
            path=path,
            tensor=name,
            hint=_PACKED if "float4" in dtype else _CAST,
        )
    if isinstance(value, LazyTensor):
        return UnsupportedLayout(
            "torch stores it with a conjugate or negative bit, so its elements are not the stored ones",
            path=path,
            tensor=name,
            hint="Call resolve_conj() and resolve_neg() on it in the training script, and save again.",
        )
    kind = class_of(value)
    if kind is not None:
        library = kind.split(".")[0]
        hint = _DEQUANTIZE if library == "torchao" else _PLAIN
        return UnsupportedLayout(
            f"a tensor of the class {kind}, not a plain tensor", path=path, tensor=name, hint=hint
        )
    known = _KINDS.get(value.global_name)
    if known is not None:
        return UnsupportedLayout(known[0], path=path, tensor=name, hint=known[1])
    return UnsafePickle(
        f"it is not a plain tensor but a {value.global_name}",
        path=path,
        tensor=name,
        hint="No code from the file was run. If it is a weight, please report its layout.",
    )


def _dtype_of(value: UnknownTensor) -> str:
    storage, *_, dtype = value.args
    if dtype is None and isinstance(storage, Opaque) and len(storage.args) > 1:
        dtype = storage.args[1]
    name: Any = getattr(dtype, "global_name", dtype)
    return str(name)
