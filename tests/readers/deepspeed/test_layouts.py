"""DeepSpeed checkpoints beyond plain data-parallel ZeRO, against the live engines that wrote them."""

from __future__ import annotations

import pytest

from ckpt_tools.tensors.checkpoint import Checkpoint
from tests.support.readers.contract import Case, ReaderContract, cases

# A file of its own format, and slices that are joined by the model's shapes: tests of their own.
_OTHERS = ("bin-", "old-0.16.9-autotp-")
CASES = [case for case in cases("layouts") if not case.name.startswith(_OTHERS)]


class TestEveryLayoutFixture(ReaderContract):
    @pytest.fixture(params=CASES, ids=lambda case: case.name)
    def case(self, request: pytest.FixtureRequest) -> Case:
        case = request.param
        assert isinstance(case, Case)
        return case

    def keeps_model_copy(self, case: Case) -> bool:
        # Stage 3 keeps placeholders; a universal checkpoint has no copy of the files of layers and experts.
        bare = case.name.startswith("universal-") and case.facts["shape"] in ("megatron", "autoep")
        return bool(case.facts["stage"] < 3) and not bare

    def framework(self, case: Case) -> str:
        return f"deepspeed {case.facts['deepspeed_version']}"

    def test_every_file_is_accounted_for(self, checkpoint, case) -> None:  # type: ignore[no-untyped-def]
        directory = checkpoint.location.directory
        files = [*directory.rglob("*.pt"), *directory.rglob("*.swp")]
        sizes = {path: path.stat().st_size for path in files}
        moments = {"exp_avg.pt", "exp_avg_sq.pt", "step.pt", "optimizer_state.pt"}
        assert dict(checkpoint.files) == {p: n for p, n in sizes.items() if p.name not in moments}

    def test_nothing_is_remarked_of_a_sound_save(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.remarks == ()
        assert checkpoint.lost is None
