"""``--output-format bin``: what torch, transformers and PEFT load of it, and how it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._C._distributed_c10d import HashStore

from ckpt_tools import average, consolidate, extract_lora, verify
from ckpt_tools.errors import VerificationFailed
from ckpt_tools.ranks.clock import Clock
from ckpt_tools.writing import delivery
from tests.cli.test_consolidate import run
from tests.conftest import FIXTURES
from tests.conversion.test_resume import OPTIONS, quick_journal, resumed, stopped
from tests.support.outputs import contents
from tests.support.ranks.in_threads import clock, each, hurried, made

__all__ = ["clock", "hurried", "quick_journal"]

TIED = FIXTURES / "zero" / "zero3-bf16-qwen3-tied-2ranks"
LORA = FIXTURES / "peft" / "zero3-olmo2-lora"
TIE = ("lm_head.weight", "model.embed_tokens.weight")


def loaded(out: Path, pattern: str = "pytorch_model*.bin") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(out.glob(pattern)):
        found |= torch.load(path, weights_only=True)
    return found


def weights(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(out).items() if "pytorch_model" in name}


@pytest.mark.slow
def test_torch_and_transformers_load_what_trained(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out, truth = tmp_path / "out", load_file(TIED / "truth" / "model.safetensors")
    report = consolidate(
        TIED / "checkpoint", out, config=TIED / "hf", output_format="bin", max_shard_size="3kB",
        verify=True,
    )  # fmt: skip

    found = loaded(out)
    assert len([*out.glob("*.bin")]) > 1 and (out / "pytorch_model.bin.index.json").is_file()
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[name], truth[name]) for name in truth)
    assert found[TIE[0]].data_ptr() == found[TIE[1]].data_ptr()
    assert f"{TIE[0]} is tied to {TIE[1]} and shares its bytes" in report.notes
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    state = model.state_dict()
    assert state.keys() == truth.keys()
    assert all(torch.equal(state[name], truth[name]) for name in truth)
    verdict = verify(out, against=TIED / "checkpoint", read_data=True)
    assert verdict.errors == ()
    assert [p.kind for p in verdict.problems if p.kind != "tie-written-twice"] == [
        "pickled-weights"
    ]


def test_the_bytes_are_those_of_any_number_of_workers_and_ranks(
    tmp_path: Path, hurried: object
) -> None:
    asked: dict[str, Any] = {"weights_only": True, "output_format": "bin", "max_shard_size": "3kB"}
    for workers in (1, 3):
        consolidate(TIED / "checkpoint", tmp_path / f"w{workers}", workers=workers, **asked)
    for size in (2, 5):
        each(
            made(Clock(), size, store=HashStore()),
            lambda own, size=size: consolidate(
                TIED / "checkpoint", tmp_path / f"r{size}", ranks=own, workers=1, **asked
            ),
        )

    first, *others = (weights(tmp_path / name) for name in ("w1", "w3", "r2", "r5"))
    assert len(first) > 2
    assert others == [first] * 3


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_a_run_that_stops_is_resumed(share: float, tmp_path: Path, quick_journal: None) -> None:
    checkpoint, out = TIED / "checkpoint", tmp_path / "out"
    consolidate(checkpoint, tmp_path / "whole", **OPTIONS, output_format="bin")
    stopped(checkpoint, out, share, output_format="bin")
    report = resumed(checkpoint, out, output_format="bin")

    assert any("continued an earlier run" in note for note in report.notes)
    assert share < 1 or report.bytes_read == 0
    assert len(weights(out)) > 2 and weights(out) == weights(tmp_path / "whole")


@pytest.mark.parametrize("place", ["tensor", "header", "directory"])
def test_verify_finds_a_byte_that_changed(place: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    consolidate(TIED / "checkpoint", out, weights_only=True, output_format="bin")
    path = out / "pytorch_model.bin"
    data = bytearray(path.read_bytes())
    at = {"tensor": len(data) // 2, "header": data.index(b"FB") + 8, "directory": len(data) - 40}
    data[at[place]] ^= 1
    path.write_bytes(data)

    kinds = {p.kind for p in verify(out, read_data=True).errors} - {"config-missing"}
    assert kinds & {"digest-mismatch", "pickled-invalid"}
    assert place != "tensor" or {"digest-mismatch", "crc-mismatch"} <= kinds


@pytest.mark.slow
def test_a_damaged_output_never_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close = delivery.close_files

    def damaged(plan: Any, directory: Path, *rest: Any) -> None:
        close(plan, directory, *rest)
        with (directory / "pytorch_model.bin").open("r+b") as stream:
            stream.seek(plan.files[0].slots[3].offset)
            stream.write(b"\xff" * 8)

    monkeypatch.setattr(delivery, "close_files", damaged)
    asked: dict[str, Any] = {"config": TIED / "hf", "output_format": "bin", "verify": True}
    with pytest.raises(VerificationFailed):
        consolidate(TIED / "checkpoint", tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_a_mean_is_written_too(tmp_path: Path) -> None:
    source = [TIED / "checkpoint"] * 2
    average(source, tmp_path / "bin", weights_only=True, output_format="bin")
    average(source, tmp_path / "safe", weights_only=True)

    found, truth = loaded(tmp_path / "bin"), load_file(tmp_path / "safe" / "model.safetensors")
    assert found.keys() == truth.keys() | {TIE[0]}
    assert all(torch.equal(found[name], truth[name]) for name in truth)


@pytest.mark.slow
def test_an_adapter_is_what_peft_wrote(tmp_path: Path) -> None:
    from peft.utils import load_peft_weights

    out = tmp_path / "out"
    extract_lora(
        LORA / "checkpoint",
        out,
        adapter_config=LORA / "hf",
        config=LORA / "hf",
        output_format="bin",
    )
    (truth,) = (LORA / "truth").rglob("adapter_model.safetensors")
    expected, found = load_file(truth), load_peft_weights(str(out), device="cpu")

    assert (out / "adapter_model.bin").is_file()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert verify(out).errors == ()


def test_it_is_an_option_and_its_output_is_read_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(
        "consolidate", TIED / "checkpoint", out, "--weights-only", "--output-format", "bin", "-q"
    )

    assert (done.exit_code, done.stderr) == (0, "")
    again = consolidate(out, tmp_path / "again", weights_only=True)
    safe = load_file(again.output / "model.safetensors")
    truth = load_file(TIED / "truth" / "model.safetensors")
    assert all(torch.equal(safe[name], truth[name]) for name in safe)
    assert run("consolidate", out, tmp_path / "x", "--output-format", "pt").exit_code == 2
