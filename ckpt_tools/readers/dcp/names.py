"""Owns the answer which entries of a torch Distributed Checkpoint belong to a model, and their names in it.

A checkpoint is one flat mapping of all that a training loop passed to ``dcp.save``: a model, directly or
below keys of the loop's choice, optimizer, scheduler, progress. The metadata has the keys of each entry in
the nested state, so dots in names are not interpreted. A model is a group of tensors in one dict. An
optimizer is recognised by its ``param_groups`` or by its key.

Sources: ``torch/distributed/checkpoint/_nested_dict.py`` (the paths), ``state_dict.py`` (optimizers),
torchtitan ``components/checkpointer/dcp.py`` (a flat model among other keys), Lightning's FSDP strategy
(``optimizer_0``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

from ckpt_tools.readers.dcp.metadata import KeyPath, Metadata

# Keys that training loops use beside a model, never inside one.
_OPTIMIZER_KEYS = frozenset({"optim", "optims", "optimizer", "optimizers"})
# Of an object that may hold the whole loop, with the model in a dict of its own.
_LOOP_KEYS = frozenset({"train_state", "trainer", "trainer_state"})
_TRAINING_KEYS = (
    _OPTIMIZER_KEYS
    | _LOOP_KEYS
    | {
        "dataloader",
        "grad_scaler",
        "lr_scheduler",
        "lr_schedulers",
        "optim_state",
        "optim_state_dict",
        "optimizer_state",
        "optimizer_state_dict",
        "optimizer_states",
        "rng",
        "rng_state",
        "rng_states",
        "sampler",
        "scaler",
        "scheduler",
        "schedulers",
    }
)
_NUMBER = re.compile(r"_\d+$")
_STEP = re.compile(r"(?:^|[-_.])(?:(?:global_)?step|checkpoint|iter)[-_]?(\d+)$")
_STEP_KEYS = {"step", "global_step", "current_step"}
TOP = "top"


@lru_cache(maxsize=1)
def models(metadata: Metadata) -> Mapping[str, Mapping[str, str]]:
    """The models of a checkpoint; the last result is kept, because several steps need it.

    Returns:
        For each model, by its keys (``app.model``, or ``top`` for a flat model): name in the model to flat
        name in the checkpoint, in the order of the state dict.
    """
    # Where nothing else is a model, it is below the key of such an object.
    return _groups(metadata, _TRAINING_KEYS) or _groups(metadata, _TRAINING_KEYS - _LOOP_KEYS)


def _groups(metadata: Metadata, beside: frozenset[str]) -> Mapping[str, Mapping[str, str]]:
    """The models of a checkpoint; no key on the way to one is in ``beside``."""
    optimizers = _optimizer_roots(metadata)
    groups: dict[KeyPath, dict[str, str]] = {}
    for flat in _in_order(metadata.tensors, metadata.paths):
        path = metadata.path_of(flat)
        root = path[:-1]
        if not _is_beside_a_model(path, optimizers, beside) and not _is_below(
            _LOOP_KEYS, root[-1:]
        ):
            if root not in groups:
                groups[root] = {}
            groups[root][str(path[-1])] = flat
    # A counter or a seed that is a tensor among plain numbers is not a model.
    sized = {
        root: names
        for root, names in groups.items()
        if any(len(metadata.tensors[flat].shape) > 1 for flat in names.values())
    }
    return {label(root): names for root, names in sized.items()}


def label(root: KeyPath) -> str:
    """The name for users of the dict with these keys."""
    return ".".join(map(str, root)) or TOP


def left_alone(metadata: Metadata, taken: Iterable[str]) -> dict[str, int]:
    """Number of entries that are not in the flat names ``taken``, by the key that distinguishes them."""
    taken = set(taken)
    roots = {metadata.path_of(flat)[:-1] for flat in taken}
    counts: dict[str, int] = {}
    for flat in (*metadata.tensors, *metadata.objects):
        if flat not in taken:
            path = metadata.path_of(flat)
            depth = 1
            while depth < len(path) - 1 and any(root[:depth] == path[:depth] for root in roots):
                depth += 1
            key = label(path[:depth]) if len(path) > 1 else str(path[0]).split(".")[0]
            counts[key] = counts.get(key, 0) + 1
    return counts


def objects_of(metadata: Metadata, root: str) -> list[str]:
    """Names of entries in a model's dict that are not tensors, without ``_extra_state``."""
    return [
        str(path[-1])
        for path in map(metadata.path_of, metadata.objects)
        if label(path[:-1]) == root
        and not _is_beside_a_model(path, frozenset(), _TRAINING_KEYS - _LOOP_KEYS)
        and (root != TOP or "." in str(path[-1]))
    ]


def step_names(metadata: Metadata) -> list[str]:
    """Flat names of entries that hold the number of steps, the most direct first."""
    optimizers = _optimizer_roots(metadata)
    recorded: list[str] = []
    counted: list[str] = []
    for flat in (*metadata.objects, *metadata.tensors):
        path = metadata.path_of(flat)
        if _is_of_optimizer(path, optimizers):
            # Adam counts its steps for each parameter; one counter is enough.
            tensor = metadata.tensors.get(flat)
            if not counted and tensor and not tensor.shape and str(path[-1]).endswith("step"):
                counted.append(flat)
        elif path[-1] in _STEP_KEYS:
            recorded.append(flat)
    return sorted(recorded, key=lambda flat: len(metadata.path_of(flat))) + counted


def step_in(name: str) -> int | None:
    """The number of steps in a directory's name: ``step-200``, ``global_step200``."""
    match = _STEP.search(name)
    return int(match[1]) if match else None


def _in_order(names: Mapping[str, object], order: Mapping[str, object]) -> Iterator[str]:
    """``names`` in the order of another mapping: the state dict's, not that of the written entries."""
    yield from (name for name in order if name in names)
    yield from (name for name in names if name not in order)


@lru_cache(maxsize=1)
def _optimizer_roots(metadata: Metadata) -> frozenset[KeyPath]:
    """The keys of optimizers: the parents of each ``param_groups``, nested or flattened into one key."""
    roots = set()
    for flat in (*metadata.objects, *metadata.tensors):
        if "param_groups" in flat:  # the name is made of the keys
            path = metadata.path_of(flat)
            roots |= {path[:i] for i, key in enumerate(path) if _first(key) == "param_groups"}
    return frozenset(roots)


def _first(key: str | int) -> str:
    """The part of a key before its first dot."""
    return str(key).partition(".")[0]


def _is_beside_a_model(
    path: KeyPath, optimizers: frozenset[KeyPath], beside: frozenset[str]
) -> bool:
    return (
        _is_of_optimizer(path, optimizers)
        or _is_below(beside, path[:-1])
        or _is_extra_state(path[-1])
        or any(map(_is_extra_state, path[:-1]))
    )


def _is_extra_state(key: str | int) -> bool:
    """Whether a key is that of a module's extra state: bytes, or tensors that are not weights."""
    return str(key).endswith("_extra_state") and str(key).rpartition(".")[2] == "_extra_state"


def _is_of_optimizer(path: KeyPath, optimizers: frozenset[KeyPath]) -> bool:
    if len(path) == 1 and _first(path[0]) in _OPTIMIZER_KEYS:
        return True
    if optimizers and any(
        path[:depth] in optimizers and _first(path[depth]) in {"state", "param_groups"}
        for depth in range(len(path))
    ):
        return True
    return _is_below(_OPTIMIZER_KEYS, path[:-1])


# A state has a million names, and its tensors have a few dicts.
@lru_cache(maxsize=1024)
def _is_below(known: frozenset[str], root: KeyPath) -> bool:
    """Whether a key on the way to a dict is one of these, with a number or without."""
    return any(_NUMBER.sub("", str(key)).lower() in known for key in root)
