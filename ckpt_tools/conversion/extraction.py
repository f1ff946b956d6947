"""Adapter directories: the catalogues of ``extract-lora``, as PEFT's ``save_pretrained`` writes them.

Owns the steps from the state of a checkpoint to one planned directory an adapter: sort the names, find the
config of each adapter, and ask PEFT which tensors it saves. Rules over names
(:mod:`ckpt_tools.transforms.lora`) give the same answer without PEFT; PEFT is right where the two differ.
Only the tensors of the adapters are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ckpt_tools.conversion.peft_answers import Found, ask_peft, cast_tensors
from ckpt_tools.conversion.pipeline import Planned
from ckpt_tools.conversion.request import Request
from ckpt_tools.errors import (
    MissingAsset,
    listed,
)
from ckpt_tools.hub import AssetOptions, ConfigSource, find_config
from ckpt_tools.hub.adapter_config import (
    AdapterConfig,
    adapter_config_file,
    with_given,
)
from ckpt_tools.hub.config import text_value
from ckpt_tools.hub.files import AssetFile, read_object
from ckpt_tools.hub.sources import nearby
from ckpt_tools.hub.tokenizer import find_tokenizer, with_template
from ckpt_tools.hub.transformers_4 import files_for_transformers_4
from ckpt_tools.model.adapter import Adapter, as_live, base_shapes, state_names
from ckpt_tools.model.state import State, model_state
from ckpt_tools.tensors.catalogue import Catalogue, Tensor
from ckpt_tools.tensors.checkpoint import ADAPTER, Checkpoint
from ckpt_tools.transforms.lora import (
    choose_adapter,
    embedding_weights,
    saved_names,
    whole_embeddings,
    wrapped_embeddings,
)
from ckpt_tools.writing.layout import plan
from ckpt_tools.writing.manifest import Provenance
from ckpt_tools.writing.output import Output

_ALL = "all"
_DEFAULT = "default"


@dataclass(frozen=True)
class _Adapters:
    """Adapters that are planned when PEFT has been asked about them; see ``Pending``."""

    source: Checkpoint
    request: Request
    found: Sequence[Found]
    others: Sequence[str]
    base: ConfigSource | None
    tensors: Iterable[Tensor]

    def plan(self) -> Planned:
        """Ask PEFT which tensors it saves, and lay out one directory an adapter."""
        state, request = self.found[0].adapter.state, self.request
        warnings = _left_out(self.found, state)
        found, doubts = self.found, list[str]()
        # Of an adapter's directory, PEFT chose the tensors when it wrote it.
        if self.source.location.format != ADAPTER:
            found, doubts = ask_peft(self.found, self.base, request)
        options = {"weights": request.weights, "dtype": request.dtype, "adapter": request.adapter}
        if request.compat is not None:
            options["compat"] = request.compat
        beside, changes = _tokenizer(request)
        return Planned(
            outputs=tuple(_output(one, request, beside) for one in found),
            provenance=Provenance(request.command, (self.source,), options),
            notes=(
                *state.notes,
                *(note for one in found for note in (*one.config.notes, *one.notes)),
                *([f"left out: adapters {listed(self.others)}"] if self.others else []),
                *changes,
            ),
            warnings=(*self.source.remarks, *warnings, *doubts),
        )


def prepare_adapters(sources: Sequence[Checkpoint], request: Request) -> _Adapters:
    """Find the adapters that the request names, their configs, and their names by rule."""
    (source,) = sources
    state = model_state(source, request.weights)
    copied: dict[str, str] = {}
    if source.location.format == ADAPTER:
        state, copied = as_live(state, request.adapter or _DEFAULT)
    names = state_names(state)
    chosen = (
        list(names.adapters)
        if request.adapter == _ALL and names.adapters
        else [choose_adapter(names, request.adapter)]
    )
    base = _base_config(request)
    shapes = base_shapes(state.catalogue, names)
    found = [_described(Adapter(name, state, names, shapes), request, base) for name in chosen]
    if copied:
        found = [replace(one, names=copied, notes=()) for one in found]
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


def _described(adapter: Adapter, request: Request, base: ConfigSource | None) -> Found:
    """Config and names by the rules."""
    adapter.refuse_empty()
    data = {} if base is None else base.data
    architecture = next(iter(data.get("architectures") or ()), None)
    config = adapter.configured(
        request.adapter_config,
        request.search,
        architecture,
        data.get("_name_or_path") or None,
        follow_links=request.follow_links,
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
    return Found(adapter, config, names, notes)


def _embeddings(
    adapter: Adapter, config: AdapterConfig, request: Request, base: ConfigSource | None
) -> tuple[Mapping[str, str], tuple[str, ...]]:
    """What is written of embeddings with an adapter, by saved name, and why.

    PEFT writes embeddings that are targets, that were resized, or that the caller asks for. Here the
    checkpoint decides: a trained embedding would be lost if it were left out.
    """
    names, state = adapter.names, adapter.state
    modules = [name.rpartition(".")[0] for name in names.plain.values()]
    targeted = config.targets_embeddings(modules)
    if targeted and config.token_indices is None:
        return wrapped_embeddings(names), ()
    weights = embedding_weights(names)
    saved = wrapped_embeddings(names) if targeted else whole_embeddings(names, adapter.name)
    which = listed(list(saved.values()))
    if "frozen" in state.kinds.values() and any(
        state.kinds.get(name) == "parameter" for name in weights
    ):
        return saved, (f"trained beside the adapter, and written with it: {which}",)
    before = _vocabulary(str(config.data.get("base_model_name_or_path")), request, base)
    rows = {state.catalogue[name].shape[0] for name in weights}
    if before is None or not rows or rows == {before}:
        return {}, ()
    return saved, (f"resized from {before} rows, and written with the adapter: {which}",)


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


def _left_out(found: Sequence[Found], state: State) -> list[str]:
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


def _output(one: Found, request: Request, beside: Sequence[AssetFile]) -> Output:
    cast = Catalogue({**cast_tensors(one.adapter.state, one.names, request), **one.made})
    # PEFT never shards an adapter.
    layout = plan(
        cast,
        stem="adapter_model",
        max_shard_size=max(cast.nbytes, 1),
        format=request.output_format,
    )
    folder = one.adapter.name if request.adapter == _ALL and one.adapter.name != _DEFAULT else ""
    files = () if folder else beside
    return Output(folder, layout, (adapter_config_file(one.config), *files))


def _tokenizer(options: AssetOptions) -> tuple[tuple[AssetFile, ...], tuple[str, ...]]:
    """The files of the tokenizer, and notes on what changed in them."""
    found = with_template(find_tokenizer(options.tokenizer, nearby(options)), options.chat_template)
    files = () if found is None else found.files
    return (files, ()) if options.compat is None else files_for_transformers_4(files)
