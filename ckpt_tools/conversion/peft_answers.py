"""Owns what PEFT writes of the adapters of a state: its answer, checked against the tensors of the state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ckpt_tools.conversion.request import Request
from ckpt_tools.errors import CkptError, UnsupportedLayout, UsageError, listed
from ckpt_tools.errors import tensors as tensors_text
from ckpt_tools.hub import ConfigSource
from ckpt_tools.hub.adapter_config import AdapterConfig
from ckpt_tools.hub.config import finish
from ckpt_tools.hub.reference.adapters import (
    AdapterAnswer,
    AdapterQuestion,
    MadeByPeft,
    describe_adapters,
    question_of_one,
)
from ckpt_tools.model.adapter import Adapter, trained_dtype
from ckpt_tools.model.state import State, cast_state, main_dtype
from ckpt_tools.tensors.catalogue import Catalogue
from ckpt_tools.tensors.dtypes import BY_NAME
from ckpt_tools.transforms.lora import embedding_weights, names_alone

# The output of a prompt encoder is computed in memory.
_MOST_BYTES = 2**30
_NOT_LORA = (
    "Pass the --config and --adapter-config that the adapter was trained with. If that does not help, load "
    "the training state into the model with PEFT, and call its save_pretrained."
)
_BASE_LEFT_OUT = (
    "PEFT writes the base's embedding with an adapter that targets it, and the checkpoint was saved without "
    "the frozen weights. To merge the adapter, run merge-lora with --base DIR, the base's directory."
)


@dataclass(frozen=True)
class Found:
    """An adapter, its config and the tensors that are written of it.

    Attributes:
        adapter: the adapter.
        config: its config.
        names: for each tensor of the file that the state holds, its name in the state.
        notes: what was decided.
        made: the tensors of the file that PEFT makes from others.
    """

    adapter: Adapter
    config: AdapterConfig
    names: Mapping[str, str]
    notes: tuple[str, ...]
    made: Mapping[str, MadeByPeft] = field(default_factory=dict)


def ask_peft(
    found: Sequence[Found], base: ConfigSource | None, request: Request
) -> tuple[Sequence[Found], list[str]]:
    """The adapters with PEFT's names; with the names by rule if PEFT cannot be asked."""
    if base is None:
        _need_peft(
            found,
            "the base's config.json was not found",
            "Pass --config FILE|DIR, the config of the base.",
        )
        return found, []
    questions = [_question(one, request) for one in found]
    config = _model_config(found[0], base)
    try:
        answers = describe_adapters(config, questions)
    except CkptError as error:
        _need_peft(found, error.fact, error.hint or _NOT_LORA)
        why = f"{error.fact}. {error.hint}" if error.hint else error.fact
        return found, [f"names are by rule, because PEFT was not asked: {why}"]
    agreed, doubts = [], []
    for one, question, answer in zip(found, questions, answers, strict=True):
        failure = answer.failure
        if failure is None and not answer.made and _holds_none(one, answer):
            # This transformers names every module differently than the one that trained.
            failure = "none of the names is in the model of the base's config"
        if failure is not None:
            _need_peft([one], failure, answer.hint or _NOT_LORA)
            doubts.append(f"names are by rule, because PEFT failed: {failure}")
            agreed.append(one)
        else:
            whole = question_of_one(config, question, answer.inputs)
            agreed.append(_as_peft(one, answer, whole, request))
    return agreed, doubts


def _holds_none(one: Found, answer: AdapterAnswer) -> bool:
    """Whether the state holds none of the tensors that PEFT writes."""
    held = set(names_alone(one.adapter.names, one.adapter.name).values())
    return not any(name in held for names in answer.names.values() for name in names)


def _need_peft(found: Sequence[Found], why: str, hint: str) -> None:
    """Raise UnsupportedLayout for adapters whose names only PEFT knows."""
    for one in found:
        if not one.config.is_lora:
            raise UnsupportedLayout(
                f"what PEFT saves of a {one.config.data.get('peft_type')} adapter is not known: {why}",
                hint=hint,
            )


def _question(one: Found, request: Request) -> AdapterQuestion:
    adapter = one.adapter
    names, state = adapter.names, adapter.state
    cast = cast_state(state, request.dtype)
    dtypes = {name: cast[old].dtype for old, name in names_alone(names, adapter.name).items()}
    embeddings = set(embedding_weights(names))
    wanted = any(name in embeddings for name in one.names.values())
    return AdapterQuestion(adapter.name, one.config.data, dtypes, wanted)


def _model_config(one: Found, base: ConfigSource) -> Mapping[str, object]:
    """The base's config, with the vocabulary that the state has."""
    catalogue = one.adapter.state.catalogue
    shapes = {
        plain: (catalogue[name].dtype, catalogue[name].shape)
        for name, plain in one.adapter.names.plain.items()
    }
    floating = {name: catalogue[name] for name in one.names.values()}
    return finish(base, shapes, dtype=main_dtype(floating), untied=False).data


def _as_peft(one: Found, answer: AdapterAnswer, question: str, request: Request) -> Found:
    """The adapter with the names that PEFT gives. Every tensor is accounted for.

    Raises:
        UsageError: the config's adapter has other tensors than the checkpoint.
        UnsupportedLayout: what PEFT makes from other tensors needs too much memory.
    """
    adapter = one.adapter
    alone = names_alone(adapter.names, adapter.name)
    held = {own: name for name, own in alone.items()}
    own = {
        saved: next((n for n in names if n in held), "") for saved, names in answer.names.items()
    }
    wanted = {saved: (live, answer.shapes[saved]) for saved, live in own.items()}
    wanted |= {live: (live if live in held else "", shape) for live, shape in answer.inputs.items()}
    hint = "Pass the --adapter-config and --config that the adapter was trained with."
    lacking = [saved for saved, (live, _) in wanted.items() if not live]
    if lacking:
        of_base = all(".base_layer." in saved for saved in lacking)
        raise UsageError(
            f"the config's adapter {adapter.name!r} has {tensors_text(len(lacking))} that the checkpoint "
            f"lacks: {listed(lacking)}",
            path=one.config.path,
            hint=_BASE_LEFT_OUT if of_base else hint,
        )
    if answer.odd:
        raise UsageError(
            f"the adapter {adapter.name!r} of the config lacks these tensors: "
            f"{listed([held[live] for live in answer.odd])}",
            path=one.config.path,
            hint=hint,
        )
    for live, shape in wanted.values():
        if adapter.state.catalogue[held[live]].shape != shape:
            raise UsageError(
                f"its shape is {adapter.state.catalogue[held[live]].shape}, and the config's adapter "
                f"has {shape}",
                path=one.config.path,
                tensor=held[live],
                hint=hint,
            )
    names = _named(one, {saved: held[live] for saved, live in own.items()}, alone)
    notes = one.notes
    if one.config.is_lora:
        unused = [part.name for part in adapter.parts if part.name not in names.values()]
        unused = [name for name in unused if name not in adapter.state.catalogue.ties]
        if unused:
            raise UsageError(
                f"the adapter {adapter.name!r} of the config lacks these tensors: {listed(unused)}",
                path=one.config.path,
                hint=hint,
            )
        differ = sorted(set(names.items()) ^ set(one.names.items()))
        if differ:
            notes = (
                *notes,
                f"PEFT's names were taken instead of those by rule: {listed([s for s, _ in differ])}",
            )
    made = _made(one, answer, question, request)
    if made:
        notes = (
            *notes,
            f"computed by PEFT on this processor from the adapter: {listed(list(made))}",
        )
    return Found(adapter, one.config, names, notes, made)


def _named(one: Found, answered: Mapping[str, str], alone: Mapping[str, str]) -> dict[str, str]:
    """By saved name: what PEFT writes where there are other adapters too.

    The child builds the model without them. PEFT writes tensors of the base under their names in the
    model, which have the wrappers of all adapters.
    """
    live = one.adapter.names.live
    names = {
        live[name] if saved == alone[name] else saved: name for saved, name in answered.items()
    }
    beside = {saved: name for saved, name in one.names.items() if alone[name] != live[name]}
    return names | beside


def _made(
    one: Found, answer: AdapterAnswer, question: str, request: Request
) -> dict[str, MadeByPeft]:
    """The tensors that PEFT makes from others, in the dtypes of the output."""
    if not answer.made:
        return {}
    state = one.adapter.state
    alone = names_alone(one.adapter.names, one.adapter.name)
    held = {own: name for name, own in alone.items()}
    cast = cast_tensors(state, {live: held[live] for live in answer.inputs}, request)
    if cast.nbytes > _MOST_BYTES:
        raise UnsupportedLayout(
            f"the prompt encoder of the {one.config.data.get('peft_type')} adapter has {cast.nbytes:,} "
            f"bytes, and its output is computed from at most {_MOST_BYTES:,}",
            hint="Load the training state into the model with PEFT, and call its save_pretrained.",
        )
    inputs = tuple(cast.items())
    return {
        saved: MadeByPeft(BY_NAME[dtype], answer.shapes[saved], saved, question, inputs)
        for saved, dtype in answer.made.items()
    }


def cast_tensors(state: State, names: Mapping[str, str], request: Request) -> Catalogue:
    """Tensors of the state under other names, in the dtypes of the output."""
    tensors = {new: state.catalogue[name] for new, name in names.items()}
    dtypes = {new: trained_dtype(state, name) for new, name in names.items()}
    return cast_state(State(Catalogue(tensors), dtypes, {}), request.dtype)
