"""Owns the check of ``generation_config.json``, of token ids in both configs, and of the end of a text.

A chat model can be trained to close its turn with one token while its config names another. Such a model
never stops. The chat template shows the closing token.

OLMo chat models end at ``<|im_end|>`` and at ``<|endoftext|>`` (open-instruct,
``get_olmo3_generation_config``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ckpt_tools.verification.directory import CONFIG, Directory, read_object
from ckpt_tools.verification.problem import Findings
from ckpt_tools.verification.tokenizer import OLMO_ENDS, Loaded, Template

FILE = "generation_config.json"

_KINDS = {
    "eos_token_id": "eos-unknown",
    "forced_eos_token_id": "eos-unknown",
    "bos_token_id": "bos-unknown",
    "forced_bos_token_id": "bos-unknown",
    "pad_token_id": "pad-unknown",
    "decoder_start_token_id": "decoder-start-unknown",
}
# Their ids are ids of sounds, not of the tokenizer.
_SPEAKING = {
    "bark",
    "csm",
    "dia",
    "higgs_audio_v2",
    "moshi",
    "musicgen",
    "musicgen_melody",
    "parler_tts",
}
_OLMO = re.compile(r"olmo.*|flex_olmo|hf_olmo")
_NEVER_GENERATES = re.compile(
    r"Classification|Reward|ForMaskedLM|QuestionAnswering|MultipleChoice|(?<!LMHead)Model$"
)
# Text that should be one token: <|im_end|>, </s>, <end_of_turn>, [/INST].
_MARKER = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{2,20}\]")


@dataclass(frozen=True)
class StatedId:
    """A token id that a config states."""

    file: str
    key: str
    number: int

    @property
    def kind(self) -> str:
        """The kind of problem if the token does not exist."""
        return _KINDS[self.key]


@dataclass(frozen=True)
class GenerationFiles:
    """The generation settings of the directory.

    Attributes:
        generation: ``generation_config.json``; None if it is missing or cannot be read.
        ids: every token id in it or in ``config.json``.
    """

    generation: Mapping[str, Any] | None
    ids: tuple[StatedId, ...]


def read_generation(directory: Directory, findings: Findings) -> GenerationFiles:
    """Read the generation config, and the ids in both configs."""
    generation = None
    if FILE in directory.root_files:
        generation = read_object(directory, FILE, "generation-config-invalid", findings)
    ids = [*_stated(FILE, generation or {}, findings)]
    if (directory.config or {}).get("model_type") not in _SPEAKING:
        ids += _stated(CONFIG, directory.config or {}, findings)
    return GenerationFiles(generation, tuple(ids))


def judge_generation(
    directory: Directory,
    files: GenerationFiles,
    answer: Mapping[str, Any] | None,
    loaded: Loaded | None,
    rows: int | None,
    findings: Findings,
) -> None:
    """Check the generation config and the end of a text.

    Args:
        directory: the directory.
        files: its configs.
        answer: the answer of transformers about the generation config; None if it was not asked.
        loaded: the tokenizer; None if there is none.
        rows: rows of the input embedding; None if they are not known.
        findings: takes the problems.
    """
    if answer is not None:
        for complaint in _complaints(answer.get("failure")):
            findings.add(
                "generation-config-invalid",
                f"transformers refuses it: {complaint}",
                file=FILE,
                hint="Correct the file. Sampling flags need do_sample: true.",
            )
        findings.checked.append("generation config")
    for stated in dict.fromkeys(files.ids):
        _judge_id(stated, loaded, rows, findings)
    if loaded is not None and loaded.templates:
        _judge_ends(directory, files, loaded, findings)


def _stated(file: str, config: Mapping[str, Any], findings: Findings) -> Iterator[StatedId]:
    """Every id in a config or in its text_config. A value that is not an id is a problem."""
    part = config.get("text_config")
    for place in (config, part if isinstance(part, dict) else {}):
        for key, kind in _KINDS.items():
            value = place.get(key)
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int) and not isinstance(number, bool):
                    yield StatedId(file, key, number)
                elif number is not None or isinstance(value, list):
                    findings.add(kind, f"{key} holds {number!r}, which is not an id", file=file)


def _complaints(failure: str | None) -> list[str]:
    """The complaints of transformers, one line each."""
    if failure is None:
        return []
    lines = failure.strip().splitlines() or ["no reason is given"]
    listed = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    return listed or lines[:1]


def _judge_id(
    stated: StatedId, loaded: Loaded | None, rows: int | None, findings: Findings
) -> None:
    number = stated.number
    severity: Literal["error", "warning"] = "error"
    if number < 0:
        # Old configs of models without padding have -1.
        severity = "warning" if stated.kind == "pad-unknown" and number == -1 else "error"
        fact = "which is not a row of any embedding"
    elif rows is not None and number >= rows:
        fact = f"but the embedding has {rows:,} rows"
    elif loaded is not None and number in loaded.unknown_ids:
        severity = "warning" if stated.kind in ("pad-unknown", "bos-unknown") else "error"
        fact = "but the tokenizer has no token with that id"
    else:
        return
    findings.add(
        stated.kind, f"{stated.key} is {number}, {fact}", file=stated.file, severity=severity
    )


def _judge_ends(
    directory: Directory, files: GenerationFiles, loaded: Loaded, findings: Findings
) -> None:
    config = directory.config or {}
    if files.generation is None and (not config or FILE in directory.root_files):
        findings.skipped.append("the end of an assistant's turn (no config says where a text ends)")
        return
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else ""
    if _NEVER_GENERATES.search(str(architecture)):
        return
    # transformers derives a generation config from config.json only if the file is missing.
    file = FILE if files.generation is not None else CONFIG
    ends = dict.fromkeys(
        stated.number
        for stated in files.ids
        if stated.file == file and stated.key == "eos_token_id"
    )
    for template in loaded.templates:
        _judge_template(template, list(ends), file, findings)
    if _OLMO.fullmatch(str(config.get("model_type"))):
        _judge_olmo(loaded, list(ends), file, findings)
    findings.checked.append("chat template")


def _judge_template(template: Template, ends: list[int], file: str, findings: Findings) -> None:
    unclosed = template.id is None or template.opens_next
    marker = _MARKER.search(template.tail) if unclosed else None
    if marker is not None:
        findings.add(
            "eos-not-closing-turn",
            f"{template.called} closes an assistant's turn with {marker[0]}, which is not a token of the "
            "tokenizer: the model cannot stop there",
            file=file,
            hint="Use the tokenizer of the training run.",
        )
    elif template.id is not None and template.id not in ends:
        said = f"eos_token_id is {_listed(ends)}" if ends else "eos_token_id is missing"
        opening = "no token; the next turn starts with " if template.opens_next else ""
        findings.add(
            "eos-not-closing-turn",
            f"{template.called} closes an assistant's turn with {opening}{template.token} "
            f"(id {template.id}), but {said}: the model "
            + ("may not stop" if template.opens_next else "does not stop there"),
            file=file,
            severity="warning" if template.opens_next else "error",
            hint=_hint([template.id, *ends]),
        )


def _judge_olmo(loaded: Loaded, ends: list[int], file: str, findings: Findings) -> None:
    wanted = {token: loaded.ids.get(token) for token in OLMO_ENDS}
    numbers = [number for number in wanted.values() if number is not None]
    absent = [t for t, number in wanted.items() if number is not None and number not in ends]
    if len(numbers) < len(wanted) or not absent:
        return
    # The first instruction-tuned OLMo 2 models close their turns with <|endoftext|> alone, and stop.
    template = loaded.templates[0]
    stops = template.id in ends and OLMO_ENDS[0] not in template.text
    findings.add(
        "olmo-eos-incomplete",
        f"an OLMo chat model stops at {' and '.join(OLMO_ENDS)}; eos_token_id is {_listed(ends)}, "
        f"without {', '.join(f'{token} ({wanted[token]})' for token in absent)}",
        file=file,
        severity="warning" if stops else "error",
        hint=_hint(numbers),
    )


def _listed(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else str(numbers)


def _hint(numbers: list[int]) -> str:
    return f'Set "eos_token_id": {list(dict.fromkeys(numbers))} in {FILE}.'
