"""Owns the list of every kind of problem (``KINDS``), the findings of checks, and the verdict of a run.

A check reports problems of known kinds, what it checked, and what it could not check.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

Severity = Literal["error", "warning"]

SCHEMA_VERSION = 1


class Kind(NamedTuple):
    """A kind of problem.

    Attributes:
        severity: an error makes the directory bad; a warning needs a look.
        meaning: one line that explains it.
    """

    severity: Severity
    meaning: str


# Every kind, by the module that finds it. A module can bring more kinds in a ``KINDS`` of its own.
KINDS: dict[str, Kind] = {
    # directory.py: the files
    "file-unreadable": Kind("error", "a file cannot be read"),
    "leftover": Kind("error", "a file of a save, download or conversion that did not finish"),
    "duplicate-key": Kind("error", "a header, index or config has the same key twice"),
    # layout.py: weight files, the index and the shards
    "no-weights": Kind("error", "there are no weights that a loader would find"),
    "index-missing": Kind("error", "weight files that no loader looks for without an index"),
    "index-invalid": Kind("error", "the index of the shards is invalid"),
    "index-missing-shard": Kind("error", "the index names a file that is not there"),
    "index-tensor-missing": Kind("error", "a tensor of the index is not in the shard it names"),
    "index-tensor-unlisted": Kind("error", "a tensor of a shard is not in the index"),
    "index-total-size": Kind(
        "error", "the total size in the index differs from that of the tensors"
    ),
    "shard-stray": Kind("error", "a weight file that does not belong to the model"),
    "shard-numbering": Kind("error", "the numbers in the shards' names contradict each other"),
    "single-and-sharded": Kind("error", "one whole weight file and an index of shards"),
    "tensor-duplicate": Kind("error", "a tensor is in more than one weight file"),
    "pickled-weights": Kind("warning", "the weights are pickles, which can run code"),
    "pickled-weights-beside": Kind("warning", "pickled weights beside safetensors"),
    "pickled-invalid": Kind("error", "a pickled weight file cannot be read"),
    # container.py: one safetensors file
    "lfs-pointer": Kind("error", "a Git LFS pointer instead of the file"),
    "shard-truncated": Kind("error", "the file ends before its last tensor ends"),
    "trailing-bytes": Kind("error", "bytes after the last tensor"),
    "header-invalid": Kind("error", "the header of a safetensors file is damaged"),
    "header-unaligned": Kind("warning", "the data of a safetensors file does not start aligned"),
    "format-missing": Kind("warning", "the header does not say format: pt"),
    "dtype-unknown": Kind("error", "a dtype that safetensors does not define"),
    "tensor-size": Kind("error", "shape times dtype is not the number of bytes"),
    "data-hole": Kind("error", "bytes between tensors that belong to none"),
    "data-overlap": Kind("error", "two tensors share bytes"),
    # config.py: config.json
    "config-missing": Kind("error", "there is no config.json"),
    "config-invalid": Kind("error", "config.json is not the config of a model"),
    "config-architecture": Kind("error", "the class in the config is not that of the tensors"),
    "config-dtype": Kind("error", "the dtype in the config is not that of the tensors"),
    "config-vocabulary": Kind("error", "vocab_size in the config is not that of the embedding"),
    "dtype-mixed": Kind("warning", "floating tensors are of several dtypes"),
    # quantised.py: weights that a quantiser stores
    "quantizer-leftover": Kind("error", "tensors of a quantizer beside a weight that is plain"),
    "quantizer-unused": Kind("warning", "a quantization_config, and no quantized weight"),
    # names.py: names that a finished model does not have
    "name-wrapped": Kind("error", "names with the prefix of a training wrapper"),
    "name-peft": Kind("error", "names of a model that PEFT wraps"),
    "name-lora": Kind("error", "tensors of an adapter in a full model"),
    # model.py: tensors against the model that the config describes
    "name-foreign": Kind("error", "the tensors belong to another model than the config"),
    "name-headless": Kind("warning", "names of a model that was saved without its head"),
    "name-in-memory": Kind("error", "a name of the model in memory, not of the hub layout"),
    "tensor-missing": Kind("error", "a tensor of the model is missing"),
    "tensor-unexpected": Kind("error", "a tensor that the model does not have"),
    "shape-mismatch": Kind("error", "the shape of a tensor differs from the model's"),
    "dtype-integer": Kind("error", "an integer weight in a model that is not quantized"),
    "tie-missing": Kind("error", "no name of a tied tensor is written"),
    "tie-other-name": Kind("warning", "a tied tensor is written under its second name"),
    "tie-written-twice": Kind("warning", "both names of a tied tensor are written"),
    # adapter.py: adapters as PEFT writes them
    "adapter-config-invalid": Kind("error", "adapter_config.json is not the config of an adapter"),
    "adapter-type-unknown": Kind("error", "a peft_type that PEFT does not know"),
    "adapter-base-unnamed": Kind("warning", "the adapter does not name its base model"),
    "adapter-alpha": Kind("error", "lora_alpha is absent or not positive"),
    "adapter-rank": Kind("error", "r is absent, or a tensor has another rank"),
    "adapter-shape": Kind("error", "a tensor without its shape: a shard that was not gathered"),
    "adapter-pair": Kind("error", "a LoRA A without its B, or B without its A"),
    "adapter-target": Kind("error", "targets of the config and of the tensors differ"),
    "adapter-name": Kind("error", "a name that PEFT does not read"),
    "adapter-empty": Kind("error", "an adapter without a tensor of its kind"),
    "adapter-base-tensor": Kind("warning", "a tensor of the base model in an adapter"),
    "adapter-module-missing": Kind("error", "a module that is saved whole is not there"),
    # adapter_tensors.py: what the config of an adapter calls for
    "adapter-layer-missing": Kind("error", "a layer that the config targets has no tensors"),
    # like.py: another directory of the same model
    "config-differs": Kind("error", "a key that changes the computation is not that of --like"),
    "tokenizer-differs": Kind("error", "the tokenizer is not that of --like"),
    "chat-template-differs": Kind("error", "the chat template is not that of --like"),
    "generation-differs": Kind("warning", "the generation config is not that of --like"),
    # custom_code.py: code that a loader runs
    "code-of-another-repository": Kind("error", "auto_map names code that is not in the directory"),
    # beside.py: what lies beside the model
    "code-unnamed": Kind("warning", "a file of code that no config names"),
    "weights-elsewhere": Kind("warning", "a folder with weights that are not the model's"),
    # links.py: links to other directories
    "link-outside": Kind("warning", "a link that leads out of the directory"),
    # tokenizer.py: what turns text into ids, and ids into rows of the embedding
    "tokenizer-unreadable": Kind("error", "transformers cannot load the tokenizer"),
    "token-id-conflict": Kind("error", "two files of the tokenizer give a token different ids"),
    "token-id-outside-embedding": Kind("error", "a token's id is not a row of the embedding"),
    "special-token-missing": Kind("error", "a special token that is not in the vocabulary"),
    "chat-template-invalid": Kind("error", "the chat template cannot be rendered"),
    # generation.py: the end of a text
    "generation-config-invalid": Kind("error", "transformers refuses generation_config.json"),
    "eos-unknown": Kind("error", "an id that ends a text is not a token of the model"),
    "bos-unknown": Kind("error", "the id that begins a text is not a token of the model"),
    "pad-unknown": Kind("error", "the padding id is not a token of the model"),
    "decoder-start-unknown": Kind("error", "the decoder starts with an id that is not a token"),
    "eos-not-closing-turn": Kind(
        "error", "the token that closes an assistant's turn does not end a text"
    ),
    "olmo-eos-incomplete": Kind("error", "an OLMo chat model lacks one of its two end tokens"),
    # loading.py: transformers or PEFT load the directory
    "load-failed": Kind("error", "the directory cannot be loaded"),
    "load-missing-keys": Kind("error", "the files lack weights, and loading used random values"),
    "load-unexpected-keys": Kind("error", "loading ignored weights of the files"),
    "load-mismatched": Kind("error", "weights of the files do not fit the model"),
    "forward-failed": Kind("error", "the loaded model cannot be called"),
    "forward-not-finite": Kind("error", "the loaded model returns NaN or infinity"),
    "generation-failed": Kind("error", "the loaded model cannot generate"),
    # manifest.py: the record of the directory
    "manifest-invalid": Kind("error", "the manifest is invalid, or was changed"),
    "manifest-file-missing": Kind("error", "a file of the manifest is missing"),
    "manifest-file-size": Kind("error", "the size of a file differs from the manifest"),
    "manifest-file-unlisted": Kind("warning", "a file that the manifest does not list"),
    "manifest-tensor": Kind("error", "tensors of the manifest and of the files differ"),
    "sha256-invalid": Kind("error", "SHA256SUMS is not in the format of sha256sum"),
    "sha256-file-missing": Kind("error", "a file of SHA256SUMS is missing"),
    # data.py: every byte
    "nan": Kind("error", "weights that are not a number"),
    "inf": Kind("error", "infinite weights"),
    "all-zero": Kind("error", "a weight that is zero throughout"),
    "constant": Kind("error", "a weight that has one value throughout"),
    "zero-block": Kind("warning", "a long run of zeros in a weight"),
    "tie-differs": Kind("error", "two names that the config ties hold different values"),
    "adapter-untrained": Kind("warning", "every LoRA B is zero: the adapter does nothing"),
    "digest-mismatch": Kind("error", "bytes differ from those that were written"),
    "sha256-mismatch": Kind("error", "the SHA-256 of a file differs from SHA256SUMS"),
    "crc-mismatch": Kind("error", "a record of a pickled weight file is damaged"),
    # against.py: the source checkpoint
    "tensor-differs": Kind("error", "a tensor differs from the one that the checkpoint gives"),
    "tensor-extra": Kind("error", "a tensor that the checkpoint does not have"),
    "checkpoint-other": Kind("error", "the checkpoint is of another model"),
    "cannot-replay": Kind("error", "a recipe of the manifest cannot be followed"),
    "against-unread": Kind("error", "a tensor that cannot be read completely"),
    "against-unchecked": Kind("warning", "another source of the tensors is missing"),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem.

    Attributes:
        kind: a key of ``KINDS``.
        detail: the fact, one sentence without a full stop.
        file: the file, relative to the directory, with forward slashes.
        tensor: the tensor.
        severity: an error, or a warning.
        hint: the next step, if there is one.
    """

    kind: str
    detail: str
    file: str | None
    tensor: str | None
    severity: Severity
    hint: str | None

    @property
    def order(self) -> tuple[object, ...]:
        """The sort key: errors first, then file, tensor, kind and detail."""
        where = (self.file or "", self.tensor or "")
        return (self.severity != "error", *where, self.kind, self.detail)

    def to_json(self) -> dict[str, str | None]:
        """The object of the report."""
        return {
            "kind": self.kind,
            "severity": self.severity,
            "file": self.file,
            "tensor": self.tensor,
            "detail": self.detail,
            "hint": self.hint,
        }


@dataclass
class Findings:
    """The findings of the checks of one directory.

    Attributes:
        problems: the problems, in the order of the checks.
        checked: short phrases about what was checked.
        skipped: what could not be checked, each with the reason.
    """

    problems: list[Problem] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def add(
        self,
        kind: str,
        detail: str,
        *,
        file: str | None = None,
        tensor: str | None = None,
        hint: str | None = None,
        severity: Severity | None = None,
    ) -> None:
        """Add a problem. Its severity is that of its kind unless it is given."""
        usual = KINDS[kind].severity
        self.problems.append(Problem(kind, detail, file, tensor, severity or usual, hint))

    def include(self, others: Findings) -> None:
        """Add the findings of another check."""
        self.problems += others.problems
        self.checked += others.checked
        self.skipped += others.skipped


@dataclass
class Verdict:
    """The verdict of a run.

    Attributes:
        directory: the verified directory.
        problems: all problems, errors first, in a fixed order.
        checked: what was checked.
        skipped: what could not be checked, each with the reason.
        tensors: number of tensors.
        nbytes: bytes of tensor data.
        seconds: wall-clock time.
    """

    directory: Path
    problems: tuple[Problem, ...]
    checked: tuple[str, ...]
    skipped: tuple[str, ...]
    tensors: int
    nbytes: int
    seconds: float

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems that make the directory bad."""
        return tuple(p for p in self.problems if p.severity == "error")

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """The problems that need a look."""
        return tuple(p for p in self.problems if p.severity == "warning")

    def clean(self, strict: bool = False) -> bool:
        """Whether there is no error; with ``strict`` also no warning."""
        return not (self.problems if strict else self.errors)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON data. ``version`` changes if a key is removed or changes its meaning."""
        return {
            "version": SCHEMA_VERSION,
            "directory": str(self.directory),
            "clean": self.clean(),
            "errors": len(self.errors),
            "warnings": len(self.warnings),
            "problems": [problem.to_json() for problem in self.problems],
            "checked": list(self.checked),
            "skipped": list(self.skipped),
            "tensors": self.tensors,
            "nbytes": self.nbytes,
            "seconds": round(self.seconds, 3),
        }


def ordered(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """The problems without duplicates, errors first."""
    return tuple(sorted(set(problems), key=lambda problem: problem.order))
