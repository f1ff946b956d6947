"""Model directories: the catalogue of ``consolidate``, ``extract-attr``, ``average`` and ``merge-lora``.

Owns the steps from the states of the sources to one planned directory: combine the states, cast, fit to
the model of the config, and collect the files beside the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt_tools import readers
from ckpt_tools._version import __version__
from ckpt_tools.conversion.pipeline import Planned, dtype_counts
from ckpt_tools.conversion.request import Request
from ckpt_tools.errors import DamagedCheckpoint, listed
from ckpt_tools.hub import AssetFile, Assets, ConfigSource, collect, find_config
from ckpt_tools.hub.adapter_config import AdapterConfig, with_given
from ckpt_tools.hub.card import CardFacts, model_card
from ckpt_tools.hub.config import of_attribute
from ckpt_tools.hub.reference import Answer
from ckpt_tools.model.adapter import Adapter, read_adapter_directory
from ckpt_tools.model.fit import Fitted, ask_model, fit_to_model
from ckpt_tools.model.merging import merged_state
from ckpt_tools.model.state import State, cast_state, main_dtype, mean_state, model_state
from ckpt_tools.tensors.catalogue import Catalogue, Tensor
from ckpt_tools.tensors.checkpoint import Checkpoint
from ckpt_tools.tensors.threads import load_torch
from ckpt_tools.writing.layout import Plan, plan
from ckpt_tools.writing.manifest import NAME as MANIFEST
from ckpt_tools.writing.manifest import Provenance
from ckpt_tools.writing.output import Output


@dataclass(frozen=True)
class _Combined:
    """The state that is written, and where it comes from beside the sources.

    Attributes:
        state: the state.
        title: what it is made of, for a person; None where it is one checkpoint.
        beside: catalogues of further directories, by directory.
    """

    state: State
    title: str | None
    beside: Mapping[Path, Catalogue]


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
            fitted = self._fitted(self.config)
            assets = collect(
                request,
                self.config,
                {name: (t.dtype, t.shape) for name, t in fitted.catalogue.items()},
                dtype=main_dtype(fitted.catalogue),
                untied=bool(fitted.untied),
            )
        layout = plan(fitted.catalogue, max_shard_size=request.max_shard_size)
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
            return fit_to_model(
                self.catalogue,
                config,
                self.extra,
                main_dtype(self.catalogue),
                trust=self.request.trust_remote_code,
                answer=self.answer,
            )
        except DamagedCheckpoint as error:
            _refuse_unlisted(error, self.sources)
            raise

    def _provenance(self) -> Provenance:
        request = self.request
        every = (*self.sources, *([] if self.like is None else [self.like]))
        options = {
            "weights": request.weights,
            "dtype": request.dtype,
            "attribute": request.attribute,
        }
        return Provenance(request.command, every, options, self.combined.beside)

    def _card(self, layout: Plan, fitted: Fitted, assets: Assets) -> AssetFile:
        title = self.combined.title
        names = ", ".join(f"`{source.location.name}`" for source in self.sources)
        tensors = layout.tensors.values()
        return model_card(
            CardFacts(
                made_of=title and f"{title}: {names}",
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
        )


def prepare_model(sources: Sequence[Checkpoint], request: Request) -> _Model:
    """Combine the states of the sources, and ask which model the config describes."""
    states = [model_state(source, request.weights, request.attribute) for source in sources]
    combined = _combined(states, sources, request)
    catalogue = cast_state(combined.state, request.dtype)
    config = _config(request)
    like = None if request.like is None else readers.read(readers.locate(request.like))
    extra = None if like is None else _extra(like, request)
    answer = None
    if config is not None:
        answer = ask_model(
            catalogue, config, extra, main_dtype(catalogue), trust=request.trust_remote_code
        )
        # The import takes seconds and is needed later; the answer takes seconds too.
        load_torch()
    tensors = [tensor for each in states for tensor in each.catalogue.values()]
    return _Model(sources, request, tensors, combined, catalogue, like, extra, config, answer)


def _combined(
    states: Sequence[State], sources: Sequence[Checkpoint], request: Request
) -> _Combined:
    """The one state that is made of the states of the sources."""
    match request.command:
        case "average":
            mean = mean_state(states, request.coefficients)
            return _Combined(mean, f"mean of {len(states)} checkpoints", {})
        case "merge-lora":
            return _merged(states, sources[0].location.near, request)
        case _:
            (state,) = states
            return _Combined(state, None, {})


def _merged(states: Sequence[State], near: Sequence[Path], request: Request) -> _Combined:
    """The base with the adapter of the checkpoint, or of ``adapter_dir``, merged into it."""
    adapter_state: State | None = None
    beside: dict[Path, Catalogue] = {}
    found: AdapterConfig | None = None
    if request.adapter_dir is not None:
        adapter_state, found = read_adapter_directory(
            request.adapter_dir, request.adapter or "default"
        )
        beside[request.adapter_dir] = adapter_state.catalogue

    def configure(chosen: Adapter) -> AdapterConfig:
        config = found if request.adapter_config is None else None
        config = config or chosen.configured(request.adapter_config, near, None, None)
        return with_given(config, lora_alpha=request.lora_alpha, base_model=None, for_file=False)

    state = merged_state(
        states,
        adapter_state=adapter_state,
        adapter=request.adapter,
        configure=configure,
        dtype=request.dtype,
    )
    return _Combined(state, None, beside)


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
    named = {"--config": request.config, "--tokenizer": request.tokenizer, "--like": request.like}
    unused = [option for option, path in named.items() if path is not None]
    if request.weights_only and unused:
        yield (
            f"{', '.join(unused)} had no effect: --weights-only writes the tensors of the checkpoint "
            "under the names that they have there"
        )
