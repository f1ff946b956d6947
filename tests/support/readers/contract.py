"""What every reader must do: one suite, held against the live engine that wrote the checkpoint.

A format's test class inherits :class:`ReaderContract` and says only where its cases lie. The truth beside
each case was gathered in the process that trained, so no reading of the files is compared with another.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ckpt_tools import readers
from ckpt_tools.errors import UsageError
from ckpt_tools.tensors.catalogue import Tensor
from ckpt_tools.tensors.checkpoint import Checkpoint
from ckpt_tools.tensors.gather import Gatherer
from ckpt_tools.tensors.requests import Slice

FIXTURES = Path(__file__).resolve().parents[3] / "fixtures"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A shipped checkpoint and what the live engine held when it saved.

    ``masters`` has every parameter once (the value in use where the optimizer kept no copy), ``model``
    every name of the module: parameters, aliases and buffers.
    """

    directory: Path

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def path(self) -> Path:
        return self.directory / "checkpoint"

    @cached_property
    def facts(self) -> dict[str, Any]:
        facts = json.loads((self.directory / "facts.json").read_text())
        assert isinstance(facts, dict)
        return facts

    @cached_property
    def left_out(self) -> set[str]:
        """Names that the run did not save, told so or not."""
        left_out = set(self.facts["frozen"]) if self.facts["frozen_excluded"] else set()
        if self.facts["stage"] == 3 and self.release < (0, 9):
            # DeepSpeed saved no frozen parameter of stage 3 then, and recorded no second name, which only
            # placeholders of one element show by sharing it.
            left_out |= {
                *self.facts["frozen"],
                *(self.facts["tied"] if self.release > (0, 6) else ()),
            }
        return left_out

    @property
    def ties(self) -> dict[str, str]:
        """Second names that the files can tell."""
        return {a: kept for a, kept in self.facts["tied"].items() if a not in self.left_out}

    @property
    def release(self) -> tuple[int, ...]:
        """The version of DeepSpeed that wrote it."""
        return tuple(map(int, self.facts["deepspeed_version"].split(".")))

    @cached_property
    def masters(self) -> Tensors:
        return self._truth("masters")

    @cached_property
    def model(self) -> Tensors:
        return self._truth("model")

    def _truth(self, copy: str) -> Tensors:
        tensors = load_file(self.directory / "truth" / f"{copy}.safetensors")
        return {name: value for name, value in tensors.items() if name not in self.left_out}

    def open(self) -> Checkpoint:
        return readers.read(readers.locate(self.path))


def cases(folder: str, pattern: str = "*") -> list[Case]:
    """The shipped checkpoints of a folder, whichever there are."""
    return [Case(path.parent) for path in sorted((FIXTURES / folder).glob(f"{pattern}/facts.json"))]


@cache
def opened(case: Case) -> Checkpoint:
    """A case's checkpoint, read once."""
    return case.open()


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor: NaNs and the sign of zero count, which ``torch.equal`` overlooks."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def assert_same(found: torch.Tensor, truth: torch.Tensor, name: str) -> None:
    assert (found.dtype, found.shape) == (truth.dtype, truth.shape), name
    assert bits(found) == bits(truth), f"{name} differs from the live engine"


def in_pieces(tensor: Tensor, step: int) -> bytes:
    """The tensor's bytes, read in windows of ``step`` elements."""
    itemsize, data = tensor.dtype.itemsize, b""
    with Gatherer() as gatherer:
        for start in range(0, tensor.numel, step):
            stop = min(start + step, tensor.numel)
            # One byte more at the end, to see that a window keeps to its own.
            buffer = bytearray((stop - start) * itemsize) + b"\xa5"
            gatherer.fill(buffer, [Slice(tensor, start, stop, 0)])
            assert buffer[-1] == 0xA5
            data += buffer[:-1]
    return data


class ReaderContract:
    """The suite. A subclass offers ``case``, parametrised over the format's checkpoints."""

    @pytest.fixture
    def case(self) -> Case:
        raise NotImplementedError

    @pytest.fixture
    def checkpoint(self, case: Case) -> Checkpoint:
        return opened(case)

    # What the format can know; a subclass says where it differs.

    def keeps_model_copy(self, case: Case) -> bool:
        """Whether the files hold the weights in training dtype beside the masters."""
        raise NotImplementedError

    def framework(self, case: Case) -> str:
        """Name and version of what wrote it, as far as the files tell."""
        raise NotImplementedError

    # Names, shapes, kinds.

    def test_names_are_those_of_the_live_module(self, checkpoint: Checkpoint, case: Case) -> None:
        assert set(checkpoint) == set(case.model)
        assert len(checkpoint) == len(list(checkpoint)) == len(case.model)
        assert set(checkpoint.weights).isdisjoint(checkpoint.ties)

    def test_shapes_are_those_of_the_live_module(self, checkpoint: Checkpoint, case: Case) -> None:
        shapes = {name: tuple(value.shape) for name, value in case.model.items()}
        assert {name: checkpoint[name].shape for name in checkpoint} == shapes
        assert {n: w.shape for n, w in checkpoint.weights.items()} == {
            name: shape for name, shape in shapes.items() if name not in checkpoint.ties
        }

    def test_training_dtypes_are_those_of_the_live_module(
        self, checkpoint: Checkpoint, case: Case
    ) -> None:
        for name, weight in checkpoint.weights.items():
            assert weight.dtype == case.model[name].dtype, name

    def test_training_dtype_is_that_of_most_elements(
        self, checkpoint: Checkpoint, case: Case
    ) -> None:
        counts: Counter[torch.dtype] = Counter()
        for name, value in case.model.items():
            if value.is_floating_point() and name not in case.facts["tied"]:
                counts[value.dtype] += value.numel()
        assert checkpoint.training_dtype == counts.most_common(1)[0][0]

    def test_ties_are_those_of_the_live_module(self, checkpoint: Checkpoint, case: Case) -> None:
        assert dict(checkpoint.ties) == case.ties

    def test_buffers_and_frozen_parameters_are_told_from_trained_ones(
        self, checkpoint: Checkpoint, case: Case
    ) -> None:
        kinds: dict[str, str] = dict.fromkeys(case.masters, "parameter")
        kinds |= dict.fromkeys(case.facts["buffers"], "buffer")
        kinds |= dict.fromkeys(set(case.facts["frozen"]) - case.left_out, "frozen")
        # An optimizer keeps nothing of a parameter without elements, so nothing tells whether it trained.
        known = {n: kind for n, kind in kinds.items() if case.model[n].numel() or kind == "buffer"}
        assert {n: checkpoint.weights[n].kind for n in known} == known

    def test_parameters_are_counted_once(self, checkpoint: Checkpoint, case: Case) -> None:
        whole = load_file(case.directory / "truth" / "model.safetensors")
        left_out = sum(whole[n].numel() for n in case.left_out if n not in case.facts["tied"])
        counted = sum(
            math.prod(weight.shape)
            for weight in checkpoint.weights.values()
            if weight.kind != "buffer"
        )
        assert counted == case.facts["parameter_count"] - left_out

    # Values.

    def test_every_element_is_the_live_master(self, checkpoint: Checkpoint, case: Case) -> None:
        catalogue = checkpoint.catalogue("master")
        assert set(catalogue) == set(case.masters) | set(case.facts["buffers"])
        for name, truth in case.masters.items():
            assert_same(catalogue[name].load(), truth, name)
        for name in case.facts["buffers"]:
            assert_same(catalogue[name].load(), case.model[name], name)

    def test_every_element_in_training_dtype_is_the_live_weight(
        self, checkpoint: Checkpoint, case: Case
    ) -> None:
        for name, truth in case.model.items():
            weight = checkpoint.weights[checkpoint.ties.get(name, name)]
            assert_same(checkpoint[name].load().to(weight.dtype.torch), truth, name)

    def test_the_model_copy_is_the_live_weight_or_is_refused(
        self, checkpoint: Checkpoint, case: Case
    ) -> None:
        if self.keeps_model_copy(case):
            catalogue = checkpoint.catalogue("model")
            assert set(catalogue) | set(catalogue.ties) == set(case.model)
            for name, truth in case.model.items():
                assert_same(catalogue[name].load(), truth, name)
        else:
            with pytest.raises(UsageError, match="no 16-bit weights are kept") as caught:
                checkpoint.catalogue("model")
            assert "--weights master --dtype auto" in str(caught.value)

    def test_odd_windows_put_together_are_the_whole(
        self, checkpoint: Checkpoint, case: Case
    ) -> None:
        for name, truth in case.masters.items():
            assert in_pieces(checkpoint[name], 61) == bits(truth), name

    def test_reading_again_gives_the_same(self, checkpoint: Checkpoint, case: Case) -> None:
        again = case.open()
        assert list(again.weights) == list(checkpoint.weights)
        assert dict(again.ties) == dict(checkpoint.ties)
        for name, truth in case.masters.items():
            assert_same(again[name].load(), truth, name)

    # Facts.

    def test_step_ranks_and_framework_are_those_of_the_run(
        self, checkpoint: Checkpoint, case: Case
    ) -> None:
        found = (checkpoint.step, checkpoint.world_size, checkpoint.framework)
        assert found == (case.facts["step"], case.facts["world_size"], self.framework(case))

    def test_every_file_is_accounted_for(self, checkpoint: Checkpoint) -> None:
        directory = checkpoint.location.directory
        sizes = {path: path.stat().st_size for path in directory.iterdir() if path.is_file()}
        assert dict(checkpoint.files) == sizes
        assert checkpoint.bytes_on_disk == sum(sizes.values())

    def test_fragments_lie_in_the_files_of_the_checkpoint(self, checkpoint: Checkpoint) -> None:
        for name in checkpoint:
            for move in checkpoint[name].moves(0, checkpoint[name].numel):
                assert move.offset + move.nbytes <= checkpoint.files[move.file], name

    def test_it_is_found_where_it_lies(self, checkpoint: Checkpoint, case: Case) -> None:
        again = readers.locate(checkpoint.location.directory)
        assert again.directory == checkpoint.location.directory
        assert again.format == checkpoint.location.format
        assert case.path in checkpoint.location.near
