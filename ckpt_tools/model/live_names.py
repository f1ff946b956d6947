"""States under the same names: those of the model in memory, where the hub's are others.

Owns the choice of the layout in which the targets of an adapter are looked for, and in which states of one
model are averaged. PEFT wraps the model in memory. Its adapters have those names, or older ones of the hub,
and a base from a directory has hub names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckpt_tools.hub import ConfigSource
from ckpt_tools.hub.reference import ReferenceModel
from ckpt_tools.model.adapter import state_names
from ckpt_tools.model.fit import ask_model
from ckpt_tools.model.state import State, main_dtype
from ckpt_tools.tensors.catalogue import Catalogue
from ckpt_tools.tensors.derived import cast
from ckpt_tools.transforms.hub_layout import layout_of
from ckpt_tools.transforms.live_layout import lacking_modules, live_layout, live_modules
from ckpt_tools.transforms.lora import PREFIX, plain_name

_BASE_UNDONE = "the base was brought into the layout of the model in memory, which the adapter has"


@dataclass(frozen=True)
class Layouts:
    """The states of a merge.

    Attributes:
        states: the checkpoint first.
        adapter: the state of an adapter's directory, if any.
        ties: names that the model of the config ties, under the names of the base. A directory lacks the
            second ones.
    """

    states: Sequence[State]
    adapter: State | None
    ties: Mapping[str, str] = field(default_factory=dict)


def in_one_layout(given: Layouts, config: ConfigSource | None, *, trust: bool) -> Layouts:
    """The states with the adapter's targets and the base under the same names, as far as possible.

    Nothing changes where every target is found as it is, or where the model of the config is not known.
    """
    found = _in_one_layout(given, config, trust=trust)
    return replace(found, ties=_ties_of_base(found, config, trust=trust))


def _ties_of_base(given: Layouts, config: ConfigSource | None, *, trust: bool) -> Mapping[str, str]:
    held = next((s for s in reversed(given.states) if state_names(s).plain), None)
    if config is None or held is None:
        return {}
    # In the training dtype, because the fit of the merged model asks the same question then.
    plain = {
        name: cast(held.catalogue[old], held.dtypes[old])
        for old, name in state_names(held).plain.items()
        if old in held.dtypes
    }
    model = ask_model(Catalogue(plain), config, None, main_dtype(plain), trust=trust).result()
    if model is None:
        return {}
    return model.hub_ties if layout_of(plain, model) == "hub" else model.ties


def _in_one_layout(given: Layouts, config: ConfigSource | None, *, trust: bool) -> Layouts:
    wrapped = _wrapped(given.adapter or given.states[0])
    if not wrapped or not _is_open(given, wrapped):
        return given
    given = _with_same_head(given, wrapped)
    lacking = _lacking(given, _wrapped(given.adapter or given.states[0]))
    if config is None or not _is_open(given, _wrapped(given.adapter or given.states[0])):
        return given
    # What a directory holds has hub names; what the run saved has those of the model in memory.
    first = 0 if given.adapter is not None else 1
    if not any(state.catalogue for state in given.states[first:]):
        return given
    held = next(state for state in reversed(given.states[first:]) if state.catalogue)
    answer = ask_model(held.catalogue, config, None, main_dtype(held.catalogue), trust=trust)
    model = answer.result()
    if model is None:
        return given
    states = [
        _undone(state, model) if number >= first else state
        for number, state in enumerate(given.states)
    ]
    adapter = given.adapter
    if adapter is not None:
        adapter = _renamed(adapter, live_modules(model))
    found = Layouts(states, adapter)
    after = _lacking(found, _wrapped(adapter or states[0]))
    return found if not after or len(after) < len(lacking) else given


def alike(states: Sequence[State], config: ConfigSource | None, *, trust: bool) -> Sequence[State]:
    """States of one model under the same names, as far as the model of the config tells.

    Nothing changes where all have the same names, or where the model of the config is not known.
    """
    if config is None or all({*s.catalogue} == {*states[0].catalogue} for s in states):
        return states
    found = []
    for number, state in enumerate(states, start=1):
        model = ask_model(
            state.catalogue, config, None, main_dtype(state.catalogue), trust=trust
        ).result()
        if model is None:
            return states
        note = f"checkpoint {number} was brought into the layout of the model in memory"
        found.append(_with_second_names(_undone(state, model, note), model))
    return found


def _with_second_names(state: State, model: ReferenceModel) -> State:
    """A state with the second names that the model gives to its tensors, and that it does not hold."""
    held = state.catalogue
    ties = dict(held.ties)
    for pair in model.ties.items():
        for lacking, there in (pair, pair[::-1]):
            if lacking not in held and there in held:
                ties[lacking] = held.ties.get(there, there)
    return replace(state, catalogue=Catalogue(dict(held.items()), ties))


def _is_open(given: Layouts, wrapped: Sequence[str]) -> bool:
    """Whether the model of the config may change what the adapter is merged into."""
    return (
        bool(_lacking(given, wrapped)) or _others_have_more(given) or _changes_one_of_a_tie(given)
    )


def _changes_one_of_a_tie(given: Layouts) -> bool:
    """Whether the adapter may change one name of a tied tensor whose second name a directory leaves out.

    In training that name keeps its own value, and only the model of the config knows it.
    """
    if given.adapter is None and len(given.states) == 1:
        return False
    names = state_names(given.adapter or given.states[0])
    parts = [part for parts in names.adapters.values() for part in parts]
    changes = any(part.replaces or part.container == "lora_embedding_A" for part in parts)
    return changes or (given.adapter is not None and bool(names.base))


def _others_have_more(given: Layouts) -> bool:
    """Whether the base has names that a checkpoint with all its targets lacks: other names, perhaps."""
    first, *others = given.states
    plain = {*state_names(first).plain.values()}
    more = any(not plain >= {*other.catalogue, *other.catalogue.ties} for other in others)
    return given.adapter is None and more and not lacking_modules(_wrapped(first), plain)


def _with_same_head(given: Layouts, wrapped: Sequence[str]) -> Layouts:
    """The adapter with the prefix of the base: one of the two may be of the model without its head.

    ``AutoModel`` loads a model without head from the directory of a model with one, and the reverse, so
    names with and without ``model.`` belong together.
    """
    if given.adapter is None:
        return given
    names = _names(given)
    first, _, below = wrapped[0].partition(".")
    heads = {name.partition(".")[0] for name in names if f".{wrapped[0]}." in f".{name}"}
    if len(heads) == 1:
        (head,) = heads
        modules = {module: f"{head}.{module}" for module in wrapped}
    elif f"{below}.weight" in names:
        modules = {module: module.removeprefix(f"{first}.") for module in wrapped}
    else:
        return given
    if lacking_modules(list(modules.values()), names):
        return given
    note = f"the adapter's targets got the names of the base, such as {modules[wrapped[0]]} ({wrapped[0]})"
    renamed = _renamed(given.adapter, modules)
    first_state = given.states[0]
    first_state = replace(first_state, notes=(*first_state.notes, note))
    return Layouts([first_state, *given.states[1:]], renamed)


def _undone(state: State, model: ReferenceModel, note: str = _BASE_UNDONE) -> State:
    """A state in the live layout, if it is in that of the hub."""
    layout = layout_of(state.catalogue, model)
    if layout == "live":
        return state
    catalogue, origin = live_layout(state.catalogue, model)
    notes = [note] if layout == "hub" else []
    return State(
        catalogue,
        {name: state.dtypes[origin.get(name, name)] for name in catalogue},
        {name: state.kinds[origin.get(name, name)] for name in catalogue},
        (*state.notes, *notes),
        state.warnings,
    )


def _wrapped(state: State) -> list[str]:
    """The modules that adapters of a state wrap, under plain names."""
    adapters = state_names(state).adapters
    return list(
        dict.fromkeys(plain_name(part.module) for parts in adapters.values() for part in parts)
    )


def _lacking(given: Layouts, wrapped: Sequence[str]) -> list[str]:
    return lacking_modules(wrapped, _names(given))


def _names(given: Layouts) -> set[str]:
    """The names of the base, under plain names."""
    names = {*state_names(given.states[0]).plain.values()}
    for other in given.states[1:]:
        names |= {*other.catalogue, *other.catalogue.ties}
    return names


def _renamed(adapter: State, modules: dict[str, str]) -> State:
    """An adapter with the names of the model in memory in the place of those of the hub."""
    names = {}
    for name in (*adapter.catalogue, *adapter.catalogue.ties):
        segments = name.removeprefix(PREFIX).split(".")
        cut = next(
            (n for n in range(len(segments) - 1, 0, -1) if ".".join(segments[:n]) in modules), 0
        )
        live = modules.get(".".join(segments[:cut]))
        head = PREFIX if name.startswith(PREFIX) else ""
        names[name] = name if live is None else head + ".".join([live, *segments[cut:]])
    catalogue = Catalogue(
        {names[name]: tensor for name, tensor in adapter.catalogue.items()},
        {names[alias]: names[kept] for alias, kept in adapter.catalogue.ties.items()},
    )
    return replace(
        adapter,
        catalogue=catalogue,
        dtypes={names[name]: dtype for name, dtype in adapter.dtypes.items()},
        kinds={names[name]: kind for name, kind in adapter.kinds.items()},
    )
