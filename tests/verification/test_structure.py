"""Files, index and headers: every way in which they can be wrong is found, and called what it is."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, deserialize

from ckpt_tools import verification
from ckpt_tools.errors import UsageError
from ckpt_tools.verification import verify
from ckpt_tools.verification.container import read_container
from ckpt_tools.verification.directory import list_directory
from ckpt_tools.verification.problem import Findings
from tests.conftest import FIXTURES
from tests.support.verification.directories import (
    INDEX,
    SINGLE,
    Damage,
    Header,
    Maker,
    also,
    answer_here,
    copy_adapter,
    copy_of,
    edit_header,
    edit_json,
    first,
    join,
    last,
    save_llama,
    save_pickled,
    save_sharded_llama,
    save_tied,
    shards,
    split,
    write_chat_model,
)

# -- what is done ------------------------------------------------------------------------------------


def remove_all_weights(directory: Path) -> None:
    for path in directory.glob("*.safetensors*"):
        path.unlink()


def empty(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()


def leave_a_partial_file(directory: Path) -> str:
    (directory / "model.safetensors.incomplete").write_bytes(b"half")
    return "model.safetensors.incomplete"


def leave_an_interrupted_download(directory: Path) -> str:
    folder = directory / ".cache/huggingface/download"
    folder.mkdir(parents=True)
    (folder / "abc.incomplete").write_bytes(b"half")
    return ".cache/huggingface/download/abc.incomplete"


def leave_a_partial_directory(directory: Path) -> str:
    (directory / "out.partial-1a2b").mkdir()
    (directory / "out.partial-1a2b/x").write_bytes(b"")
    return "out.partial-1a2b/x"


def break_a_link(directory: Path) -> str:
    (directory / "tokenizer.json").symlink_to(directory / "gone")
    return "tokenizer.json"


def lay_a_pipe(directory: Path) -> str:
    os.mkfifo(directory / "vocab.json")
    return "vocab.json"


def repeat_a_key_in_the_index(directory: Path) -> str:
    text = (directory / INDEX).read_text()
    (directory / INDEX).write_text(text.replace("{", '{"metadata": {},', 1))
    return INDEX


def repeat_a_key_in_a_header(directory: Path) -> str:
    path = shards(directory)[0]
    header, data = split(path)
    name = first(path)
    text = json.dumps(header)
    join(path, text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}", data)
    return path.name


def cut_the_index(directory: Path) -> str:
    content = (directory / INDEX).read_bytes()
    (directory / INDEX).write_bytes(content[:-20])
    return INDEX


def empty_the_weight_map(directory: Path) -> str:
    edit_json(directory / INDEX, lambda index: index.update(weight_map={}))
    return INDEX


def remove_metadata_of_the_index(directory: Path) -> str:
    edit_json(directory / INDEX, lambda index: index.pop("metadata"))
    return INDEX


def point_outside(directory: Path) -> str:
    name = last(shards(directory)[0])
    edit_json(
        directory / INDEX, lambda index: index["weight_map"].update({name: "../other.safetensors"})
    )
    return name


def remove_the_index(directory: Path) -> str:
    (directory / INDEX).unlink()
    return INDEX


def rename_the_single_file(directory: Path) -> str:
    (directory / SINGLE).rename(directory / "weights.safetensors")
    return "weights.safetensors"


def remove_a_shard(directory: Path) -> str:
    path = shards(directory)[1]
    path.unlink()
    return path.name


def remove_the_first_shard(directory: Path) -> str:
    path = shards(directory)[0]
    path.unlink()
    return path.name


def swap_two_entries_of_the_index(directory: Path) -> str:
    name, other = first(shards(directory)[0]), shards(directory)[1].name
    edit_json(directory / INDEX, lambda index: index["weight_map"].update({name: other}))
    return name


def invent_an_entry_of_the_index(directory: Path) -> str:
    shard = shards(directory)[0].name
    edit_json(
        directory / INDEX, lambda index: index["weight_map"].update({"model.new.weight": shard})
    )
    return "model.new.weight"


def drop_an_entry_of_the_index(directory: Path) -> str:
    name = first(shards(directory)[0])
    edit_json(directory / INDEX, lambda index: index["weight_map"].pop(name))
    return name


def miscount_the_total(directory: Path) -> str:
    edit_json(directory / INDEX, lambda index: index["metadata"].update(total_size=1))
    return INDEX


def drop_the_total(directory: Path) -> str:
    edit_json(directory / INDEX, lambda index: index["metadata"].pop("total_size"))
    return INDEX


def leave_an_old_shard(directory: Path) -> str:
    name = "model-00009-of-00009.safetensors"
    shutil.copyfile(shards(directory)[0], directory / name)
    return name


def leave_another_file(directory: Path) -> str:
    shutil.copyfile(directory / SINGLE, directory / "consolidated.safetensors")
    return "consolidated.safetensors"


def leave_a_shard_beside_the_single_file(directory: Path) -> str:
    name = "model-00001-of-00009.safetensors"
    shutil.copyfile(directory / SINGLE, directory / name)
    return name


def rename_a_shard(directory: Path) -> str:
    """To a number that the count does not allow."""
    path = shards(directory)[-1]
    name = path.name.replace("-of-", "9-of-")
    path.rename(directory / name)
    weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    weight_map = {t: name if f == path.name else f for t, f in weight_map.items()}
    edit_json(directory / INDEX, lambda index: index.update(weight_map=weight_map))
    return shards(directory)[0].name


def rename_a_shard_to_another_series(directory: Path) -> None:
    path = shards(directory)[-1]
    name = path.name.replace("model-", "other-")
    path.rename(directory / name)
    weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    weight_map = {t: name if f == path.name else f for t, f in weight_map.items()}
    edit_json(directory / INDEX, lambda index: index.update(weight_map=weight_map))


def rename_shards_to_a_series_of_billions(directory: Path) -> str:
    named = {
        path.name: re.sub(r"-of-\d+", "-of-99999999999", path.name) for path in shards(directory)
    }
    for old, new in named.items():
        (directory / old).rename(directory / new)
    edit_json(
        directory / INDEX,
        lambda index: index.update(
            weight_map={t: named[file] for t, file in index["weight_map"].items()}
        ),
    )
    return shards(directory)[0].name


def lay_a_single_file_beside(directory: Path) -> str:
    shutil.copyfile(shards(directory)[0], directory / SINGLE)
    return SINGLE


def write_a_tensor_twice(directory: Path) -> str:
    one, other = shards(directory)[:2]
    (header, data), (theirs, more) = split(one), split(other)
    name = first(other)
    start, stop = theirs[name]["data_offsets"]
    header[name] = dict(theirs[name], data_offsets=[len(data), len(data) + stop - start])
    join(one, header, data + more[start:stop])
    return name


def lay_pickles_beside(directory: Path) -> str:
    torch.save({}, directory / "pytorch_model.bin")
    return "pytorch_model.bin"


def cut_a_pickle(directory: Path) -> str:
    path = directory / "pytorch_model-00001-of-00002.bin"
    path.write_bytes(path.read_bytes()[:-100])
    return path.name


def replace_by_a_pointer(directory: Path) -> str:
    (directory / SINGLE).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 4976698672\n"
    )
    return SINGLE


def cut(keep: Callable[[int], int]) -> Callable[[Path], str]:
    def do(directory: Path) -> str:
        os.truncate(directory / SINGLE, keep((directory / SINGLE).stat().st_size))
        return SINGLE

    return do


def append(directory: Path) -> str:
    with (directory / SINGLE).open("ab") as stream:
        stream.write(b"\0")
    return SINGLE


def overwrite(at: int, content: bytes) -> Callable[[Path], str]:
    def do(directory: Path) -> str:
        with (directory / SINGLE).open("r+b") as stream:
            stream.seek(at)
            stream.write(content)
        return SINGLE

    return do


def header(change: Callable[[Header], object]) -> Callable[[Path], str]:
    def do(directory: Path) -> str:
        edit_header(directory / SINGLE, change)
        return SINGLE

    return do


def of_a_tensor(**values: object) -> Callable[[Path], str]:
    def do(directory: Path) -> str:
        name = first(directory / SINGLE)
        edit_header(directory / SINGLE, lambda found: found[name].update(values))
        return name

    return do


def misalign(directory: Path) -> str:
    join(directory / SINGLE, *split(directory / SINGLE), padded=False)
    return SINGLE


def leave_a_hole(directory: Path) -> str:
    path = directory / SINGLE
    found, data = split(path)
    name = last(path)
    low, high = found[name]["data_offsets"]
    found[name]["data_offsets"] = [low + 8, high + 8]
    join(path, found, data[:low] + bytes(8) + data[low:])
    return name


def overlap(directory: Path) -> str:
    path = directory / SINGLE
    found, data = split(path)
    name = last(path)
    low, high = found[name]["data_offsets"]
    found[name]["data_offsets"] = [low - 8, high - 8]
    join(path, found, data[:-8])
    return name


def nest(directory: Path) -> str:
    """The last tensor within the first, whose bytes end far behind it."""
    path = directory / SINGLE
    found, data = split(path)
    name = last(path)
    low, high = found[name]["data_offsets"]
    found[name]["data_offsets"] = [8, 8 + high - low]
    join(path, found, data[:low])
    return name


def remove_the_index_and_the_last_shard(directory: Path) -> str:
    (directory / INDEX).unlink()
    shards(directory)[-1].unlink()
    return shards(directory)[0].name


def leave_code_that_nothing_names(directory: Path) -> str:
    (directory / "modeling_named.py").write_text("from .helper import x\n")
    (directory / "helper.py").write_text("x = 1\n")
    named = {"AutoModel": "modeling_named.Model"}
    edit_json(directory / "config.json", lambda config: config.update(auto_map=named))
    (directory / "modeling_x.py").write_text("import os\n")
    return "modeling_x.py"


def lay_weights_in_a_folder(directory: Path) -> str:
    (directory / "sub").mkdir()
    shutil.copyfile(shards(directory)[0], directory / "sub" / "x.safetensors")
    return "sub"


def link_a_config_of_elsewhere(directory: Path) -> str:
    outside = directory.with_name("config.json")
    (directory / "config.json").rename(outside)
    (directory / "config.json").symlink_to(outside)
    return "config.json"


DAMAGES = [
    Damage("link-outside", link_a_config_of_elsewhere),
    Damage("code-unnamed", leave_code_that_nothing_names),
    Damage("weights-elsewhere", lay_weights_in_a_folder),
    Damage("no-weights", remove_all_weights),
    Damage("no-weights", empty),
    Damage("leftover", leave_a_partial_file),
    Damage("leftover", leave_an_interrupted_download),
    Damage("leftover", leave_a_partial_directory),
    Damage("file-unreadable", break_a_link),
    Damage("file-unreadable", lay_a_pipe),
    Damage("duplicate-key", repeat_a_key_in_the_index),
    Damage("duplicate-key", repeat_a_key_in_a_header),
    Damage("index-invalid", cut_the_index),
    Damage("index-invalid", empty_the_weight_map),
    Damage("index-invalid", remove_metadata_of_the_index, also=also("index-total-size")),
    Damage("index-invalid", point_outside, also=also("index-tensor-unlisted")),
    Damage("index-missing", remove_the_index),
    Damage("index-missing", rename_the_single_file, save_llama),
    Damage("index-missing-shard", remove_a_shard),
    Damage("index-missing-shard", remove_the_first_shard),
    Damage("index-tensor-missing", swap_two_entries_of_the_index),
    Damage("index-tensor-missing", invent_an_entry_of_the_index),
    Damage("index-tensor-unlisted", drop_an_entry_of_the_index),
    Damage("index-total-size", miscount_the_total),
    Damage("index-total-size", drop_the_total),
    Damage("shard-stray", leave_an_old_shard),
    Damage("shard-stray", leave_another_file, save_llama, severity="warning"),
    Damage("shard-stray", leave_a_shard_beside_the_single_file, save_llama),
    Damage("shard-numbering", rename_a_shard),
    Damage("shard-numbering", rename_a_shard_to_another_series),
    Damage("shard-numbering", rename_shards_to_a_series_of_billions),
    Damage(
        "shard-numbering",
        remove_the_index_and_the_last_shard,
        also=also("index-missing", "tensor-missing"),
    ),
    Damage("single-and-sharded", lay_a_single_file_beside),
    Damage("tensor-duplicate", write_a_tensor_twice, also=also("index-total-size")),
    Damage("pickled-weights", lambda directory: None, save_pickled),
    Damage("pickled-weights-beside", lay_pickles_beside),
    Damage("pickled-invalid", cut_a_pickle, save_pickled, also("pickled-weights")),
    Damage("lfs-pointer", replace_by_a_pointer, save_llama),
    Damage("shard-truncated", cut(lambda size: 0), save_llama),
    Damage("shard-truncated", cut(lambda size: 5), save_llama),
    Damage("shard-truncated", cut(lambda size: 100), save_llama),
    Damage("shard-truncated", cut(lambda size: size - 1), save_llama),
    Damage("trailing-bytes", append, save_llama),
    Damage("header-invalid", overwrite(8, b"["), save_llama),
    Damage("header-invalid", overwrite(20, b"\xff"), save_llama),
    Damage("header-invalid", overwrite(0, b"\xff" * 8), save_llama),
    Damage("header-invalid", header(lambda h: h.update(__metadata__={"format": 1})), save_llama),
    Damage("header-invalid", of_a_tensor(shape=[-1]), save_llama, also("tensor-missing")),
    Damage("header-invalid", of_a_tensor(data_offsets=[0]), save_llama, also("tensor-missing")),
    Damage("header-unaligned", misalign, save_llama),
    Damage("format-missing", header(lambda h: h.pop("__metadata__")), save_llama),
    Damage("format-missing", header(lambda h: h.update(__metadata__={"format": "np"})), save_llama),
    Damage("dtype-unknown", of_a_tensor(dtype="BF17"), save_llama),
    Damage("tensor-size", of_a_tensor(dtype="F32"), save_llama, also("dtype-mixed")),
    Damage("data-hole", leave_a_hole, save_llama),
    Damage("data-overlap", overlap, save_llama),
    Damage("data-overlap", nest, save_llama),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
def test_damage_is_found_and_called_what_it_is(
    damage: Damage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage.must_be_found(tmp_path, monkeypatch)


def test_a_header_may_name_the_tensors_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_here(monkeypatch)
    directory = copy_of(save_llama, tmp_path / "model")
    found, data = split(directory / SINGLE)
    join(directory / SINGLE, dict(reversed(found.items())), data)

    assert not verify(directory, read_data=True).problems


def test_a_header_that_safetensors_refuses_is_an_error_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever bytes of it are changed; safetensors itself is the judge."""
    directory = copy_of(save_llama, tmp_path / "model")
    path = directory / SINGLE
    content = path.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    draw = random.Random(0)
    refused = 0
    for _ in range(400):
        changed = bytearray(content)
        for _ in range(draw.choice((1, 1, 1, 2))):
            at = draw.randrange(length)
            changed[at] = draw.choice(
                (changed[at] ^ 1 << draw.randrange(8), ord(draw.choice('0123456789,:"[]{} ')))
            )
        path.write_bytes(changed)
        findings = Findings()
        read_container(directory, SINGLE, findings)
        try:
            deserialize(bytes(changed))  # type: ignore[no-untyped-call]
        except SafetensorError:
            refused += 1
            assert [p for p in findings.problems if p.severity == "error"], bytes(changed[:length])
    assert refused > 200


def test_what_cannot_be_checked_at_all_is_an_error_of_the_caller(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="the directory does not exist"):
        verify(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="not a directory"):
        verify(tmp_path / "file")


def test_the_directory_above_the_models_says_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_here(monkeypatch)
    copy_of(save_llama, tmp_path / "run/checkpoint-500")

    (problem,) = verify(tmp_path / "run").problems

    assert problem.kind == "no-weights"
    assert problem.hint == "Name one of the directories in it: checkpoint-500."


def test_a_checkpoint_of_training_is_to_be_converted() -> None:
    zero = FIXTURES / "zero" / "zero2-bf16-llama-two-saves-2ranks" / "checkpoint"

    (problem,) = verify(zero).problems
    assert problem.kind == "no-weights"
    assert problem.hint == (
        "It is a checkpoint of training (deepspeed). Convert it, and verify the output: "
        f"ckpt-tools consolidate {zero} OUT."
    )
    # Its folder with a config has no weights.
    verl = FIXTURES / "rank_files" / "verl-fsdp1-3ranks" / "checkpoint"
    (problem,) = verify(verl).problems
    assert (problem.hint or "").startswith("It is a checkpoint of training (rank-files).")
    (problem,) = verify(FIXTURES / "dcp" / "torchtitan-2ranks" / "checkpoint").problems
    assert (problem.hint or "").startswith(
        "It holds checkpoints of training. List them: ckpt-tools"
    )


@pytest.mark.parametrize(
    ("maker", "file"),
    [
        (save_sharded_llama, INDEX),
        (save_sharded_llama, "config.json"),
        (save_llama, SINGLE),
        (save_pickled, "pytorch_model-00002-of-00002.bin"),
        (copy_adapter, "adapter_config.json"),
        (write_chat_model, "ckpt_tools_manifest.json"),
        (write_chat_model, "SHA256SUMS"),
        (write_chat_model, "tokenizer.json"),
    ],
)
def test_a_file_that_vanishes_meanwhile_is_a_problem_and_no_crash(
    maker: Maker, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that is on a disk that fails."""
    answer_here(monkeypatch)
    directory = copy_of(maker, tmp_path / "directory")
    listing = list_directory(directory, Findings())
    (directory / file).unlink()
    monkeypatch.setattr(verification, "list_directory", lambda path, findings: listing)

    problems = verify(directory, read_data=True).problems

    assert any(
        file == p.file and p.kind in ("file-unreadable", "pickled-invalid") for p in problems
    )


def test_a_value_that_is_no_object_is_no_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_here(monkeypatch)
    directory = copy_of(save_sharded_llama, tmp_path / "model")
    (directory / INDEX).write_text("[]")

    (problem,) = verify(directory).problems

    assert (problem.kind, problem.detail) == (
        "index-invalid",
        "it holds a JSON list, not an object",
    )


# What stands in the place of a value that somebody edited by hand.
ODD: tuple[object, ...] = (None, -1, True, 1e300, "x", "a(", [], [[]], [None], ["a"], {}, {"a": []})


@pytest.mark.parametrize(
    ("maker", "file"),
    [
        (save_sharded_llama, INDEX),
        (copy_adapter, "adapter_config.json"),
        (write_chat_model, "ckpt_tools_manifest.json"),
        pytest.param(save_tied, "config.json", marks=pytest.mark.slow),
    ],
)
def test_no_value_of_a_json_file_makes_it_stumble(
    maker: Maker, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_here(monkeypatch)
    path = copy_of(maker, tmp_path / "directory") / file
    data = json.loads(path.read_text())
    for key in data:
        for value in ODD:
            path.write_text(json.dumps(data | {key: value}))
            verify(path.parent, read_data=file != "config.json")


def test_all_problems_are_found_at_once_and_errors_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_here(monkeypatch)
    directory = copy_of(save_sharded_llama, tmp_path / "model")
    lost = remove_a_shard(directory)
    lay_pickles_beside(directory)
    os.truncate(shards(directory)[-1], shards(directory)[-1].stat().st_size - 1)
    edit_json(directory / "config.json", lambda config: config.update(dtype="float32"))

    verdict = verify(directory)

    assert [p.kind for p in verdict.problems] == [
        "config-dtype",
        "index-missing-shard",
        "shard-truncated",
        "pickled-weights-beside",
    ]
    assert verdict.problems[1].file == lost
    assert verify(directory).problems == verdict.problems
    assert not verdict.clean()
    assert verdict.to_json()["problems"][1] == {
        "kind": "index-missing-shard",
        "severity": "error",
        "file": lost,
        "tensor": None,
        "detail": verdict.problems[1].detail,
        "hint": "Copy or download the file.",
    }


def test_a_warning_is_no_failure_unless_it_is_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_here(monkeypatch)
    directory = copy_of(save_llama, tmp_path / "model")
    lay_pickles_beside(directory)

    verdict = verify(directory)

    assert verdict.clean() and not verdict.clean(strict=True)


@pytest.mark.slow
def test_the_structure_of_405_billion_parameters_is_checked_in_flat_memory(tmp_path: Path) -> None:
    """Sparse files with true headers, in a process of its own; transformers runs in another."""
    program = f"""
        import json, re, sys
        from pathlib import Path
        from importlib import import_module
        package = import_module('ckpt_tools.verification')
        import_module('ckpt_tools.verification.text').check_text = lambda directory, findings: None
        found = package.verify({str(tmp_path)!r})
        peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
        loaded = sorted({{"torch", "transformers"}} & sys.modules.keys())
        print(json.dumps([found.to_json(), int(peak[1]), loaded]))
    """
    count = lay_out_405_billion(tmp_path)

    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert run.returncode == 0, run.stderr
    found, peak_kib, loaded = json.loads(run.stdout)
    assert found["problems"] == []
    assert (found["tensors"], found["nbytes"]) == (1137, 811_706_777_600)
    assert "names and shapes of LlamaForCausalLM (1,137 tensors)" in found["checked"]
    assert count > 150
    assert peak_kib < 100 * 1024 and not loaded


def lay_out_405_billion(directory: Path) -> int:
    """Llama 3.1 405B's config, index and shards, with headers and holes; the number of shards."""
    hidden, width, rows, heads = 16384, 53248, 128256, 1024
    layer = {
        "self_attn.q_proj": [hidden, hidden],
        "self_attn.k_proj": [heads, hidden],
        "self_attn.v_proj": [heads, hidden],
        "self_attn.o_proj": [hidden, hidden],
        "mlp.gate_proj": [width, hidden],
        "mlp.up_proj": [width, hidden],
        "mlp.down_proj": [hidden, width],
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
    }
    shapes = {"model.embed_tokens.weight": [rows, hidden]}
    for number in range(126):
        shapes |= {f"model.layers.{number}.{k}.weight": shape for k, shape in layer.items()}
    shapes |= {"model.norm.weight": [hidden], "lm_head.weight": [rows, hidden]}
    config = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    (directory / "config.json").write_text(json.dumps(config))
    groups: list[list[str]] = [[]]
    for name, shape in shapes.items():
        if sum(2 * math.prod(shapes[held]) for held in groups[-1]) + 2 * math.prod(shape) > 4.7e9:
            groups.append([])
        groups[-1].append(name)
    weight_map = {}
    for number, names in enumerate(groups, 1):
        path = directory / f"model-{number:05}-of-{len(groups):05}.safetensors"
        header: Header = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            start, end = end, end + 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [start, end]}
            weight_map[name] = path.name
        join(path, header, b"")
        os.truncate(path, path.stat().st_size + end)
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))
    return len(groups)
