"""Every byte is read once: values that no weight should have, checksums, in flat memory."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ckpt_tools.errors import NotACheckpoint
from ckpt_tools.tensors.dtypes import ALL
from ckpt_tools.verification import config, verify
from ckpt_tools.verification import scan as scanning
from ckpt_tools.verification.container import Entry
from ckpt_tools.verification.scan import STEP_BYTES, Piece, Summary, scan
from tests.conftest import FIXTURES
from tests.support.verification.directories import (
    SINGLE,
    Damage,
    also,
    answer_here,
    change_tensor,
    copy_adapter,
    copy_of,
    edit_state,
    kinds,
    save,
    save_llama,
    save_pickled,
    save_tied,
    save_translator,
    write_chat_model,
)

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LORA_A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


def save_wide(directory: Path) -> Path:
    """With matrices of a megabyte."""
    return save(directory, "LlamaForCausalLM", hidden_size=256, intermediate_size=2048)


def put(name: str, value: float, at: int | None = None) -> Callable[[Path], str]:
    """One value of a tensor, or all of them."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.clone().flatten()
        flat[slice(None) if at is None else at] = value
        return flat.reshape(tensor.shape)

    def do(directory: Path) -> str:
        change_tensor(directory, name, change)
        return name

    return do


def zero_rows(name: str, rows: slice) -> Callable[[Path], str]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[rows] = 0
        return tensor

    def do(directory: Path) -> str:
        change_tensor(directory, name, change)
        return name

    return do


def write_a_head_of_its_own(directory: Path) -> str:
    edit_state(directory / SINGLE, lambda state: state.update({HEAD: state[EMBEDDING] + 1}))
    return HEAD


def save_tied_wide(directory: Path) -> Path:
    """With an embedding of more than a megabyte."""
    return save(directory, "Qwen3ForCausalLM tied", vocab_size=20_000)


def write_a_head_that_differs_at_its_end(directory: Path) -> str:
    def change(state: dict[str, torch.Tensor]) -> None:
        state[HEAD] = state[EMBEDDING].clone()
        state[HEAD][-1, -1] += 1

    edit_state(directory / SINGLE, change)
    return HEAD


def untrain(directory: Path) -> str:
    def change(state: dict[str, torch.Tensor]) -> None:
        for name in state:
            if ".lora_B." in name:
                state[name] = torch.zeros_like(state[name])

    edit_state(directory / "adapter_model.safetensors", change)
    return "adapter_config.json"


def flip_in(file: str, at: int) -> Callable[[Path], str]:
    def do(directory: Path) -> str:
        content = bytearray((directory / file).read_bytes())
        content[at] ^= 4
        (directory / file).write_bytes(content)
        return file

    return do


def flip_in_a_pickle(directory: Path) -> str:
    """In the data of a record, so that the file can be read as before."""
    path = directory / "pytorch_model-00001-of-00002.bin"
    content = bytearray(path.read_bytes())
    value = (
        torch.load(path, weights_only=True)["lm_head.weight"].view(torch.uint8).numpy().tobytes()
    )
    content[content.index(value) + 8] ^= 4
    path.write_bytes(content)
    return path.name


SUMMED = also("sha256-mismatch")
DAMAGES = [
    Damage("nan", put(UP, float("nan"), 77), save_llama),
    Damage("nan", put(NORM, float("nan"), 3), save_llama),
    Damage("nan", put(LORA_A, float("nan"), 3), copy_adapter),
    Damage("nan", put("final_logits_bias", float("nan"), 3), save_translator, severity="warning"),
    Damage("inf", put(UP, float("inf"), 0), save_llama),
    Damage("inf", put(UP, float("-inf"), -1), save_llama),
    Damage("inf", put("final_logits_bias", float("-inf"), 3), save_translator, severity="warning"),
    Damage("all-zero", put(UP, 0.0), save_llama),
    Damage("all-zero", put(EMBEDDING, -0.0), save_llama),
    Damage("all-zero", put(LORA_A, 0.0), copy_adapter),
    Damage("all-zero", put(NORM, 0.0), save_llama, severity="warning"),
    Damage("constant", put(UP, 0.5), save_llama),
    Damage("constant", put(HEAD, 1.0), save_llama),
    Damage("zero-block", zero_rows(UP, slice(500, 1600)), save_wide),
    Damage("tie-differs", write_a_head_of_its_own, save_tied, also("tie-written-twice")),
    Damage(
        "tie-differs",
        write_a_head_that_differs_at_its_end,
        save_tied_wide,
        also("tie-written-twice"),
    ),
    Damage("adapter-untrained", untrain, copy_adapter),
    Damage("digest-mismatch", flip_in("tokenizer.json", 50), write_chat_model, SUMMED),
    Damage("digest-mismatch", flip_in(SINGLE, -1), write_chat_model, SUMMED),
    Damage("crc-mismatch", flip_in_a_pickle, save_pickled, also("pickled-weights")),
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
def test_damage_is_found_and_called_what_it_is(
    damage: Damage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage.must_be_found(tmp_path, monkeypatch, read_data=True)


HARMLESS = {
    "a norm of ones": put(NORM, 1.0),
    "rows that pad the vocabulary": zero_rows(EMBEDDING, slice(90, None)),
    "a row that is not used": zero_rows(UP, slice(0, 1)),
    "one zero": put(UP, 0.0, 5),
}


@pytest.mark.parametrize("do", HARMLESS.values(), ids=HARMLESS)
def test_what_belongs_there_is_no_problem(
    do: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_here(monkeypatch)
    directory = copy_of(save_llama, tmp_path / "model")
    do(directory)

    assert kinds(verify(directory, read_data=True)) == set()


def test_a_matrix_that_starts_with_zeros_may_have_kept_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The projection of images in a Gemma that was trained on text alone."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    answer_here(monkeypatch)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    text = {**sizes, "vocab_size": 16, "num_key_value_heads": 1, "head_dim": 4}
    images = {"boi_token_index": 5, "eoi_token_index": 6, "image_token_index": 7}
    config = Gemma3Config(
        text_config={**text, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**sizes, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
        **images,
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)

    (problem,) = verify(tmp_path, read_data=True).problems

    assert (problem.kind, problem.severity) == ("all-zero", "warning")


def test_an_adapter_that_trained_in_some_modules_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_here(monkeypatch)
    directory = copy_of(copy_adapter, tmp_path / "adapter")
    put(LORA_A.replace("lora_A", "lora_B"), 0.0)(directory)

    assert kinds(verify(directory, read_data=True)) == set()


@pytest.mark.parametrize(
    ("model_type", "stated", "found"),
    [
        ("mt5", False, []),
        ("t5", True, [("tie-differs", "warning"), ("tie-written-twice", "warning")]),
    ],
)
def test_heads_that_transformers_keeps_apart_are_no_error(
    model_type: str, stated: bool, found: list[tuple[str, str]], tmp_path: Path
) -> None:
    """The classes of T5 tie the head whatever the config says, but not to an embedding that differs."""
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 9}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(model_type, **sizes))
    model.save_pretrained(tmp_path)
    edit_state(tmp_path / SINGLE, lambda state: state.update({HEAD: state["shared.weight"] + 1}))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": stated}))

    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, again.get_input_embeddings().weight + 1)
    problems = verify(tmp_path, read_data=True).problems
    assert sorted((p.kind, p.severity) for p in problems if p.tensor == HEAD) == found


def test_data_is_not_read_unless_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_here(monkeypatch)
    directory = copy_of(save_llama, tmp_path / "model")
    put(UP, float("nan"))(directory)

    assert kinds(verify(directory)) == set()


def test_progress_comes_to_all_bytes_whatever_the_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_here(monkeypatch)
    directory = copy_of(write_chat_model, tmp_path / "model")
    put(EMBEDDING, float("nan"), 3)(directory)
    found = []
    for workers in (1, 3):
        calls: list[tuple[int, int]] = []
        verdict = verify(
            directory,
            read_data=True,
            workers=workers,
            progress=lambda done, total, calls=calls: calls.append((done, total)),  # type: ignore[misc]
        )
        found.append(verdict.problems)
        assert calls == sorted(calls)
        assert calls[-1][0] == calls[-1][1]
        sizes = (p.stat().st_size for p in directory.iterdir() if p.name != "SHA256SUMS")
        assert calls[-1][1] == sum(sizes)
    assert found[0] == found[1] and len(found[0]) == 3


# -- one piece of a file -----------------------------------------------------------------------------

FLOATING = [dtype for dtype in ALL if dtype.is_floating or dtype.name == "complex64"]


def whole(directory: Path, entry: Entry, borders: list[int], unit_bytes: int | None) -> Summary:
    """What is seen of a tensor when its file is read in pieces that end at ``borders``."""
    summary = Summary()
    for start, stop in zip([0, *borders[:-1]], borders, strict=True):
        seen = scan(directory, Piece(entry.file, start, stop), [entry], unit_bytes)
        if 0 in seen.tensors:
            summary.merge(seen.tensors[0])
    return summary


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shift", [0, 3])
def test_torch_counts_the_same(
    dtype: type, shift: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of random bits, among which are all that a dtype can hold; also where no element is aligned."""
    monkeypatch.setattr(scanning, "BLOCK_BYTES", 4096)
    found = next(d for d in ALL if d == dtype)
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (16_000,), dtype=torch.uint8, generator=generator)
    special = torch.tensor([0.0, float("inf"), float("-inf"), float("nan")], dtype=torch.float64)
    if found.name not in ("complex64", "float8_e8m0fnu"):
        data = torch.cat([data, special.to(found.torch).view(torch.uint8)])
    values = data.view(found.torch)
    values = torch.view_as_real(values) if found.name == "complex64" else values.double()
    (tmp_path / "f").write_bytes(bytes(shift) + bytes(data.numpy()) + b"tail")
    size = shift + len(data)
    entry = Entry("t", found.safetensors, (len(values),), "f", shift, size)
    draw = random.Random(1)

    for _ in range(5):
        borders = [*sorted(draw.sample(range(1, size), 6)), size + 4]
        summary = whole(tmp_path, entry, borders, None)
        assert summary.nans == int(values.isnan().sum())
        assert summary.infinities == int(values.isinf().sum())
        assert not summary.is_constant
        assert summary.first == bytes(data[: len(summary.first)].numpy())


@pytest.mark.parametrize("code", ["F64", "F32", "BF16"])
def test_elements_that_lie_across_borders_are_counted_once(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "BLOCK_BYTES", 512)
    dtype = next(d for d in ALL if d.safetensors == code)
    values = torch.full((1000,), float("nan"), dtype=dtype.torch)
    data = bytes(values.view(torch.uint8).numpy())
    (tmp_path / "f").write_bytes(b"x" + data)
    entry, size = Entry("t", code, (1000,), "f", 1, 1 + len(data)), 1 + len(data)

    for borders in ([size], [700, 701, 1031, size - 1, size]):
        assert whole(tmp_path, entry, borders, None).nans == 1000


def test_a_file_that_shrinks_meanwhile_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_here(monkeypatch)
    directory = copy_of(save_llama, tmp_path / "model")

    def shrink(*arguments: object) -> None:
        os.truncate(directory / SINGLE, (directory / SINGLE).stat().st_size // 2)

    monkeypatch.setattr(config, "check_precision", shrink)

    assert kinds(verify(directory, read_data=True)) == {"file-unreadable"}


def test_neighbouring_pieces_say_what_one_says(tmp_path: Path) -> None:
    """Digests too, where pieces end at multiples of the unit."""
    count = 40_000
    content = torch.randn(count, generator=torch.Generator().manual_seed(0)).numpy().tobytes()
    (tmp_path / "f").write_bytes(b"head" + content)
    entry, size = Entry("t", "F32", (count,), "f", 4, 4 + 4 * count), 4 + 4 * count
    for unit in (64, 4096):
        alone = whole(tmp_path, entry, [size], unit)
        cut = whole(tmp_path, entry, [4096, 8192, 81920, size], unit)
        assert alone == cut
        assert len(alone.digests) == 16 * -(-size // unit)


@pytest.mark.parametrize("changed", [None, 0, 7_000, 39_999])
def test_a_constant_is_one_only_as_a_whole(
    changed: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "BLOCK_BYTES", 8192)
    values = torch.full((40_000,), 0.25)
    if changed is not None:
        values[changed] = 0.5
    (tmp_path / "f").write_bytes(values.numpy().tobytes())
    entry = Entry("t", "F32", (40_000,), "f", 0, 160_000)

    for borders in ([160_000], [28_000, 160_000], [4, 159_996, 160_000]):
        assert whole(tmp_path, entry, borders, None).is_constant == (changed is None)


def test_whole_numbers_are_digested_and_not_judged(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"\xff" * 800)
    entry = Entry("t", "I64", (100,), "f", 0, 800)

    summary = whole(tmp_path, entry, [800], 4096)

    assert (summary.nans, summary.first, len(summary.digests)) == (0, b"", 16)


def test_long_runs_of_zeros_are_counted(tmp_path: Path) -> None:
    values = torch.ones(4 * STEP_BYTES // 4)
    values[STEP_BYTES // 4 : 3 * STEP_BYTES // 4] = 0
    (tmp_path / "f").write_bytes(values.numpy().tobytes())
    entry = Entry("t", "F32", (len(values),), "f", 0, 4 * STEP_BYTES)

    for borders in ([4 * STEP_BYTES], [STEP_BYTES, 3 * STEP_BYTES, 4 * STEP_BYTES]):
        assert whole(tmp_path, entry, borders, None).zero_steps == 2


@pytest.mark.slow
def test_memory_does_not_grow_with_the_files(tmp_path: Path) -> None:
    """Four gigabytes with holes, in one tensor, digested; the bytes are read all the same."""
    nbytes = 4 << 30
    header = {
        "__metadata__": {"format": "pt"},
        "t": {"dtype": "BF16", "shape": [nbytes // 2], "data_offsets": [0, nbytes]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (tmp_path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(tmp_path / SINGLE, 8 + len(text) + nbytes)
    program = f"""
        import re
        from importlib import import_module
        from pathlib import Path
        package = import_module("ckpt_tools.verification")
        import_module("ckpt_tools.verification.text").check_text = lambda directory, findings: None
        found = package.verify({str(tmp_path)!r}, read_data=True, workers=2)
        assert found.nbytes == {nbytes}, found
        print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
    """

    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 100 * 1024


@pytest.mark.slow
def test_everything_at_once_is_clean_for_what_this_package_wrote(tmp_path: Path) -> None:
    """Nothing replaced: processes of their own, loading, and the checkpoint that it was made of."""
    directory = copy_of(write_chat_model, tmp_path / "out")
    checkpoint = FIXTURES / "zero/zero3-bf16-olmo2-chat-2ranks/checkpoint"

    found = verify(directory, against=checkpoint, read_data=True, load=True)

    assert not found.problems
    assert not found.skipped
    assert any("bit for bit" in what for what in found.checked)
    assert any("forward pass" in what for what in found.checked)


def test_a_checkpoint_that_is_none_is_said_before_anything_is_read(tmp_path: Path) -> None:
    directory = copy_of(write_chat_model, tmp_path / "out")

    calls: list[int] = []

    with pytest.raises(NotACheckpoint):
        verify(
            directory,
            against=tmp_path / "nowhere",
            read_data=True,
            progress=lambda done, total: calls.append(done),
        )

    assert not calls
