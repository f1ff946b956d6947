"""Model directories: the catalogue of ``consolidate``, ``extract-attr``, ``average`` and ``merge-lora``.

Owns the steps from the states of the sources to one planned directory: combine the states, cast, fit to
the model of the config, and collect the files beside the weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ckpt_tools._version import __version__
from ckpt_tools.conversion.averaging import mean_of
from ckpt_tools.conversion.bases import read_like
from ckpt_tools.conversion.pipeline import Planned, dtype_counts
from ckpt_tools.conversion.quantisers import configs_near, unknown_quantisers_named, with_quantizer
from ckpt_tools.conversion.request import Request
from ckpt_tools.errors import DamagedCheckpoint, UsageError, listed
from ckpt_tools.hub import AssetFile, Assets, ConfigSource, collect, find_config
from ckpt_tools.hub.adapter_config import AdapterConfig, with_given
from ckpt_tools.hub.card import CardFacts, license_beside, model_card
from ckpt_tools.hub.config import of_attribute, text_value
from ckpt_tools.hub.reference import Answer
from ckpt_tools.model.adapter import Adapter, read_adapter_directory, state_names, trained_dtype
from ckpt_tools.model.combining import Weighted, combined, read_adapter_directories, weights_of
from ckpt_tools.model.fit import Fitted, ask_model, fit_to_model
from ckpt_tools.model.heads import of_adapter
from ckpt_tools.model.live_names import Layouts, in_one_layout
from ckpt_tools.model.merging import merged_state
from ckpt_tools.model.quantised import plain_state, quantised_names, quantizer_of
from ckpt_tools.model.shapes import with_shapes
from ckpt_tools.model.state import State, cast_state, main_dtype, model_state
from ckpt_tools.tensors.catalogue import Catalogue, Tensor
from ckpt_tools.tensors.checkpoint import Checkpoint
from ckpt_tools.tensors.derived import cast
from ckpt_tools.text import markdown, markdown_code
from ckpt_tools.transforms.key_map import KeyMap, key_map
from ckpt_tools.transforms.lora import choose_adapter
from ckpt_tools.writing.layout import Plan, plan
from ckpt_tools.writing.manifest import NAME as MANIFEST
from ckpt_tools.writing.manifest import Provenance
from ckpt_tools.writing.output import Output

_NOT_COMPARED = (
    "the weights are quantised and were copied as they are: names and shapes were not compared with the "
    "model of the config"
)


@dataclass(frozen=True)
class _Combined:
    """The state that is written, and where it comes from beside the sources.

    Attributes:
        state: the state.
        title: what it is made of, for a person; None where it is one checkpoint.
        beside: catalogues of further directories, by directory.
        as_stored: tensors that a quantiser stored, and that are written as they are.
    """

    state: State
    title: str | None
    beside: Mapping[Path, Catalogue]
    as_stored: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Model:
    """One model that is planned as soon as its config's model is known; see ``Pending``."""

    sources: Sequence[Checkpoint]
    request: Request
    tensors: Iterable[Tensor]
    combined: _Combined
    catalogue: Catalogue
    like: Checkpoint | None
    extra: Catalogue | None
    config: ConfigSource | None
    answer: Answer | None

    def plan(self) -> Planned:
        """Fit the state to the model, and lay out the directory."""
        request, state = self.request, self.combined.state
        fitted, assets = Fitted.unchecked(self.catalogue), Assets((), {}, (), ())
        if self.config is not None:
            if self.combined.as_stored:
                # Names and shapes are the quantiser's; the model of the config has others.
                fitted = replace(fitted, warnings=(_NOT_COMPARED,))
            else:
                fitted = self._fitted(self.config)
            assets = collect(
                request,
                self.config,
                {name: (t.dtype, t.shape) for name, t in fitted.catalogue.items()},
                dtype=main_dtype(fitted.catalogue, self.combined.as_stored),
                untied=bool(fitted.untied),
            )
        size, format = request.max_shard_size, request.output_format
        layout = plan(fitted.catalogue, max_shard_size=size, format=format)
        files = assets.files
        if request.card and self.config is not None:
            files += (self._card(layout, fitted, assets),)
        return Planned(
            outputs=(Output("", layout, files),),
            provenance=self._provenance(),
            title=self.combined.title,
            notes=(*state.notes, *fitted.notes, *assets.notes),
            warnings=(
                *(remark for source in self.sources for remark in source.remarks),
                *_unused(request),
                *state.warnings,
                *fitted.warnings,
                *assets.warnings,
            ),
        )

    def _fitted(self, config: ConfigSource) -> Fitted:
        try:
            with unknown_quantisers_named(self.sources, self.request.weights):
                return fit_to_model(
                    self.catalogue,
                    config,
                    self.extra,
                    main_dtype(self.catalogue),
                    trust=self.request.trust_remote_code,
                    answer=self.answer,
                    second_names=self.request.output_format == "bin",
                    of_base=self.combined.state.of_base,
                )
        except DamagedCheckpoint as error:
            _refuse_unlisted(error, self.sources)
            raise

    def _provenance(self) -> Provenance:
        request = self.request
        every = (*self.sources, *([] if self.like is None else [self.like]))
        options: dict[str, object] = {
            "weights": request.weights,
            "dtype": request.dtype,
            "attribute": request.attribute,
        }
        if request.compat is not None:
            options["compat"] = request.compat
        if request.key_map is not None:
            options["key_map"] = json.loads(request.key_map.read_text(encoding="utf-8"))
        return Provenance(request.command, every, options, self.combined.beside)

    def _card(self, layout: Plan, fitted: Fitted, assets: Assets) -> AssetFile:
        title = self.combined.title
        names = ", ".join(markdown_code(source.location.name) for source in self.sources)
        tensors = layout.tensors.values()
        return model_card(
            CardFacts(
                made_of=title and f"{markdown(title)}: {names}",
                step=self.sources[0].step if title is None else None,
                weights=self.request.weights,
                parameters=sum(tensor.numel for tensor in tensors),
                nbytes=layout.tensor_bytes,
                dtypes=dtype_counts(tensors),
                attribute=self.request.attribute,
                notes=fitted.notes,
                version=__version__,
                manifest=MANIFEST,
            ),
            assets.config,
            {} if self.config is None else license_beside(self.config.path),
        )


def prepare_model(sources: Sequence[Checkpoint], request: Request) -> _Model:
    """Combine the states of the sources, and ask which model the config describes."""
    names = read_key_map(request.key_map)
    # A key map may need numbers of the config. Otherwise a wrong attribute is told before a missing config.
    found = None if names is None else _config(request)
    if names is not None and found is not None:
        names = names.with_numbers(partial(text_value, found.data))
    states = [model_state(s, request.weights, request.attribute, names, flat=True) for s in sources]
    found = _config(request) if names is None else found
    states = [with_shapes(state, found, trust=request.trust_remote_code) for state in states]
    if request.dequantize:
        states = [
            plain_state(state, quantizer_of(configs_near(source, request)))
            for state, source in zip(states, sources, strict=True)
        ]
    combined = _combined(states, sources, request)
    catalogue = cast_state(combined.state, request.dtype, combined.as_stored)
    config, state = with_quantizer(found, combined.state, combined.as_stored)
    config, state = of_adapter(config, state)
    combined = replace(combined, state=state)
    like = None if request.like is None else read_like(request.like)
    extra = None if like is None else _extra(like, request)
    answer = None
    if config is not None and not combined.as_stored:
        answer = ask_model(
            catalogue, config, extra, main_dtype(catalogue), trust=request.trust_remote_code
        )
    # Within a file of the output they lie by name.
    tensors = [tensor for each in states for _, tensor in sorted(each.catalogue.items())]
    return _Model(sources, request, tensors, combined, catalogue, like, extra, config, answer)


def read_key_map(path: Path | None) -> KeyMap | None:
    """The key map in a file, if one was named.

    Raises:
        UsageError: it cannot be read, or is no key map.
    """
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"the key map cannot be read ({why})",
            path=path,
            hint="Pass --key-map with a JSON file. docs/formats.md describes it.",
        ) from error
    return key_map(content)


def _combined(
    states: Sequence[State], sources: Sequence[Checkpoint], request: Request
) -> _Combined:
    """The one state that is made of the states of the sources."""
    match request.command:
        case "average":
            mean = mean_of(
                states,
                sources,
                request.coefficients,
                _config(request),
                trust=request.trust_remote_code,
            )
            return _Combined(mean, f"mean of {len(states)} checkpoints", {})
        case "merge-lora":
            with unknown_quantisers_named(sources, request.weights):
                return _merged(states, sources, request)
        case _:
            (state,) = states
            return _Combined(state, None, {}, quantised_names(state))


def _merged(states: Sequence[State], sources: Sequence[Checkpoint], request: Request) -> _Combined:
    """The base with the adapter of the checkpoint, or of ``adapter_dir``, merged into it."""
    near = sources[0].location.near
    first, *others = [
        plain_state(state, quantizer_of(configs_near(source, request))) if number else state
        for number, (state, source) in enumerate(zip(states, sources, strict=True))
    ]
    held = {name for other in others for name in (*other.catalogue, *other.catalogue.ties)}
    states = [plain_state(first, quantizer_of(configs_near(sources[0], request)), held), *others]
    adapter_state: State | None = None
    beside: dict[Path, Catalogue] = {}
    found: AdapterConfig | None = None
    weights = weights_of(request.adapter)
    name = request.adapter
    if weights is not None:
        adapter_state, found = _combined_adapters(states, request, near, weights, beside)
        name = None
    elif request.adapter_dir is not None:
        adapter_state, found = read_adapter_directory(
            request.adapter_dir, name or "default", follow_links=request.follow_links
        )
        beside[request.adapter_dir] = adapter_state.catalogue
    layouts = in_one_layout(
        Layouts(states, adapter_state), _config(request), trust=request.trust_remote_code
    )

    def configure(chosen: Adapter) -> AdapterConfig:
        config = found if request.adapter_config is None or weights is not None else None
        config = config or chosen.configured(
            request.adapter_config, near, None, None, follow_links=request.follow_links
        )
        alpha = request.lora_alpha if weights is None else None
        return with_given(config, lora_alpha=alpha, base_model=None, for_file=False)

    state = merged_state(
        layouts.states,
        model_ties=layouts.ties,
        adapter_state=layouts.adapter,
        adapter=name,
        configure=configure,
        dtype=request.dtype,
    )
    return _Combined(state, None, beside)


def _combined_adapters(
    states: Sequence[State],
    request: Request,
    near: Sequence[Path],
    weights: Mapping[str, float],
    beside: dict[Path, Catalogue],
) -> tuple[State, AdapterConfig]:
    """The weighted adapters of the checkpoint, or of ``adapter_dir``, as one."""
    source, configs = states[0], dict[str, AdapterConfig]()
    if request.adapter_dir is not None:
        source, configs = read_adapter_directories(
            request.adapter_dir, [*weights], follow_links=request.follow_links
        )
        beside[request.adapter_dir] = source.catalogue
    names = state_names(source)
    several = []
    for name, weight in weights.items():
        adapter = Adapter(choose_adapter(names, name), source, names, {})
        config = configs.get(name) or adapter.configured(
            request.adapter_config, near, None, None, follow_links=request.follow_links
        )
        given = with_given(config, lora_alpha=request.lora_alpha, base_model=None, for_file=False)
        several.append(Weighted(adapter, given, weight))
    as_stored = request.dtype in ("fp32", "keep")

    def taken(name: str) -> Tensor:
        tensor = source.catalogue[name]
        return tensor if as_stored else cast(tensor, trained_dtype(source, name))

    return combined(several, taken, request.combination)


def _config(request: Request) -> ConfigSource | None:
    """The config of the model that is written; None where weights alone are."""
    if request.weights_only:
        return None
    config = find_config(request)
    return config if request.attribute is None else of_attribute(config, request.attribute)


def _extra(like: Checkpoint, request: Request) -> Catalogue:
    """The tensors of ``--like``, in the dtypes of the output."""
    dtype = "keep" if request.dtype == "auto" else request.dtype
    return cast_state(model_state(like, "model"), dtype)


def _refuse_unlisted(error: DamagedCheckpoint, sources: Sequence[Checkpoint]) -> None:
    """Raise the true reason if tensors that the model lacks lie in a shard that the index does not name.

    Raises:
        DamagedCheckpoint: the index leaves out a shard that the model needs.
    """
    for source in sources:
        needed = [name for name in error.missing if name in source.unlisted]
        if needed:
            raise DamagedCheckpoint(
                f"the index does not name it, and the model needs tensors that it holds: {listed(needed)}",
                path=source.unlisted[needed[0]],
                missing=error.missing,
                hint="Restore the index from where the model came from, or add these tensors to its "
                "weight_map.",
            ) from error


def _unused(request: Request) -> Iterator[str]:
    """What was named and is not used, because weights alone are written."""
    named = {
        "--config": request.config,
        "--tokenizer": request.tokenizer,
        "--chat-template": request.chat_template,
        "--like": request.like,
        "--compat": request.compat,
    }
    unused = [option for option, given in named.items() if given is not None]
    if request.weights_only and unused:
        yield (
            f"{', '.join(unused)} had no effect: --weights-only writes the tensors of the checkpoint "
            "under the names that they have there"
        )
