"""Owns what the configs near the sources say of a quantiser, and what of it goes into the output's config."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ckpt_tools.conversion.request import Request
from ckpt_tools.errors import DamagedCheckpoint, UnsupportedLayout, UsageError, listed
from ckpt_tools.errors import tensors as tensors_text
from ckpt_tools.hub.config import ConfigSource
from ckpt_tools.model.quantised import KEY, quantizer_of, unknown_codes
from ckpt_tools.model.state import State
from ckpt_tools.tensors.checkpoint import Checkpoint, Copy


def configs_near(source: Checkpoint, request: Request) -> list[Path]:
    """Where the config of a source may lie, nearest first."""
    named = [] if request.config is None else [request.config]
    return [*named, _own(source), *source.location.near]


def _own(source: Checkpoint) -> Path:
    place = source.location.directory
    return place.parent if place.is_file() else place


def with_quantizer(
    config: ConfigSource | None, state: State, stored: Collection[str]
) -> tuple[ConfigSource | None, State]:
    """The config with ``quantization_config`` where weights stay quantised, without it where none is.

    Args:
        config: the config, if one is written.
        state: the state that is written.
        stored: its tensors that stay as a quantiser stored them.
    """
    if config is None:
        return config, state
    has = KEY in config.data
    if stored and not has:
        raise UsageError(
            f"the checkpoint holds {tensors_text(len(stored))} of a quantiser, "
            f"and the config has no {KEY}: "
            f"{listed(sorted(stored))}",
            path=config.path,
            hint="Pass --dequantize for 16-bit weights, or --config with the config of the quantised model.",
        )
    if stored or not has:
        return config, state
    plain = {key: value for key, value in config.data.items() if key != KEY}
    note = f"{KEY} was left out of config.json, because no weight is quantised"
    return replace(config, data=plain), replace(state, notes=(*state.notes, note))


@contextmanager
def unknown_quantisers_named(sources: Sequence[Checkpoint], copy: Copy) -> Iterator[None]:
    """Where names do not fit, and a source has tensors of a quantiser that is not known, say so.

    Raises:
        UnsupportedLayout: in the place of an error about names.
    """
    try:
        yield
    except (DamagedCheckpoint, UsageError) as error:
        for source in sources:
            quantizer = quantizer_of([_own(source)])
            codes = unknown_codes(source.catalogue(copy)) if quantizer else []
            if codes:
                raise UnsupportedLayout(
                    f"its config names the quantiser {quantizer.get('quant_method')!r}, and this way of "
                    f"storing weights is not known: {listed(codes)}",
                    path=_own(source),
                    hint="merge-lora takes the 16-bit weights of another directory with --base DIR, and "
                    "--weights-only copies the tensors as they are. Or load the model with the library that "
                    "quantised it, dequantise it there, and save that.",
                ) from error
        raise
