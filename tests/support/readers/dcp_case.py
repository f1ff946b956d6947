"""What a torch Distributed Checkpoint can and cannot tell, as a variant of the readers' contract."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ckpt_tools import readers
from ckpt_tools.tensors.checkpoint import Checkpoint
from ckpt_tools.tensors.deferred import settle
from tests.support.readers.contract import FIXTURES, Case, ReaderContract, Tensors

DCP = FIXTURES / "dcp"
# Where there is a choice, what is opened; and whether a loop or Adam recorded its steps.
_TAGS = {"torchtitan-2ranks": "step-2"}
_STEP_RECORDED = {
    "fsdp2-app-2ranks",
    "fsdp2-state-model-2ranks",
    "olmo-core-hybrid",
    "olmo-core-olmo2-2ranks",
    "olmo-core-olmo3-4ranks",
    "torchtitan-2ranks",
}


@dataclass(frozen=True)
class DcpCase(Case):
    """A shipped checkpoint of this format.

    Nothing in the files tells a frozen parameter from a trained one or a floating buffer, and tied names
    are saved as two tensors.
    """

    @cached_property
    def facts(self) -> dict[str, Any]:
        facts = super().facts
        buffers = [name for name, value in self.model.items() if not value.is_floating_point()]
        return {**facts, "buffers": buffers, "frozen": [], "tied": {}}

    @cached_property
    def left_out(self) -> set[str]:
        return set()

    @property
    def ties(self) -> dict[str, str]:
        return {}

    @cached_property
    def model(self) -> Tensors:
        """Every tensor, under the names that the reader gives them."""
        truth = "hf" if self.name.startswith("olmo-core") else "model"
        wrapper = "_orig_mod." if self.name == "fsdp2-compiled-2ranks" else ""
        tensors = load_file(self.directory / "truth" / f"{truth}.safetensors")
        if self.name == "hf-storage-awkward-2ranks":
            # Live it is (3, 0). Each rank wrote (0, 0), the last as of row 2, and there is no more to it.
            tensors["empty.bias"] = tensors["empty.bias"][:2]
        return {wrapper + name: value for name, value in tensors.items()}

    @cached_property
    def masters(self) -> Tensors:
        return {name: value for name, value in self.model.items() if value.is_floating_point()}

    def open(self) -> Checkpoint:
        return readers.read(readers.locate(self.path, _TAGS.get(self.name)))


def dcp_cases(pattern: str = "*") -> list[DcpCase]:
    return [DcpCase(path.parent) for path in sorted(DCP.glob(f"{pattern}/facts.json"))]


def copy_of(fixture: str, tmp_path: Path) -> Path:
    """A copy of a shipped checkpoint to damage."""
    root = tmp_path / fixture
    shutil.copytree(DCP / fixture / "checkpoint", root)
    return root


class DcpContract(ReaderContract):
    """The suite, where this format can tell less."""

    def keeps_model_copy(self, case: Case) -> bool:
        return True

    def test_parameters_are_counted_once(self, checkpoint: Checkpoint, case: Case) -> None:
        counted = sum(math.prod(w.shape) for w in checkpoint.weights.values() if w.kind != "buffer")
        assert counted == sum(value.numel() for value in case.masters.values())

    def test_step_ranks_and_framework_are_those_of_the_run(
        self, checkpoint: Checkpoint, case: Case
    ) -> None:
        step = case.facts["step"] if case.name in _STEP_RECORDED else None
        # A process without a group is one.
        ranks = max(case.facts["world_size"], 1)
        assert (checkpoint.step, checkpoint.world_size) == (step, ranks)
        assert checkpoint.framework == self.framework(case)

    def test_fragments_lie_in_the_files_of_the_checkpoint(self, checkpoint: Checkpoint) -> None:
        for name in checkpoint:
            for move in checkpoint[name].moves(0, checkpoint[name].numel):
                size = checkpoint.files.get(move.file) or move.file.stat().st_size
                assert move.offset + move.nbytes <= size, name

    def test_every_place_can_be_found_beforehand(self, case: Case) -> None:
        checkpoint = case.open()
        held = checkpoint.catalogue("model").values()
        fragments = sum(len(w.model.fragments) for w in checkpoint.weights.values() if w.model)
        assert settle(held, workers=2) in (0, fragments)
