"""Owns the search for the state dict in a rank's file: it is the content, or stands under a key of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt_tools.errors import NoModel, UnsupportedLayout, listed
from ckpt_tools.readers.containers.restricted_pickle import Opaque, TensorRef


def state_dict_in(content: Mapping[Any, Any], path: Path) -> Mapping[Any, Any]:
    """The state dict in a rank's file. Entries of an optimizer look like one, so their keys are passed over.

    Raises:
        UnsupportedLayout: there are several.
        NoModel: there is none.
    """
    if any(isinstance(value, TensorRef | Opaque) for value in content.values()) or not content:
        return content
    found = {
        str(key): value
        for key, value in content.items()
        if isinstance(value, Mapping)
        and "optim" not in str(key).lower()
        and any(isinstance(held, TensorRef | Opaque) for held in value.values())
    }
    if len(found) == 1:
        return next(iter(found.values()))
    keys = listed([*map(str, content)])
    if not found:
        raise NoModel(
            f"it holds no state dict of a model: its entries are {keys}",
            path=path,
            hint="Save model.state_dict() of each rank, alone or under a key such as model.",
        )
    raise UnsupportedLayout(
        f"it holds {len(found)} state dicts: {listed([*found])}",
        path=path,
        hint="Save the state dict of one model in each file.",
    )
