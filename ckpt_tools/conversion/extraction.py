"""Adapter directories: the catalogues of ``extract-lora``, as PEFT's ``save_pretrained`` writes them.

Owns the steps from the state of a checkpoint to one planned directory an adapter: sort the names, find the
config of each adapter, and ask PEFT which tensors it saves. Rules over names
(:mod:`ckpt_tools.transforms.lora`) give the same answer without PEFT; PEFT is right where the two differ.
Only the tensors of the adapters are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ckpt_tools.conversion.pipeline import Planned
from ckpt_tools.conversion.request import Request
from ckpt_tools.errors import (
    CkptError,
    DamagedCheckpoint,
    MissingAsset,
    UnsupportedLayout,
    UsageError,
    listed,
)
from ckpt_tools.hub import AssetOptions, ConfigSource, find_config
from ckpt_tools.hub.adapter_config import (
    AdapterConfig,
    adapter_config_file,
    with_given,
)
from ckpt_tools.hub.config import finish, text_value
from ckpt_tools.hub.files import AssetFile, read_object
from ckpt_tools.hub.reference.adapters import (
    AdapterAnswer,
    AdapterQuestion,
    MadeByPeft,
    describe_adapters,
    question_of_one,
)
from ckpt_tools.hub.sources import nearby
from ckpt_tools.hub.tokenizer import find_tokenizer
from ckpt_tools.model.adapter import Adapter, base_shapes, state_names, trained_dtype
from ckpt_tools.model.state import State, cast_state, main_dtype, model_state
from ckpt_tools.tensors.catalogue import Catalogue, Tensor
from ckpt_tools.tensors.checkpoint import Checkpoint
from ckpt_tools.tensors.dtypes import BY_NAME
from ckpt_tools.transforms.lora import (
    choose_adapter,
    free_embeddings,
    saved_names,
    targeted_embeddings,
)
from ckpt_tools.writing.layout import plan
from ckpt_tools.writing.manifest import Provenance
from ckpt_tools.writing.output import Output

_ALL = "all"
_DEFAULT = "default"
# The output of a prompt encoder is computed in memory.
_MOST_BYTES = 2**30
_NOT_LORA = (
    "Pass the --config and --adapter-config that the adapter was trained with. If that does not help, load "
    "the training state into the model with PEFT, and call its save_pretrained."
)


@dataclass(frozen=True)
class _Found:
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


@dataclass(frozen=True)
class _Adapters:
    """Adapters that are planned when PEFT has been asked about them; see ``Pending``."""

    source: Checkpoint
    request: Request
    found: Sequence[_Found]
    others: Sequence[str]
    base: ConfigSource | None
    tensors: Iterable[Tensor]

    def plan(self) -> Planned:
        """Ask PEFT which tensors it saves, and lay out one directory an adapter."""
        state, request = self.found[0].adapter.state, self.request
        warnings = _left_out(self.found, state)
        found, doubts = _asked(self.found, self.base, request)
        options = {"weights": request.weights, "dtype": request.dtype, "adapter": request.adapter}
        return Planned(
            outputs=tuple(_output(one, request) for one in found),
            provenance=Provenance(request.command, (self.source,), options),
            notes=(
                *state.notes,
                *(note for one in found for note in (*one.config.notes, *one.notes)),
                *([f"left out: adapters {listed(self.others)}"] if self.others else []),
            ),
            warnings=(*self.source.remarks, *warnings, *doubts),
        )


def prepare_adapters(sources: Sequence[Checkpoint], request: Request) -> _Adapters:
    """Find the adapters that the request names, their configs, and their names by rule."""
    (source,) = sources
    state = model_state(source, request.weights)
    names = state_names(state)
    chosen = (
        list(names.adapters)
        if request.adapter == _ALL and names.adapters
        else [choose_adapter(names, request.adapter)]
    )
    base = _base_config(request)
    shapes = base_shapes(state.catalogue, names)
    found = [_described(Adapter(name, state, names, shapes), request, base) for name in chosen]
    others = [name for name in names.adapters if name not in chosen]
    held = {name for one in found for name in one.names.values()}
    tensors = [state.catalogue[name] for name in held]
    return _Adapters(source, request, found, others, base, tensors)


def _base_config(options: AssetOptions) -> ConfigSource | None:
    """The config of the base; None if none was named and none was found."""
    try:
        return find_config(options)
    except MissingAsset:
        if options.config is not None:
            raise
        return None


def _described(adapter: Adapter, request: Request, base: ConfigSource | None) -> _Found:
    """Config and names by the rules."""
    adapter.refuse_empty()
    data = {} if base is None else base.data
    architecture = next(iter(data.get("architectures") or ()), None)
    config = adapter.configured(
        request.adapter_config,
        request.search,
        architecture,
        data.get("_name_or_path") or None,
    )
    config = with_given(
        config,
        lora_alpha=request.lora_alpha,
        base_model=request.base_model,
        for_file=request.names_base,
    )
    embeddings, notes = _embeddings(adapter, config, request, base)
    names = saved_names(
        adapter.names,
        adapter.name,
        bias=config.bias,
        embeddings=embeddings,
        aliases=adapter.state.catalogue.ties,
    )
    return _Found(adapter, config, names, notes)


def _embeddings(
    adapter: Adapter, config: AdapterConfig, request: Request, base: ConfigSource | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Embeddings that are written with an adapter, and why.

    PEFT writes embeddings that are targets, that were resized, or that the caller asks for. Here the
    checkpoint
    decides: a trained embedding would be lost if it were left out.
    """
    modules = [name.rpartition(".")[0] for name in adapter.names.plain.values()]
    if config.targets_embeddings(modules):
        return targeted_embeddings(adapter.names, adapter.name), ()
    free = free_embeddings(adapter.names)
    state = adapter.state
    if any(kind == "frozen" for kind in state.kinds.values()):
        trained = [name for name in free if state.kinds.get(name) == "parameter"]
        if trained:
            return free, (f"trained beside the adapter, and written with it: {listed(free)}",)
    before = _vocabulary(str(config.data.get("base_model_name_or_path")), request, base)
    rows = {state.catalogue[name].shape[0] for name in free}
    if before is None or not rows or rows == {before}:
        return (), ()
    return free, (f"resized from {before} rows, and written with the adapter: {listed(free)}",)


def _vocabulary(base_model: str, request: Request, base: ConfigSource | None) -> int | None:
    """Rows of the base's embedding before training, if its config is known."""
    path = Path(base_model) / "config.json"
    if path.is_file():
        data = read_object(path)
    elif request.config is not None and base is not None:
        data = dict(base.data)
    else:
        return None
    size = text_value(data, "vocab_size")
    return size if isinstance(size, int) else None


def _left_out(found: Sequence[_Found], state: State) -> list[str]:
    """Trained tensors that are not part of an adapter that is written."""
    if "frozen" not in state.kinds.values():
        return []
    written = {name for one in found for name in one.names.values()}
    known = {part.name for parts in found[0].adapter.names.adapters.values() for part in parts}
    lost = [
        name
        for name, kind in state.kinds.items()
        if kind == "parameter" and name not in written and name not in known
    ]
    return [f"trained, but not part of an adapter as PEFT saves it: {listed(lost)}"] if lost else []


def _asked(
    found: Sequence[_Found], base: ConfigSource | None, request: Request
) -> tuple[Sequence[_Found], list[str]]:
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
        _need_peft(found, error.fact, error.hint or "")
        return found, [f"names are by rule, because PEFT was not asked: {error.fact}"]
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


def _holds_none(one: _Found, answer: AdapterAnswer) -> bool:
    """Whether the state holds none of the tensors that PEFT writes."""
    live = set(one.adapter.names.live.values())
    return not any(name in live for names in answer.names.values() for name in names)


def _need_peft(found: Sequence[_Found], why: str, hint: str) -> None:
    """Raise UnsupportedLayout for adapters whose names only PEFT knows."""
    for one in found:
        if not one.config.is_lora:
            raise UnsupportedLayout(
                f"what PEFT saves of a {one.config.data.get('peft_type')} adapter is not known: {why}",
                hint=hint,
            )


def _question(one: _Found, request: Request) -> AdapterQuestion:
    adapter = one.adapter
    names, state = adapter.names, adapter.state
    others = {p.name for a, ps in names.adapters.items() if a != adapter.name for p in ps}
    cast = cast_state(state, request.dtype)
    live = {name: cast[old].dtype for old, name in names.live.items() if old not in others}
    free = set(free_embeddings(names))
    wanted = any(name in free for name in one.names.values())
    return AdapterQuestion(adapter.name, one.config.data, live, wanted)


def _model_config(one: _Found, base: ConfigSource) -> Mapping[str, object]:
    """The base's config, with the vocabulary that the state has."""
    catalogue = one.adapter.state.catalogue
    shapes = {
        plain: (catalogue[name].dtype, catalogue[name].shape)
        for name, plain in one.adapter.names.plain.items()
    }
    floating = {name: catalogue[name] for name in one.names.values()}
    return finish(base, shapes, dtype=main_dtype(floating), untied=False).data


def _as_peft(one: _Found, answer: AdapterAnswer, question: str, request: Request) -> _Found:
    """The adapter with the names that PEFT gives. Every tensor is accounted for.

    Raises:
        UsageError: the config's adapter has other tensors than the checkpoint.
        UnsupportedLayout: what PEFT makes from other tensors needs too much memory.
    """
    adapter = one.adapter
    held = {live: name for name, live in adapter.names.live.items()}
    own = {saved: next((n for n in names if n in held), "") for saved, names in answer.names.items()}
    wanted = {saved: (live, answer.shapes[saved]) for saved, live in own.items()}
    wanted |= {live: (live if live in held else "", shape) for live, shape in answer.inputs.items()}
    hint = "Pass the --adapter-config and --config that the adapter was trained with."
    lacking = [saved for saved, (live, _) in wanted.items() if not live]
    if lacking:
        raise DamagedCheckpoint(
            f"the config's adapter {adapter.name!r} has {len(lacking)} tensors that the checkpoint "
            f"lacks: {listed(lacking)}",
            path=one.config.path,
            missing=lacking,
            hint=hint,
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
    names = {saved: held[live] for saved, live in own.items()}
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
        notes = (*notes, f"computed by PEFT on this processor from the adapter: {listed(list(made))}")
    return _Found(adapter, one.config, names, notes, made)


def _made(
    one: _Found, answer: AdapterAnswer, question: str, request: Request
) -> dict[str, MadeByPeft]:
    """The tensors that PEFT makes from others, in the dtypes of the output."""
    if not answer.made:
        return {}
    state = one.adapter.state
    held = {live: name for name, live in one.adapter.names.live.items()}
    cast = _cast(state, {live: held[live] for live in answer.inputs}, request)
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


def _cast(state: State, names: Mapping[str, str], request: Request) -> Catalogue:
    """Tensors of the state under other names, in the dtypes of the output."""
    tensors = {new: state.catalogue[name] for new, name in names.items()}
    dtypes = {new: trained_dtype(state, name) for new, name in names.items()}
    return cast_state(State(Catalogue(tensors), dtypes, {}), request.dtype)


def _output(one: _Found, request: Request) -> Output:
    cast = Catalogue({**_cast(one.adapter.state, one.names, request), **one.made})
    # PEFT never shards an adapter.
    layout = plan(cast, stem="adapter_model", max_shard_size=max(cast.nbytes, 1))
    folder = one.adapter.name if request.adapter == _ALL and one.adapter.name != _DEFAULT else ""
    beside = () if folder else _tokenizer(request)
    return Output(folder, layout, (adapter_config_file(one.config), *beside))


def _tokenizer(options: AssetOptions) -> tuple[AssetFile, ...]:
    found = find_tokenizer(options.tokenizer, nearby(options))
    return () if found is None else found.files
