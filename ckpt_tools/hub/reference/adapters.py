"""Owns the question what PEFT writes of an adapted model, and its answer: PEFT's own names, for every tuner.

A child process (``peft_child.py``) builds the base without weights, adds the adapter, and lets
``get_peft_model_state_dict`` filter tensors without values. The output of a prompt encoder is made by the
same child from the encoder's values, while the directory is written.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from ckpt_tools.errors import CkptError
from ckpt_tools.hub.reference import kept, process
from ckpt_tools.hub.reference.recipes import Shape
from ckpt_tools.tensors.catalogue import Computed, Tensor, Values
from ckpt_tools.tensors.dtypes import DType

if TYPE_CHECKING:
    import torch

_CHILD = f"{__package__}.peft_child"


@dataclass(frozen=True)
class AdapterQuestion:
    """One adapter of a state.

    Attributes:
        name: the adapter's name.
        config: the adapter's config.
        dtypes: the dtype that is written of each tensor of the state, by its name in the live model, without
            those of other adapters.
        save_embeddings: whether embeddings are written although the adapter does not target them.
    """

    name: str
    config: Mapping[str, Any]
    dtypes: Mapping[str, DType]
    save_embeddings: bool

    def to_json(self) -> dict[str, Any]:
        """The form in which the child reads it."""
        return {
            "name": self.name,
            "config": dict(self.config),
            "names": {name: dtype.name for name, dtype in self.dtypes.items()},
            "save_embeddings": self.save_embeddings,
        }


@dataclass(frozen=True)
class AdapterAnswer:
    """What PEFT writes of one adapter.

    Attributes:
        names: for each tensor of the file that the state holds, its names in the live model.
        shapes: for each tensor of the file, its shape.
        odd: names of the state that PEFT would write, and that the config's model lacks.
        made: for each tensor of the file that PEFT makes with a prompt encoder, the name of its dtype.
        inputs: the tensors of that encoder, by their names in the live model, with their shapes.
        failure: why there is no answer; None if there is one.
        hint: what to do then, if the child knows.
    """

    names: Mapping[str, Sequence[str]]
    shapes: Mapping[str, Shape]
    odd: Sequence[str]
    made: Mapping[str, str]
    inputs: Mapping[str, Shape]
    failure: str | None
    hint: str | None


@dataclass(frozen=True, repr=False)
class MadeByPeft(Computed):
    """The output of a prompt encoder, which PEFT writes in place of the encoder's tensors.

    Attributes:
        dtype: element type.
        shape: sizes.
        saved: its name in the adapter's file.
        question: the base's config and the adapter, as the child reads them; a JSON object.
        inputs: the tensors of the encoder, by their names in the live model.
    """

    dtype: DType
    shape: Shape
    saved: str
    question: str
    inputs: tuple[tuple[str, Tensor], ...]

    @property
    def pieces(self) -> int:
        """Number of runs of what it is made from."""
        return sum(tensor.pieces for _, tensor in self.inputs)

    def compute(self, start: int, stop: int, values: Values) -> torch.Tensor:
        """The window of what PEFT makes.

        Raises:
            CkptError: the child process failed, or made something else.
        """
        from safetensors.torch import save

        held = save({name: values.whole(tensor).contiguous() for name, tensor in self.inputs})
        with _ONE_AT_A_TIME:
            made = _value_made(self.question, self.saved, held)
        if (made.dtype, tuple(made.shape)) != (self.dtype.torch, self.shape):
            raise CkptError(
                f"PEFT made {self.saved} of {made.dtype} and shape {tuple(made.shape)}, and not of "
                f"{self.dtype} and {self.shape}"
            )
        return made.reshape(-1)[start:stop]


def describe_adapters(
    base: Mapping[str, Any], questions: Sequence[AdapterQuestion]
) -> list[AdapterAnswer]:
    """What PEFT writes of each adapter on a base with the config ``base``.

    Raises:
        CkptError: the child process failed, for example because PEFT is not installed.
    """
    question = {"config": dict(base), "adapters": [q.to_json() for q in questions]}
    return [
        AdapterAnswer(
            found.get("names", {}),
            _shapes(found.get("shapes", {})),
            found.get("odd", ()),
            found.get("made", {}),
            _shapes(found.get("inputs", {})),
            found.get("failure"),
            found.get("hint"),
        )
        for found in _answers(json.dumps(question))
    ]


def question_of_one(
    base: Mapping[str, Any], question: AdapterQuestion, names: Collection[str]
) -> str:
    """The question of a :class:`MadeByPeft` that is made from the tensors with these names."""
    adapter = question.to_json()
    adapter["names"] = {name: adapter["names"][name] for name in names}
    return json.dumps({"config": dict(base), "adapters": [adapter]})


def _shapes(found: Mapping[str, Sequence[int]]) -> dict[str, Shape]:
    return {name: tuple(shape) for name, shape in found.items()}


@lru_cache(maxsize=8)  # a training run saves the same adapter many times
def _answers(question: str) -> list[dict[str, Any]]:
    answers = kept.ask(_CHILD, question, "peft")["adapters"]
    assert isinstance(answers, list)
    return answers


# The windows of a tensor are written by several threads, and the child makes all of it at once.
_ONE_AT_A_TIME = Lock()


@lru_cache(maxsize=1)
def _value_made(question: str, saved: str, held: bytes) -> torch.Tensor:
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as scratch:
        values, into = Path(scratch, "values"), Path(scratch, "made")
        values.write_bytes(held)
        data = json.loads(question)
        data["adapters"][0] |= {"values": str(values), "into": str(into), "saved": saved}
        (answer,) = process.ask(_CHILD, json.dumps(data), "peft")["adapters"]
        if "failure" in answer:
            raise CkptError(f"PEFT failed to make {saved}: {answer['failure']}")
        return load_file(into)[saved]
