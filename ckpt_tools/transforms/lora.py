"""Owns the names of adapted models: which tensors belong to an adapter, and their names in PEFT's files.

PEFT wraps a module in place, so a training state mixes three kinds of names under ``base_model.model.``:
adapter tensors, with the adapter's name after a container (``q_proj.lora_A.default.weight``); tensors of
wrapped modules, with one more segment (``q_proj.base_layer.weight``); and all others, unchanged. An adapter
directory holds the first kind without the adapter's name, and a few of the others.

Sources: ``peft/utils/save_and_load.py`` (``get_peft_model_state_dict``), ``peft/tuners/tuners_utils.py``
(``_remove_adapter_name_from_state_dict_key``), ``peft/tuners/lora/model.py`` (the magnitude vector).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ckpt_tools.errors import UsageError, tensors

PREFIX = "base_model.model."
# The segments that PEFT puts between a module and its original tensors.
_WRAPPERS = frozenset({"base_layer", "original_module", "token_adapter"})
_LORA = frozenset(
    {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}
)
# Prefixes of container names in the tuners of PEFT 0.21 (``prefix`` of each tuner). modules_to_save and
# prompts are separate.
_CONTAINERS = (
    *("adamss_", "beft_", "boft_", "c3a_", "deft_", "delora_", "fourierft_", "frod_", "glora_"),
    *("gralora_", "hira_", "hra_", "ia3_", "lily_", "ln_tuning_", "hada_", "lokr_", "lora_"),
    *("miss_", "oft_", "osf_", "peanut_", "poly_", "psoft_", "pvera_", "randlora_", "road_"),
    *("shadow_", "shira_", "supertuning_", "tinylora_", "trainable_tokens_", "unilora_"),
    *("vblora_", "vera_", "waveft_"),
)
_SAVED_MODULES = "modules_to_save"
_PROMPTS = "prompt_encoder"
# They have no adapter's name. The state holds adaption prompts of the active adapter alone, and one
# classifier mixes the adapters of X-LoRA.
_UNNAMED = ("adaption_gate", "adaption_prompt", "internal_xlora_classifier")
# The beginning of the segment that makes a tensor one of an adapter.
_ANY_CONTAINER = re.compile(
    rf"(?:^|\.)(?:{'|'.join((*_UNNAMED, _SAVED_MODULES, _PROMPTS, *_CONTAINERS))})"
)
# FRoD keeps the projections that layers share by kind of module, and the adapter's name comes last.
_SHARED_BY_KIND = ("frod_V", "frod_s_indices", "frod_s_size")
# Modules that get_input_embeddings and get_output_embeddings of a language model name.
_EMBEDDINGS = frozenset({"embed_tokens", "lm_head", "wte", "embed_in", "embed_out"})


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of an adapter.

    Attributes:
        name: its name in the state.
        module: the wrapped module, below ``base_model.model.``.
        container: the segment that holds it, such as ``lora_A``.
        adapter: the adapter's name.
        tail: the rest of the name, such as ``weight``; may be empty.
    """

    name: str
    module: str
    container: str
    adapter: str
    tail: str

    @property
    def is_lora(self) -> bool:
        """Whether it is one of the tensors that LoRA or DoRA computes with."""
        return self.container in _LORA

    @property
    def replaces(self) -> bool:
        """Whether it replaces a tensor of the base (``modules_to_save``)."""
        return self.container == _SAVED_MODULES

    @property
    def saved(self) -> str:
        """Its name in the adapter's file.

        DoRA's vector became a module in PEFT 0.10; the file still has it without ``.weight``.
        """
        if self.container == _PROMPTS and self.tail == "embedding.weight":
            return "prompt_embeddings"
        kept = () if self.replaces else (self.container,)
        tail = "" if self.container == "lora_magnitude_vector" else self.tail
        return PREFIX + ".".join(filter(None, (self.module, *kept, tail)))

    @property
    def copied(self) -> str:
        """Its name where PEFT copies a whole module: without the adapter's name, and no other change."""
        return PREFIX + ".".join(filter(None, (self.module, self.container, self.tail)))


@dataclass(frozen=True)
class AdaptedNames:
    """The names of a state, sorted into adapters and base.

    Attributes:
        adapters: the tensors of each adapter, by its name.
        base: for each other name of the model, the name below ``base_model.model.``, with wrappers.
        outside: names that are not below the adapted model, such as another part of a composite.
        live: every name of the adapted model, as in that model alone.
    """

    adapters: Mapping[str, tuple[Part, ...]]
    base: Mapping[str, str]
    outside: tuple[str, ...]
    live: Mapping[str, str]

    @property
    def plain(self) -> dict[str, str]:
        """For each base name of the state, the name in a model that was never adapted."""
        return {name: plain_name(inner) for name, inner in self.base.items()}


def adapted_names(names: Iterable[str]) -> AdaptedNames:
    """Sort the names of a state, second names of tied tensors included.

    Segments before ``base_model.model.`` (an attribute of a composite) are removed. So is a second
    ``base_model.model.`` of a model that was wrapped twice.

    Raises:
        UsageError: there are adapters under several prefixes.
    """
    names = list(names)
    roots = {name: root for name in names if _container(name) and (root := _root(name)) is not None}
    found = sorted(set(roots.values()))
    if len(found) > 1:
        raise UsageError(
            f"adapters in {len(found)} models: {', '.join(root or 'the whole model' for root in found)}",
            hint="ckpt-tools writes one adapted model at a time.",
        )
    # A state without adapters can still be a base with wrapped names.
    root = found[0] if found else ("" if any(n.startswith(PREFIX) for n in names) else None)
    adapters: dict[str, list[Part]] = {}
    base: dict[str, str] = {}
    outside: list[str] = []
    live: dict[str, str] = {}
    for name in names:
        inner = _inner(name, root)
        part = _part(name, inner or name)
        if inner is not None or part is not None:
            live[name] = name.removeprefix(root or "") if inner is None else PREFIX + inner
        if part is not None:
            adapters.setdefault(part.adapter, []).append(part)
        elif inner is not None:
            base[name] = inner
        else:
            outside.append(name)
    sorted_parts = {adapter: tuple(parts) for adapter, parts in adapters.items()}
    return AdaptedNames(sorted_parts, base, tuple(outside), live)


def adapter_of(name: str) -> str | None:
    """The adapter that a tensor belongs to; None for a tensor of the base."""
    part = _part(name, name)
    return None if part is None else part.adapter


def is_adapted(names: Iterable[str]) -> bool:
    """Whether a state holds LoRA tensors."""
    return any(segment in _LORA for name in names for segment in name.split("."))


def plain_name(inner: str) -> str:
    """The name of a base tensor without PEFT's wrappers."""
    return ".".join(segment for segment in inner.split(".") if segment not in _WRAPPERS)


def choose_adapter(adapted: AdaptedNames, name: str | None) -> str:
    """The requested adapter; the only one if none is named.

    Raises:
        UsageError: there is no adapter, none with this name, or several and none is named.
    """
    if not adapted.adapters:
        raise UsageError(
            "the checkpoint holds no adapter",
            hint="Use ckpt-tools consolidate for a model without an adapter. If PEFT saved the adapter in "
            "a directory of its own, name it: ckpt-tools merge-lora --adapter-dir DIR.",
        )
    listed = ", ".join(f"{a} ({tensors(len(parts))})" for a, parts in adapted.adapters.items())
    if name is None:
        if len(adapted.adapters) > 1:
            raise UsageError(
                f"the checkpoint holds {len(adapted.adapters)} adapters",
                hint=f"Choose one with --adapter: {listed}.",
            )
        return next(iter(adapted.adapters))
    if name not in adapted.adapters:
        raise UsageError(
            f"there is no adapter {name!r}", hint=f"Choose one with --adapter: {listed}."
        )
    return name


def saved_names(
    adapted: AdaptedNames,
    adapter: str,
    *,
    bias: str,
    embeddings: Mapping[str, str],
    aliases: Mapping[str, str],
) -> dict[str, str]:
    """For each tensor that PEFT writes for a LoRA adapter, the name of the tensor in the state.

    Args:
        adapted: the names of the state.
        adapter: which adapter.
        bias: ``none``, ``all`` or ``lora_only``, as in the adapter's config.
        embeddings: what is written of embeddings, by saved name, because an adapter targets them or because
            they were resized or trained.
        aliases: second names of tied tensors. PEFT writes a tied token adapter under the other name.
    """
    parts = adapted.adapters[adapter]
    names = {
        part.saved: part.name
        for part in parts
        if not (part.container.startswith("trainable_tokens_") and part.name in aliases)
    }
    biased = {f"{part.module}.base_layer.bias" for part in parts if part.is_lora}
    for name, inner in adapted.base.items():
        is_bias = inner.endswith(".bias") and (bias == "all" or inner in biased)
        if is_bias and bias != "none":
            names[PREFIX + inner] = name
    return names | dict(embeddings)


def embedding_weights(adapted: AdaptedNames) -> tuple[str, ...]:
    """Weights of the base that are input or output embeddings, wrapped or not."""
    return tuple(name for name, inner in adapted.base.items() if _is_embedding(inner))


def wrapped_embeddings(adapted: AdaptedNames) -> dict[str, str]:
    """By saved name: the base layers of embeddings. PEFT writes them for an adapter that targets one."""
    return {
        PREFIX + inner: name
        for name, inner in adapted.base.items()
        if inner.partition(".base_layer.")[0].rpartition(".")[2] in _EMBEDDINGS
    }


def whole_embeddings(adapted: AdaptedNames, adapter: str) -> dict[str, str]:
    """By saved name: every tensor in an embedding. PEFT writes them where the vocabulary was resized.

    The copies that its wrappers keep are among them, under names without the adapter's.
    """
    found = {PREFIX + inner: name for name, inner in adapted.base.items() if _in_embedding(inner)}
    parts = (part for part in adapted.adapters[adapter] if _in_embedding(part.module))
    return found | {part.copied: part.name for part in parts}


def names_alone(adapted: AdaptedNames, adapter: str) -> dict[str, str]:
    """For each tensor of the base and of one adapter, its name in a model with that adapter alone.

    Where there are several, one of them may have wrapped a module that the others do not.
    """
    others = {n: one for n, one in adapted.adapters.items() if n != adapter}
    theirs = {part.name for parts in others.values() for part in parts}
    own = {plain_name(part.module) for part in adapted.adapters[adapter]}
    names = {name: live for name, live in adapted.live.items() if name not in theirs}
    for name, inner in adapted.base.items() if others else ():
        plain = plain_name(inner)
        if not any(plain.startswith(f"{module}.") for module in own):
            names[name] = PREFIX + plain
    return names


def with_adapter_name(saved: str, adapter: str) -> str:
    """The name in a model of a tensor of an adapter's file: the reverse of :attr:`Part.saved`.

    Names that PEFT takes from the base (saved modules, biases) stay unchanged.
    """
    segments = saved.split(".")
    for index, segment in enumerate(segments):
        if segment == "lora_magnitude_vector":
            return ".".join((*segments[: index + 1], adapter, "weight"))
        if segment.startswith(_CONTAINERS):
            return ".".join((*segments[: index + 1], adapter, *segments[index + 1 :]))
    return saved


def read_by_peft(saved: Iterable[str]) -> list[str]:
    """The names of an adapter's file that PEFT reads, without the leftovers that it writes beside them.

    Where a vocabulary was resized, PEFT writes a head of ``modules_to_save`` three times: ``lm_head.weight``,
    which it reads, the same as ``lm_head.modules_to_save.weight``, and the head before training as
    ``lm_head.original_module.weight``.
    """
    names = list(saved)
    held = set(names)
    left = (f".{_SAVED_MODULES}.", ".original_module.")
    return [
        name
        for name in names
        if not any(one in name and name.replace(one, ".") in held for one in left)
    ]


def _is_embedding(inner: str) -> bool:
    path = plain_name(inner).split(".")
    return len(path) > 1 and path[-2] in _EMBEDDINGS and path[-1] == "weight"


def _in_embedding(inner: str) -> bool:
    return not _EMBEDDINGS.isdisjoint(inner.split("."))


def _container(name: str) -> bool:
    *outer, last = name.split(".")
    return last in _UNNAMED or any(s in _UNNAMED or _is_container(s) for s in outer)


def _is_container(segment: str) -> bool:
    return segment in (_SAVED_MODULES, _PROMPTS) or segment.startswith(_CONTAINERS)


def _root(name: str) -> str | None:
    """The segments before ``base_model.model.``; None for a name outside a wrapped model."""
    before, found, _ = f".{name}".partition(f".{PREFIX}")
    return f"{before[1:]}." if found and before else "" if found else None


def _inner(name: str, root: str | None) -> str | None:
    """The name below ``base_model.model.``; None for a name outside."""
    if root is None:
        return name
    prefix = root + PREFIX
    if not name.startswith(prefix):
        return None
    inner = name.removeprefix(prefix)
    while inner.startswith(PREFIX):
        inner = inner.removeprefix(PREFIX)
    return inner


def _part(name: str, inner: str) -> Part | None:
    # Most names are of no adapter, and looking at each of their segments takes ten times as long.
    if _ANY_CONTAINER.search(inner) is None:
        return None
    segments = inner.split(".")
    for index, segment in enumerate(segments):
        if segment not in _UNNAMED and not _is_container(segment):
            continue
        head, rest = ".".join(segments[:index]), segments[index + 1 :]
        if segment in _UNNAMED:
            return Part(name, head, segment, "default", ".".join(rest))
        if rest:
            if segment in _SHARED_BY_KIND:
                return Part(name, head, segment, rest[-1], ".".join(rest[:-1]))
            return Part(name, head, segment, rest[0], ".".join(rest[1:]))
    return None
