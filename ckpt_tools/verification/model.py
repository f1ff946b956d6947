"""Owns the comparison of the tensors with the config's model: missing, unexpected, wrong shapes, ties.

:mod:`ckpt_tools.hub.reference` finds without weights what transformers would write for the config. If the
directory has the layout of another version of transformers, that layout is expected.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from ckpt_tools.errors import CkptError, UsageError, counted, listed
from ckpt_tools.hub.config import text_value
from ckpt_tools.hub.reference import Live, ReferenceModel, SavedTensor, describe, leaves
from ckpt_tools.verification.config import is_quantized, note_vocabulary
from ckpt_tools.verification.container import Entry
from ckpt_tools.verification.directory import CONFIG, Directory
from ckpt_tools.verification.names import common_prefix, plain_names
from ckpt_tools.verification.problem import Findings
from ckpt_tools.verification.run import Run

ORDER = 10
_WHOSE = "tensors against the model"

# Returns the model in the layout of a directory with these names.
_Ask = Callable[[Collection[str]], ReferenceModel | None]


def check(run: Run) -> None:
    """Compare the tensors with the model of the config, and keep the model in ``run``."""
    run.reference = check_model(run.directory, run.findings)


def check_model(directory: Directory, findings: Findings) -> ReferenceModel | None:
    """Compare the tensors with the model of the config.

    Returns:
        The model; None if it is not known, with the reason in the skipped checks.
    """
    config, tensors = directory.config, directory.tensors
    if config is None or not tensors:
        if tensors:
            findings.skipped.append(f"{_WHOSE}: there is no config of a model")
        elif directory.unread:
            findings.skipped.append(f"{_WHOSE}: {listed(directory.unread)} cannot be read")
        plain_names(tensors, (), findings)
        return None
    reference = _asked(directory, None, findings)
    if reference is None or is_quantized(directory):
        if reference is not None:
            findings.skipped.append(f"{_WHOSE}: quantizers use their own names and shapes")
        plain_names(tensors, (), findings)
        return None
    known = {**reference.live, **reference.saved, **reference.tied}.keys()
    names = _with_known_prefix(plain_names(tensors, known, findings), reference, findings)
    if names is None:
        return reference
    _Comparison(directory, reference, names, findings).run(
        lambda like: _asked(directory, like, findings)
    )
    findings.checked.append(
        f"names and shapes of {reference.architecture} ({counted(len(reference.saved), 'tensor')})"
    )
    return reference


def _asked(
    directory: Directory, like: Collection[str] | None, findings: Findings
) -> ReferenceModel | None:
    config = directory.config or {}
    trust = directory.trust_remote_code
    if not config.get("architectures"):
        findings.skipped.append(f"{_WHOSE}: config.json has no architectures")
        return None
    try:
        found = describe(
            config,
            like_names=like,
            code_dir=directory.path if trust else None,
            trust_remote_code=trust,
            tensors=len(directory.every_tensor),
        )
    except UsageError as error:
        findings.add("config-invalid", error.fact, file=CONFIG)
        findings.skipped.append(f"{_WHOSE}: the config does not describe a model")
        return None
    except CkptError as error:
        findings.skipped.append(f"{_WHOSE}: {error.fact}")
        return None
    if found is None:
        name = config["architectures"][0]
        why = f"the installed transformers has no {name}"
        if "auto_map" in config and not trust:
            why = f"{name} is custom code; pass --trust-remote-code to run it"
        findings.skipped.append(f"{_WHOSE}: {why}")
    return found


def _with_known_prefix(
    names: Mapping[str, str], reference: ReferenceModel, findings: Findings
) -> Mapping[str, str] | None:
    """The names with the model's prefix, if all differ from the model's names in one prefix.

    Returns:
        Plain name to name in the files; None if the tensors belong to another model.
    """
    known = {**reference.live, **reference.saved, **reference.tied}.keys()
    if not names or not known or names.keys() & known:
        return names
    surplus = common_prefix(names)
    while surplus:
        if any(name.removeprefix(surplus) in known for name in names):
            first = next(iter(names.values()))
            findings.add(
                "name-wrapped",
                f"all names start with {surplus!r}, but names of {reference.architecture} do not",
                tensor=first,
                hint="Extract this part with ckpt-tools extract-attr CKPT ATTRIBUTE OUT.",
            )
            return {name.removeprefix(surplus): old for name, old in names.items()}
        surplus = surplus[: surplus[:-1].rfind(".") + 1]
    for prefix in sorted({name.split(".")[0] + "." for name in known}):
        if any(prefix + name in known for name in names):
            findings.add(
                "name-headless",
                f"the names lack the prefix {prefix!r} of {reference.architecture}: the model was saved "
                "without its head; transformers accepts this, some loaders do not",
                tensor=next(iter(names.values())),
            )
            return {name if name in known else prefix + name: old for name, old in names.items()}
    findings.add(
        "name-foreign",
        f"tensors of {reference.architecture} have names such as {listed(sorted(known), 2)}; "
        f"these are {listed(sorted(names), 2)}",
        file=CONFIG,
        tensor=next(iter(names.values())),
        hint="Replace config.json with that of the trained model.",
    )
    return None


@dataclass
class _Comparison:
    """The comparison of one directory with one model.

    Attributes:
        directory: the directory.
        model: the model in the layout that transformers would write.
        names: plain name to name in the files.
        findings: takes the problems.
    """

    directory: Directory
    model: ReferenceModel
    names: Mapping[str, str]
    findings: Findings

    def run(self, ask: _Ask) -> None:
        """Compare everything."""
        explained = self._in_memory_names()
        rest = self.names.keys() - explained
        passed_over: Collection[str] = ()
        if not self._fits(self.model, rest, explained):
            other = ask(rest)
            if other is not None:
                passed_over = other.passed_over
                if self._distance(other, rest) < self._distance(self.model, rest):
                    self.model = other
        self._compare_names(rest, explained, passed_over)
        self._compare_shapes(rest)

    def _in_memory_names(self) -> set[str]:
        """Names of the live model that the hub layout does not have, and the hub names they replace."""
        model, explained = self.model, set[str]()
        hub = {**model.saved, **model.tied}
        made: dict[str, list[str]] = {}
        for name, tensor in hub.items():
            for leaf in leaves(tensor.recipe):
                if isinstance(leaf, Live):
                    made.setdefault(leaf.name, []).append(name)
        found = {
            name: made[name]
            for name in sorted(self.names.keys() & (model.live.keys() - hub.keys() - model.ignored))
            if name in made
        }
        fused = {n for n, written in found.items() if not isinstance(hub[written[0]].recipe, Live)}
        for name, written in found.items():
            self._add(
                "name-in-memory",
                f"this is a tensor of the model in memory; a directory has {listed(written, 2)}"
                if name in fused
                else f"this is a name of the model in memory; a directory has {written[0]}",
                name,
                # Most loaders accept a different prefix.
                warn=not fused,
                hint="vLLM and other versions of transformers do not read it. ckpt-tools consolidate "
                "writes the hub layout.",
            )
            explained |= {name, *written}
        return explained

    def _fits(self, model: ReferenceModel, names: Collection[str], explained: set[str]) -> bool:
        wanted = model.saved.keys() - explained
        return wanted <= set(names) <= {**model.saved, **model.tied}.keys()

    def _distance(self, model: ReferenceModel, names: Collection[str]) -> int:
        """The number of missing and unexpected names."""
        both = {**model.saved, **model.tied}.keys()
        return len(model.saved.keys() - set(names)) + len(set(names) - both)

    def _compare_names(
        self, names: Collection[str], explained: set[str], passed_over: Collection[str]
    ) -> None:
        model, ties = self.model, self.model.hub_ties
        kept_by = {kept: [a for a, k in ties.items() if k == kept] for kept in ties.values()}
        absent = model.saved.keys() - set(names) - explained - self.directory.lost
        if self.directory.unread:
            unread = listed(self.directory.unread)
            self.findings.skipped.append(f"whether tensors are missing: {unread} cannot be read")
            absent = set()
        for name in absent:
            if _is_dispensable(model.saved[name], model):
                continue
            written = [alias for alias in kept_by.get(name, ()) if alias in names]
            if written:
                self._add(
                    "tie-other-name",
                    f"it is written as {written[0]}, which is tied to it; some loaders do not look there",
                    name,
                    warn=True,
                )
            elif name in kept_by:
                self._add("tie-missing", f"both it and {listed(kept_by[name])} are missing", name)
            else:
                self._add(
                    "tensor-missing", f"{model.architecture} needs it", name, hint=_advice(name)
                )
        for name in set(names) - {**model.saved, **model.tied}.keys():
            known = name in passed_over or name in model.ignored
            self._add(
                "tensor-unexpected",
                f"{model.architecture} has no such tensor"
                + ("; transformers ignores it" if known else ""),
                name,
                warn=known,
            )
        for name in model.tied.keys() & set(names):
            if ties[name] in names and not states_untied(self.directory):
                self._add(
                    "tie-written-twice",
                    f"the config ties it to {ties[name]}, but both are written",
                    name,
                    hint="Delete the second one, or set tie_word_embeddings to false if they differ.",
                )

    def _compare_shapes(self, names: Collection[str]) -> None:
        hub = {**self.model.saved, **self.model.tied}
        size = text_value(self.directory.config or {}, "vocab_size")
        resized: dict[int, list[str]] = {}
        for name in sorted(set(names) & hub.keys()):
            entry, wanted = self._entry(name), hub[name].shape
            found = entry.shape
            if found != wanted:
                if wanted and found[:1] != wanted[:1] == (size,) and found[1:] == wanted[1:]:
                    resized.setdefault(found[0], []).append(name)
                    continue
                self._add(
                    "shape-mismatch",
                    f"its shape is {list(found)}; the config gives {list(wanted)}",
                    name,
                )
            if (
                entry.dtype is not None
                and self.model.is_parameter(name)
                and not entry.dtype.is_floating
            ):
                self._add(
                    "dtype-integer", f"it is {entry.dtype}, but the config has no quantizer", name
                )
        for rows, resized_names in resized.items():
            assert isinstance(size, int)
            note_vocabulary(size, rows, resized_names, self.findings)

    def _entry(self, name: str) -> Entry:
        return self.directory.tensors[self.names[name]]

    def _add(
        self, kind: str, detail: str, name: str, *, warn: bool = False, hint: str | None = None
    ) -> None:
        entry = self.directory.tensors.get(self.names.get(name, name))
        self.findings.add(
            kind,
            detail,
            file=entry.file if entry is not None else None,
            tensor=self.names.get(name, name),
            hint=hint,
            severity="warning" if warn else None,
        )


def _advice(name: str) -> str | None:
    if re.search(r"(^|\.)(lm_head|embed_out)\.weight$", name):
        return "If the model ties its embeddings, set tie_word_embeddings to true."
    return None


def _is_dispensable(tensor: SavedTensor, model: ReferenceModel) -> bool:
    made_of = [leaf for leaf in leaves(tensor.recipe) if isinstance(leaf, Live)]
    return bool(made_of) and all(leaf.name in model.dispensable for leaf in made_of)


def written_ties(directory: Directory, model: ReferenceModel | None) -> Mapping[str, str]:
    """Second names that are written although the config ties them, each with the first name."""
    ties = {} if model is None else model.hub_ties
    return {alias: kept for alias, kept in ties.items() if alias in directory.tensors}


def states_untied(directory: Directory) -> bool:
    """Whether the config says that nothing is tied.

    Some classes, such as those of mT5, tie all the same. transformers 5 keeps both names apart where a
    directory holds different values of them (`PreTrainedModel.tie_weights`).
    """
    return text_value(directory.config or {}, "tie_word_embeddings") is False
