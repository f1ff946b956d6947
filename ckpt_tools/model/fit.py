"""Fits a state to the model that its config describes: names, shapes, ties, and nothing missing.

Owns the questions that need both the tensors and the model: which tied names are written, which tensors of
the model are missing, and whether the config describes this model. :mod:`ckpt_tools.hub.reference` finds the
tensors of a model from its config alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ckpt_tools.errors import CkptError, DamagedCheckpoint, UsageError, listed
from ckpt_tools.errors import tensors as tensors_text
from ckpt_tools.hub import ConfigSource
from ckpt_tools.hub.config import embedding_rows, finish
from ckpt_tools.hub.reference import Answer, ReferenceModel, start
from ckpt_tools.model.heads import refuse_other_head, without_heads_of_base
from ckpt_tools.tensors.catalogue import Catalogue, Tensor
from ckpt_tools.tensors.dtypes import BFLOAT16, FLOAT16, DType
from ckpt_tools.tensors.gather import Gatherer
from ckpt_tools.tensors.windows import first_difference
from ckpt_tools.transforms.hub_layout import HubLayout, hub_layout
from ckpt_tools.transforms.lora import is_adapted
from ckpt_tools.transforms.ties import settle_ties

_UNKNOWN = (
    "transformers has no such model (custom code?): names, shapes and completeness were not checked"
)
_UNTIED = (
    "{} is tied in the config but holds values of its own: both are written, and "
    "tie_word_embeddings becomes false"
)


@dataclass(frozen=True)
class Fitted:
    """A state whose names are those of the model.

    Attributes:
        catalogue: the tensors to write, under their names in the output.
        untied: names that the config ties but that hold values of their own.
        notes: what was decided.
        warnings: what to look at.
    """

    catalogue: Catalogue
    untied: tuple[str, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @classmethod
    def unchecked(cls, catalogue: Catalogue) -> Fitted:
        """The state as it is."""
        notes = tuple(
            f"{a} shares its values with {k}, which is written" for a, k in catalogue.ties.items()
        )
        return cls(catalogue, (), notes, ())


def fit_to_model(
    catalogue: Catalogue,
    config: ConfigSource,
    extra: Catalogue | None,
    dtype: DType,
    *,
    trust: bool = False,
    answer: Answer | None = None,
    second_names: bool = False,
    of_base: Collection[str] = (),
) -> Fitted:
    """Make the state fit the model of ``config``.

    Args:
        catalogue: the state, wrappers stripped, in the dtypes of the output.
        config: the model's config.
        extra: tensors to take where the state lacks them (``--like``).
        dtype: dtype of the output as a whole.
        trust: whether custom code beside the config may be run, in a process of its own.
        answer: of :func:`ask_model` with the same arguments, if it was asked before.
        second_names: whether second names of a tensor are written; the notes say so.
        of_base: names of tensors of an adapter's base, whose class may be another one.

    Raises:
        UsageError: the config is of another model.
        DamagedCheckpoint: tensors of the model are missing.
    """
    like = None if extra is None else set(extra)
    answer = answer or ask_model(catalogue, config, extra, dtype, trust=trust)
    reference = answer.result()
    if reference is None:
        fitted = Fitted.unchecked(catalogue)
        return Fitted(fitted.catalogue, (), fitted.notes, (_UNKNOWN,))
    layout = hub_layout(catalogue, reference)
    held, dropped = without_heads_of_base(layout.catalogue, of_base, reference)
    known = {**reference.saved, **reference.tied}
    settled = settle_ties(held, reference.hub_ties, known, _equal)
    tied = reference.hub_ties
    if settled.untied:
        reference = (
            _ask(catalogue, config, dtype, like, trust=trust, untied=True).result() or reference
        )
    tensors = dict(settled.catalogue.items())
    # A model whose weights are tied no more saves every second name, those of equal values too.
    again = {alias: kept for alias, kept in tied.items() if alias in reference.saved}
    tensors |= {a: tensors[k] for a, k in again.items() if a not in tensors and k in tensors}
    lacking = [name for name in reference.saved if name not in tensors]
    refuse_other_head(lacking, tensors, reference, config)
    surplus = [name for name in tensors if name not in reference.saved]
    if lacking:
        # Before --like fills in what is lacking: it could fill in the whole of another model.
        _refuse_another_model(lacking, surplus, tensors, reference, config)
    taken = {name: extra[name] for name in lacking if name in extra} if extra is not None else {}
    tensors |= taken
    missing = [name for name in lacking if name not in tensors]
    if missing:
        # A shape that does not fit proves another model; a tensor that is missing does not.
        _shape_warnings(tensors, reference, config)
        raise _incomplete(missing, surplus, reference, config)
    ordered = {name: tensors[name] for name in (*reference.saved, *surplus)}
    warnings = [
        *(_UNTIED.format(name) for name in settled.untied),
        *_shape_warnings(tensors, reference, config),
        *_rounded(ordered, reference, dtype),
        *_not_floating(ordered, reference, config),
    ]
    if taken:
        warnings.append(f"taken from --like, because the checkpoint lacks them: {listed([*taken])}")
    if surplus:
        warnings.append(f"not in the model of the config, but written: {listed(surplus)}")
    # A checkpoint may lack second names, as Accelerate's do; the output is the same.
    ties = {**reference.hub_ties, **settled.catalogue.ties}
    ties = {alias: kept for alias, kept in ties.items() if alias not in ordered}
    notes = [*dropped, *_notes(layout, ties, settled.duplicated, second_names)]
    seconds = {alias: kept for alias, kept in ties.items() if kept in ordered}
    return Fitted(Catalogue(ordered, seconds), settled.untied, tuple(notes), tuple(warnings))


def _notes(
    layout: HubLayout, ties: Mapping[str, str], duplicated: Sequence[str], second_names: bool
) -> list[str]:
    notes = []
    if layout.renamed:
        old, new = next(iter(layout.renamed.items()))
        notes.append(
            f"{tensors_text(len(layout.renamed))} got their hub names, such as {new} ({old})"
        )
    if layout.converted:
        new, parts = next(iter(layout.converted.items()))
        notes.append(
            f"{tensors_text(len(layout.converted))} brought into the hub's layout, such as {new} "
            f"(from {listed(parts, 2)})"
        )
    if layout.ignored:
        notes.append(f"left out, as save_pretrained does: {listed(layout.ignored)}")
    what = "shares its bytes" if second_names else "left out"
    notes += [f"{alias} is tied to {kept} and {what}" for alias, kept in ties.items()]
    notes += [
        f"{name} is tied in training but not in the config; written twice" for name in duplicated
    ]
    return notes


def ask_model(
    catalogue: Catalogue,
    config: ConfigSource,
    extra: Catalogue | None,
    dtype: DType,
    *,
    trust: bool = False,
) -> Answer:
    """Begin to ask which model the config describes; the arguments are those of :func:`fit_to_model`.

    The answer takes seconds and is found in a child process; the caller can work meanwhile.
    """
    like = None if extra is None else set(extra)
    return _ask(catalogue, config, dtype, like, trust=trust, untied=False)


def _ask(
    catalogue: Catalogue,
    config: ConfigSource,
    dtype: DType,
    like: Collection[str] | None,
    *,
    trust: bool,
    untied: bool,
) -> Answer:
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in catalogue.items()}
    return start(
        finish(config, shapes, dtype=dtype, untied=untied).data,
        like_names=like,
        code_dir=config.path.parent if trust else None,
        trust_remote_code=trust,
        tensors=len(catalogue),
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype:
        return False
    with Gatherer() as gatherer:
        return first_difference(gatherer, a, b) is None


def _refuse_another_model(
    lacking: Sequence[str],
    surplus: Sequence[str],
    tensors: Mapping[str, Tensor],
    reference: ReferenceModel,
    config: ConfigSource,
) -> None:
    """Refuse a state with adapters, and the config of another model."""
    if is_adapted(surplus):
        raise UsageError(
            f"the checkpoint holds a LoRA adapter ({listed([n for n in surplus if '.lora_' in n], 2)})",
            path=config.path,
            hint="Write the adapter with extract-lora, or the model with the adapter merged with merge-lora. "
            "--weights-only writes the tensors under the names that they have.",
        )
    if len(lacking) == len(reference.saved) or len(surplus) > len(tensors) // 2:
        tops = sorted({name.split(".")[0] for name in tensors})
        numbered = "called"
        hint = (
            f"Top-level attributes of the checkpoint: {', '.join(tops)}. Pass the config of the "
            "model that was trained, write one attribute with extract-attr, name the tensors with "
            "--key-map FILE, or pass --weights-only to write them under these names."
        )
        if tops[0].isdigit():
            numbered = "numbered by the layers of a pipeline, such as"
            hint = (
                "Name the tensors with --key-map FILE, which docs/formats.md describes, or pass "
                "--weights-only to write them under these names."
            )
        raise UsageError(
            f"the config describes {reference.architecture}, whose tensors are called "
            f"{listed(lacking[:2])}; those of the checkpoint are {numbered} {listed(surplus[:2])}",
            path=config.path,
            hint=hint,
        )


def _incomplete(
    missing: Sequence[str],
    surplus: Sequence[str],
    reference: ReferenceModel,
    config: ConfigSource,
) -> CkptError:
    """The refusal of a checkpoint without tensors of the model; with tensors of another, of the config."""
    lacks = (
        f"the checkpoint lacks {tensors_text(len(missing))} of {reference.architecture}: "
        f"{listed(missing, 50)}"
    )
    if surplus:
        return UsageError(
            f"{lacks}; and the model has no {listed(surplus, 5)}",
            path=config.path,
            hint="Pass the config of the model that was trained (--config FILE|DIR). If it is this one, and "
            "the run saved with exclude_frozen_parameters, --like DIR takes the frozen tensors from a "
            "directory of the base model.",
        )
    return DamagedCheckpoint(
        lacks,
        path=config.path,
        missing=missing,
        hint="Frozen parameters are left out when a run saves with exclude_frozen_parameters. "
        "--like DIR takes them from a Hugging Face directory of the base model. If the config is that of a "
        "larger model, pass the one that was trained: --config FILE|DIR.",
    )


def _shape_warnings(
    tensors: Mapping[str, Tensor], reference: ReferenceModel, config: ConfigSource
) -> list[str]:
    """Tensors whose axes have another order; any other shape is an error."""
    turned = []
    for name, saved in reference.saved.items():
        if name not in tensors or (shape := tensors[name].shape) == saved.shape:
            continue
        if sorted(shape) != sorted(saved.shape):
            rows = embedding_rows({n: (t.dtype, t.shape) for n, t in tensors.items()})
            if saved.shape[:1] == (rows,) and shape[1:] == saved.shape[1:]:
                raise UsageError(
                    f"it has {shape[0]} rows, and the embedding of the vocabulary has {rows}: one of them "
                    "was resized without the other",
                    path=config.path,
                    tensor=name,
                    hint="An adapter directory holds the adapted layers alone. Merge the checkpoint of "
                    "the training run, or take as the base the resized model that was trained.",
                )
            raise UsageError(
                f"its shape is {shape}, but the config describes {saved.shape}",
                path=config.path,
                tensor=name,
                hint="Pass the config of the model that was trained (--config FILE|DIR).",
            )
        turned.append(name)
    if not turned:
        return []
    return [f"the axes of these have another order than in the model: {listed(turned)}"]


def _rounded(tensors: Mapping[str, Tensor], reference: ReferenceModel, dtype: DType) -> list[str]:
    """Tensors that are written in 16 bits although the model computes with them in fp32."""
    kept = {BFLOAT16: reference.float32_under_bfloat16, FLOAT16: reference.float32_under_float16}
    names = [n for n in kept.get(dtype, ()) if n in tensors and tensors[n].dtype == dtype]
    if not names:
        return []
    return [
        f"written in {dtype}, although the model keeps them in float32: {listed(sorted(names))}"
    ]


def _not_floating(
    tensors: Mapping[str, Tensor], reference: ReferenceModel, config: ConfigSource
) -> list[str]:
    """A warning for integers in the place of floating parameters, where no quantizer makes weights of them.

    ``from_pretrained`` casts what it reads to the dtype of the parameter. Integers stay the same numbers.
    Complex numbers lose their imaginary part, so that the model would not be the one that was trained.

    Raises:
        UsageError: complex numbers are in the place of floating parameters.
    """
    if "quantization_config" in config.data:
        return []
    names = [n for n in reference.saved if not tensors[n].dtype.is_floating]
    names = [name for name in names if reference.is_parameter(name)]
    if not names:
        return []
    for name in names:
        if str(dtype := tensors[name].dtype).startswith("complex"):
            raise UsageError(
                f"its dtype is {dtype}, and the model of the config has a real parameter there: transformers "
                "would drop the imaginary part",
                path=config.path,
                tensor=name,
                hint="Pass the config of the model that was trained (--config FILE|DIR), or pass "
                "--weights-only to write the tensors as they are.",
            )
    dtypes = listed(sorted({str(tensors[name].dtype) for name in names}))
    what = f"transformers will cast these from {dtypes}: {listed(names)}"
    return [f"the model has floating-point parameters, and {what}"]
