"""Owns the shapes of a request's model, for checkpoints that do not state how their parts are joined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ckpt_tools.conversion.request import Request
from ckpt_tools.errors import MissingAsset
from ckpt_tools.hub import find_config
from ckpt_tools.hub.reference import start
from ckpt_tools.tensors.regions import Shape


@dataclass(frozen=True)
class ModelShapes:
    """Asks transformers when it is called.

    Attributes:
        request: what was asked for.
        near: directories in which the config may lie.
    """

    request: Request
    near: tuple[Path, ...]

    def __call__(self) -> Mapping[str, Shape] | None:
        """The shapes by live name; None if there is no config, or no model of transformers that fits it.

        Raises:
            CkptError: the config cannot be read, or transformers failed.
        """
        request = self.request
        if request.weights_only and request.config is None:
            return None
        try:
            config = find_config(replace(request, search=self.near))
        except MissingAsset:
            if request.config is not None:
                raise
            return None
        if not config.data.get("architectures"):
            return None
        reference = start(config.data).result()
        if reference is None:
            return None
        return {name: tensor.shape for name, tensor in reference.live.items()}
