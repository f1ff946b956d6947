"""The state of a merged model: the updates of an adapter added to the base, name by name.

Owns the pairing of tensors of the base with those of the adapter. Every pair is used, and some
target changes, or the merge is refused. The arithmetic is in :mod:`ckpt_tools.transforms.merge`. Data is read
only to see whether a factor is all zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ckpt_tools.errors import MissingAsset, UnsupportedLayout, UsageError, listed
from ckpt_tools.hub.adapter_config import AdapterConfig
from ckpt_tools.model.adapter import Adapter, state_names, trained_dtype
from ckpt_tools.model.settings import refuse_another_base, refuse_unknown_settings
from ckpt_tools.model.state import DTypeChoice, State
from ckpt_tools.tensors.catalogue import Catalogue, Tensor
from ckpt_tools.tensors.checkpoint import Kind
from ckpt_tools.tensors.dequantise import Dequantised
from ckpt_tools.tensors.derived import cast
from ckpt_tools.tensors.dtypes import DType
from ckpt_tools.tensors.gather import load
from ckpt_tools.transforms.lora import choose_adapter, plain_name
from ckpt_tools.transforms.lora_targets import Factors, Target
from ckpt_tools.transforms.merge import Merged, MergedBias, merged_experts, merged_kernel, with_rows

_TOKENS = "trainable_tokens_delta"


@dataclass(frozen=True)
class _Held:
    """A tensor of the base.

    Attributes:
        tensor: the tensor.
        dtype: its training dtype.
        kind: whether it was trained.
        is_of_run: whether it is from the model that the adapter was trained on, not from a plain base.
    """

    tensor: Tensor
    dtype: DType
    kind: Kind
    is_of_run: bool = True


def merged_state(
    states: Sequence[State],
    *,
    model_ties: Mapping[str, str],
    adapter_state: State | None,
    adapter: str | None,
    configure: Callable[[Adapter], AdapterConfig],
    dtype: DTypeChoice,
) -> State:
    """The state of the base with an adapter merged into it.

    The values that are merged are those that the model trained with: masters are cast to the training
    dtype first. With ``fp32`` and ``keep`` they are taken as stored.

    Args:
        states: the checkpoint, and perhaps a base model to take what it lacks from.
        model_ties: names that the model ties; the states may lack one of two.
        adapter_state: the state that holds the adapter, if it is not the checkpoint.
        adapter: its name, where there are several.
        configure: finds the adapter's config.
        dtype: the dtype of the output.

    Raises:
        DamagedCheckpoint: a pair is incomplete.
        UsageError: the base lacks a target, or a target would stay as it is.
        UnsupportedLayout: the adapter is not LoRA.
    """
    state, *others = states
    base, ties = _base(state, others, model_ties, from_directory=adapter_state is not None)
    source = state if adapter_state is None else adapter_state
    names = state_names(source)
    shapes = {name: held.tensor.shape for name, held in base.items()}
    shapes |= {a: shapes[k] for a, k in ties.items() if k in shapes}
    chosen = Adapter(choose_adapter(names, adapter), source, names, shapes)
    chosen.refuse_empty()
    # A resized embedding is saved with the adapter, and its factors have the new size.
    own = _replacing(chosen, from_directory=adapter_state is not None)
    shapes |= {plain: source.catalogue[name].shape for name, plain in own.items()}
    chosen = replace(chosen, base=shapes)
    config = configure(chosen)
    _refuse_other_tuners(chosen, config)
    _refuse_attention(chosen)
    as_trained = dtype not in ("fp32", "keep")

    def taken(name: str) -> Tensor:
        tensor = source.catalogue[name]
        return cast(tensor, trained_dtype(source, name)) if as_trained else tensor

    def original(name: str) -> _Held:
        held = base[ties.get(name, name)]
        # What a quantiser's library computes is what the model trained with, in fp32 too.
        exact = isinstance(held.tensor, Dequantised) or not as_trained
        return held if exact else replace(held, tensor=cast(held.tensor, held.dtype))

    changed = {
        plain: _Held(taken(name), trained_dtype(source, name), "parameter")
        for name, plain in own.items()
    }
    # A resized model is tied anew, and an update of one name does not reach the other one.
    anew = {plain: changed[plain] for plain in own.values() if not _is_saved_module(plain, config)}
    weights = [target.weight for target in chosen.targets.values() if target.weight is not None]
    refuse_another_base(
        config, [name for name in weights if not base[ties.get(name, name)].is_of_run]
    )
    for pair in chosen.pairs.values():
        target = chosen.targets[pair.module]
        if target.weight is None:
            raise _no_target(target, base)
        held = changed.get(target.weight) or original(target.weight)
        _refuse_codes(target.weight, held.tensor)
        merged = _merge(held.tensor, pair, target, config, taken)
        changed[target.weight] = replace(held, tensor=merged)
        if pair.bias is not None:
            name = f"{target.key}.bias"
            if name not in base and name not in ties:
                raise UnsupportedLayout(
                    f"{target.key} has no bias, so the bias of lora_B cannot be merged",
                    tensor=pair.bias,
                    hint="PEFT cannot merge it either. Use the adapter beside its base (extract-lora).",
                )
            held = changed.get(name) or original(name)
            bias = MergedBias(held.tensor, taken(pair.bias), config.scale(target.key))
            changed[name] = replace(held, tensor=bias)
    # PEFT gives a tied head the trained rows of the embedding.
    for name, indices, rows in _token_rows(chosen, config):
        held = changed.get(name) or original(name)
        _refuse_other_rows(indices, held.tensor, name, config)
        changed[name] = replace(held, tensor=with_rows(held.tensor, taken(rows), indices))
        anew[name] = changed[name]
    for name, held in anew.items():
        kept = ties.get(name, name)
        for other in (kept, *(a for a, k in ties.items() if k == kept)):
            changed.setdefault(other, held)
    unchanged = _unchanged(chosen, taken)
    merged_state = _assembled(base, ties, changed)
    return replace(
        merged_state,
        notes=(*state.notes, *config.notes, *_notes(chosen)),
        warnings=(*state.warnings, *unchanged),
        task=config.task,
    )


def _base(
    state: State,
    others: Sequence[State],
    model_ties: Mapping[str, str],
    *,
    from_directory: bool,
) -> tuple[dict[str, _Held], dict[str, str]]:
    """The base under plain names, and its ties: the checkpoint's own, then what it lacks.

    A name that only the model has keeps its value where an adapter changes the one that is held.
    """
    names = state_names(state).plain
    catalogue = state.catalogue
    base = {
        plain: _Held(
            catalogue[name],
            state.dtypes[name],
            state.kinds[name],
            # A weight that PEFT wraps is of an adapted model, wherever the adapter is from.
            is_of_run=not from_directory or ".base_layer." in name,
        )
        for name, plain in names.items()
        if name in state.dtypes
    }
    ties = {
        names[alias]: names[kept]
        for alias, kept in catalogue.ties.items()
        if alias in names and kept in names and names[alias] != names[kept]
    }
    for other in others:
        for name, tensor in other.catalogue.items():
            if name not in ties and name not in base:
                base[name] = _Held(tensor, other.dtypes[name], "frozen", is_of_run=False)
        for alias, kept in other.catalogue.ties.items():
            if alias not in base and kept in base:
                ties.setdefault(alias, kept)
    for pair in model_ties.items():
        for lacking, there in (pair, pair[::-1]):
            kept = ties.get(there, there)
            if kept in base and lacking not in base and lacking not in ties:
                ties[lacking] = kept
    return base, ties


def _replacing(adapter: Adapter, *, from_directory: bool) -> dict[str, str]:
    """For each tensor that replaces one of the base, the plain name of that.

    These are modules that were saved whole and, in a PEFT directory, every tensor outside the adapter.
    """
    names = dict(adapter.names.plain) if from_directory else {}
    names |= {
        part.name: plain_name(f"{part.module}.{part.tail}")
        for part in adapter.parts
        if part.replaces
    }
    return names


def _is_saved_module(name: str, config: AdapterConfig) -> bool:
    """Whether a tensor of an adapter's file is of a module that the config saves whole."""
    module, saved = name.rpartition(".")[0], config.data.get("modules_to_save") or ()
    return any(f".{module}.".find(f".{each}.") >= 0 for each in saved)


def _merge(
    base: Tensor,
    pair: Factors,
    target: Target,
    config: AdapterConfig,
    taken: Callable[[str], Tensor],
) -> Tensor:
    transposed = target.transposed
    if transposed is None and target.experts == 1:
        # Shapes of square matrices do not tell the orientation; PEFT records it.
        transposed = config.data.get("fan_in_fan_out")
    if transposed is None:
        raise UsageError(
            f"{target.key} is square, so its shape does not tell whether it is stored (in, out) or (out, in)",
            hint="Pass --adapter-config FILE|DIR with PEFT's fan_in_fan_out.",
        )
    a, b, scale = taken(pair.a), taken(pair.b), config.scale(target.key)
    if len(base.shape) == 3 and len(a.shape) == 2:
        return merged_experts(base, a, b, scale, transposed=transposed)
    magnitude = None if pair.magnitude is None else taken(pair.magnitude)
    if len(a.shape) > 2:
        return merged_kernel(base, a, b, scale, magnitude)
    return Merged(base, a, b, scale, transposed, magnitude)


def _token_rows(adapter: Adapter, config: AdapterConfig) -> Iterator[tuple[str, list[int], str]]:
    """For each embedding with trained rows: its name, which rows, and the tensor that holds them."""
    for part in adapter.parts:
        if part.container != _TOKENS:
            continue
        module = plain_name(part.module)
        indices = config.token_indices
        if isinstance(indices, Mapping):
            found = [v for key, v in indices.items() if f".{module}".endswith(f".{key}")]
            # A tied head has the rows of the embedding; the config names only the embedding.
            indices = found[0] if found else next(iter(indices.values()), None)
        rows = adapter.state.catalogue[part.name].shape[0]
        if not isinstance(indices, list) or len(set(indices)) != rows:
            raise MissingAsset(
                f"{rows} rows of {module} are trained, but the adapter's config does not say which",
                path=config.path,
                hint="Pass --adapter-config FILE|DIR, the config that the adapter was trained with.",
            )
        yield f"{module}.weight", indices, part.name


def _refuse_other_rows(
    indices: Sequence[object], base: Tensor, name: str, config: AdapterConfig
) -> None:
    rows = base.shape[0]
    odd = [index for index in indices if type(index) is not int or not 0 <= index < rows]
    if odd:
        raise UsageError(
            f"the adapter trains rows that the base does not have: {listed(odd)}, of {rows} rows",
            path=config.path,
            tensor=name,
            hint="Where the training run resized the vocabulary, merge its checkpoint, or take as the base "
            "the resized model that was trained.",
        )


def _refuse_other_tuners(adapter: Adapter, config: AdapterConfig) -> None:
    odd = [
        part.name
        for part in adapter.parts
        if not (part.is_lora or part.replaces or part.container == _TOKENS)
    ]
    if odd:
        raise UnsupportedLayout(
            f"adapter {adapter.name!r} is not plain LoRA or DoRA: {listed(odd)}",
            hint="Write it as an adapter with extract-lora; PEFT's merge_and_unload may merge that.",
        )
    refuse_unknown_settings(config)


def _refuse_attention(adapter: Adapter) -> None:
    """Refuse ``nn.MultiheadAttention``: PEFT adds the update of its output projection twice."""
    keys = {target.key for target in adapter.targets.values()}
    for key in keys:
        if f"{key}.out_proj" in keys:
            raise UnsupportedLayout(
                f"LoRA on torch.nn.MultiheadAttention is not merged: {key}",
                hint="Write the adapter with extract-lora; PEFT's merge_and_unload merges it.",
            )


def _refuse_codes(name: str, tensor: Tensor) -> None:
    """Refuse a target whose elements are no values but codes."""
    if not tensor.dtype.is_floating or tensor.dtype.itemsize < 2:
        raise UnsupportedLayout(
            f"an update cannot be added to a weight of {tensor.dtype}",
            tensor=name,
            hint="Pass --base DIR with the 16-bit model.",
        )


def _unchanged(adapter: Adapter, taken: Callable[[str], Tensor]) -> list[str]:
    """A warning about targets that do not change, because a factor is zero, and so is ``B A``.

    A layer that no step reached keeps the zeros that it started with: a vision tower in text-only training,
    an expert that no token chose.

    Raises:
        UsageError: no target changes.
    """
    unchanged = [
        adapter.targets[pair.module].key
        for pair in adapter.pairs.values()
        if pair.magnitude is None
        and not all(bool(load(taken(name)).any()) for name in (pair.b, pair.a))
    ]
    if unchanged and len(unchanged) == len(adapter.pairs):
        raise UsageError(
            f"merging would not change any of {len(adapter.pairs)} targets, because "
            f"a factor of each is all zeros: {listed(unchanged)}",
            hint="The adapter was saved before it was trained. Is it the right checkpoint (--tag)?",
        )
    if not unchanged:
        return []
    count = f"{len(unchanged)} of {len(adapter.pairs)}"
    return [f"{count} targets do not change, because a factor is all zeros: {listed(unchanged)}"]


def _no_target(target: Target, base: Mapping[str, _Held]) -> UsageError:
    fact = f"the base has no weight of {target.key}"
    weights = [name for name, held in base.items() if len(held.tensor.shape) > 1]
    if not weights:
        return MissingAsset(
            f"{fact}: the checkpoint holds no weight of the base",
            hint="The base was left out of it. --base DIR takes the base from a Hugging Face directory.",
        )
    inside = [name for name in weights if name.startswith(f"{target.key}.")]
    if inside:
        return UsageError(
            f"{fact}: the adapter was trained on one tensor, and the base has parts of it: {listed(inside)}",
            hint="Pass --config with the config of the base, which says how the parts are joined. If it was "
            "found, let PEFT merge it: PeftModel.from_pretrained, merge_and_unload.",
        )
    return UsageError(
        f"{fact}; its weights are called {listed(weights)}",
        hint="The base is another model, or a part of it was left out. Pass --base DIR with the directory "
        "that the adapter was trained on.",
    )


def _assembled(
    base: Mapping[str, _Held], ties: Mapping[str, str], changed: Mapping[str, _Held]
) -> State:
    """The base with the changes. If one of two tied names changes, the other keeps its value."""
    held = {name: changed.get(name, held) for name, held in base.items()}
    still: dict[str, str] = {}
    for alias, kept in ties.items():
        if alias in changed:
            held[alias] = changed[alias]
        elif kept in changed:
            held[alias] = base[kept]
        else:
            still[alias] = kept
    held |= changed
    of_base = {name for name, h in held.items() if not h.is_of_run and name not in changed}
    return State(
        Catalogue({name: h.tensor for name, h in held.items()}, still),
        {name: h.dtype for name, h in held.items()},
        {name: h.kind for name, h in held.items()},
        of_base=frozenset(of_base | {a for a, kept in still.items() if kept in of_base}),
    )


def _notes(adapter: Adapter) -> list[str]:
    replaced = len({part.module for part in adapter.parts if part.replaces})
    dora = sum(pair.magnitude is not None for pair in adapter.pairs.values())
    notes = [
        f"merged adapter {adapter.name!r}: {len(adapter.pairs)} of {len(adapter.pairs)} LoRA pairs"
        + (f" ({dora} DoRA)" if dora else "")
        + (f", {replaced} modules replaced whole" if replaced else "")
    ]
    others = [name for name in adapter.names.adapters if name != adapter.name]
    if others:
        notes.append(f"left out: adapters {listed(others)}")
    if adapter.names.outside:
        notes.append(
            f"left out, because they are outside the adapted model: {listed(adapter.names.outside)}"
        )
    return notes
