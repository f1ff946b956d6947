"""The manifest says what a directory was made of and how; its digests are those of the bytes on disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from ckpt_tools import __version__, average, consolidate, extract_lora, merge_lora, open_checkpoint
from ckpt_tools.errors import OutputFailed
from ckpt_tools.model.adapter import read_adapter_directory
from ckpt_tools.writing.manifest import NAME, SUMS_NAME, Provenance, sums_text
from tests.conftest import FIXTURES
from tests.support.adapted import adapter_config, lora_state, write_checkpoint
from tests.transforms.test_hub_layout import Case
from tests.writing.test_hub_directory import save_state
from tests.writing.test_units import digests_by_hand

ZERO = FIXTURES / "zero"
CASE = ZERO / "zero2-bf16-llama-3ranks"
DOCS = (FIXTURES.parent / "docs" / "verify.md").read_text()
CHAT = ZERO / "zero3-bf16-olmo2-chat-2ranks"
TWO = FIXTURES / "peft" / "zero3-olmo2-two-adapters"


def read(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / NAME).read_bytes())
    return content


def paths(directory: Path) -> list[str]:
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


def assert_digests(directory: Path) -> None:
    """Recompute everything that the manifest of a directory says, from the files alone."""
    content = read(directory)
    tensors = content["tensors"]
    own = {entry["file"] for entry in tensors.values()}
    assert sorted(content["files"]) == [
        name for name in paths(directory) if name not in (NAME, SUMS_NAME)
    ]
    digests: dict[str, tuple[str, str]] = {}
    for name, entry in content["files"].items():
        data = (directory / name).read_bytes()
        assert entry["bytes"] == len(data)
        if name in own:
            size = 8 + int.from_bytes(data[:8], "little")
            header = xxhash.xxh3_128_hexdigest(data[:size])
            assert entry == {"bytes": len(data), "header_xxh3_128": header}
            by_hand = digests_by_hand(data, content["unit_bytes"])
            digests |= {tensor: (name, digest) for tensor, digest in by_hand.items()}
        else:
            assert entry == {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    assert {n: (entry["file"], entry["xxh3_128"]) for n, entry in tensors.items()} == digests
    text = (directory / NAME).read_text()
    assert content["xxh3_128"] == xxhash.xxh3_128_hexdigest(
        text.replace(f'"xxh3_128": "{content["xxh3_128"]}"\n}}', '"xxh3_128": ""\n}').encode()
    )
    assert text == json.dumps(content, indent=1, ensure_ascii=False) + "\n"


# -- the schema -------------------------------------------------------------------------------------


def test_it_has_these_keys_in_this_order(tmp_path: Path) -> None:
    consolidate(CASE / "checkpoint", tmp_path / "out", config=CASE / "hf", max_shard_size=3_000)

    content = read(tmp_path / "out")
    facts = json.loads((CASE / "facts.json").read_text())
    assert list(content) == [
        *("version", "tool", "command", "sources", "options", "request", "versions"),
        *("unit_bytes", "tensors", "files", "xxh3_128"),
    ]
    assert content["version"] == 1
    assert content["tool"] == f"ckpt-tools {__version__}"
    assert content["command"] == "consolidate"
    assert content["sources"] == [
        {
            "path": str(CASE / "checkpoint" / facts["tags"][-1]),
            "format": "deepspeed",
            "name": facts["tags"][-1],
            "title": "DeepSpeed ZeRO-2",
            "part": None,
            "step": facts["step"],
            "world_size": facts["world_size"],
            "framework": f"deepspeed {facts['deepspeed_version']}",
        }
    ]
    assert content["options"] == {"weights": "master", "dtype": "auto", "attribute": None}
    packages = ("torch", "transformers", "safetensors", "peft")
    assert content["versions"] == {package: version(package) for package in packages}
    assert content["unit_bytes"] == 64
    assert list(content["tensors"]) == sorted(content["tensors"])
    assert list(content["files"]) == sorted(content["files"])
    digest = re.compile("[0-9a-f]{32}")
    for entry in content["tensors"].values():
        assert list(entry) == ["file", "xxh3_128", "from"]
        assert digest.fullmatch(entry["xxh3_128"])
    for name, entry in content["files"].items():
        weights = name.endswith(".safetensors")
        assert list(entry) == ["bytes", "header_xxh3_128" if weights else "xxh3_128"]
    assert digest.fullmatch(content["xxh3_128"])
    described = DOCS.split("## The manifest")[1].split("\n## ")[0]
    for key in (*content, *content["sources"][0], *content["options"]):
        assert f"`{key}`" in described


def test_a_relative_path_of_a_source_is_written_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(CASE / "checkpoint", tmp_path / "run")
    monkeypatch.chdir(tmp_path)

    consolidate("run", "out", weights_only=True)

    (source,) = read(tmp_path / "out")["sources"]
    assert Path(source["path"]).is_relative_to(tmp_path / "run")


# -- digests ----------------------------------------------------------------------------------------


WHOLE = {"config": CHAT / "hf", "tokenizer": CHAT / "hf"}


@pytest.mark.parametrize(
    "options",
    [WHOLE, WHOLE | {"max_shard_size": 2_500}, {"dtype": "fp32", "weights_only": True}],
    ids=["one file", "shards", "weights alone"],
)
def test_every_digest_is_that_of_the_bytes_on_disk(tmp_path: Path, options: dict[str, Any]) -> None:
    consolidate(CHAT / "checkpoint", tmp_path / "out", **options)

    assert_digests(tmp_path / "out")
    content = read(tmp_path / "out")
    state: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        held = load_file(path)
        state |= held
        assert {n for n, e in content["tensors"].items() if e["file"] == path.name} == held.keys()
    assert content["tensors"].keys() == state.keys()
    assets = {"tokenizer.json", "config.json", "README.md"}
    assert assets & content["files"].keys() == (set() if "weights_only" in options else assets)


def test_units_larger_than_the_smallest_are_said_and_used(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    state = {f"t{i}": torch.randn(700_001) for i in range(5)}
    save_file(state, tmp_path / "source" / "model.safetensors", {"format": "pt"})

    consolidate(tmp_path / "source", tmp_path / "out", weights_only=True, max_shard_size="6MB")

    assert read(tmp_path / "out")["unit_bytes"] == 512
    assert_digests(tmp_path / "out")


@pytest.mark.parametrize("name", ["no tensors", "awkward"])
def test_awkward_tensors_have_digests_too(tmp_path: Path, name: str) -> None:
    (tmp_path / "source").mkdir()
    awkward = {
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "ключ.вес with spaces": torch.arange(7),
        "层\N{GRINNING FACE}\u2028": torch.ones(3, dtype=torch.bool),
        'quote"s\\': torch.randn(33).bfloat16(),
    }
    state = awkward if name == "awkward" else {"only empty": torch.empty(0)}
    save_file(state, tmp_path / "source" / "model.safetensors", {"format": "pt"})

    consolidate(tmp_path / "source", tmp_path / "out", weights_only=True)

    assert_digests(tmp_path / "out")
    assert read(tmp_path / "out")["tensors"].keys() == state.keys()


@pytest.mark.parametrize("workers", [2, 5])
def test_it_is_the_same_for_any_number_of_workers(tmp_path: Path, workers: int) -> None:
    for out, count in (("one", 1), ("many", workers)):
        consolidate(
            *(CHAT / "checkpoint", tmp_path / out),
            config=CHAT / "hf",
            tokenizer=CHAT / "hf",
            workers=count,
            max_shard_size=4_000,
            sha256=True,
        )

    for name in (NAME, SUMS_NAME):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()


def test_the_report_has_it_among_the_files(tmp_path: Path) -> None:
    report = consolidate(CASE / "checkpoint", tmp_path / "out", weights_only=True, sha256=True)

    assert set(report.files) == {NAME, SUMS_NAME, "model.safetensors"}
    assert report.files == {p.name: p.stat().st_size for p in (tmp_path / "out").iterdir()}
    assert report.bytes_written == sum(report.files.values())


def test_a_manifest_beside_the_source_is_not_taken_for_the_outputs(tmp_path: Path) -> None:
    consolidate(CASE / "checkpoint", tmp_path / "first", weights_only=True, dtype="fp32")

    consolidate(tmp_path / "first", tmp_path / "second", weights_only=True, dtype="bf16")

    assert_digests(tmp_path / "second")
    assert read(tmp_path / "second")["sources"][0]["format"] == "huggingface"


# -- adapters in folders ----------------------------------------------------------------------------


def test_a_manifest_is_of_all_that_lies_below_it(tmp_path: Path) -> None:
    extract_lora(
        TWO / "checkpoint",
        tmp_path / "out",
        adapter="all",
        adapter_config=TWO / "truth/adapter",
        sha256=True,
        base_model="owner/base",
    )

    inner, outer = tmp_path / "out" / "second", tmp_path / "out"
    assert_digests(inner)
    assert list(read(inner)["files"]) == ["adapter_config.json", "adapter_model.safetensors"]
    assert read(outer)["command"] == read(inner)["command"] == "extract-lora"
    assert read(outer)["options"]["adapter"] == "all"
    files = read(outer)["files"]
    assert sorted(files) == [name for name in paths(outer) if name not in (NAME, SUMS_NAME)]
    for name, entry in files.items():
        data = (outer / name).read_bytes()
        assert entry["bytes"] == len(data)
        assert "header_xxh3_128" in entry or entry["xxh3_128"] == xxhash.xxh3_128_hexdigest(data)
    assert {entry["file"] for entry in read(outer)["tensors"].values()} == {
        "adapter_model.safetensors"
    }
    assert checked(outer) == sorted(set(paths(outer)) - {SUMS_NAME})
    assert checked(inner) == sorted(set(paths(inner)) - {SUMS_NAME})


# -- recipes ----------------------------------------------------------------------------------------


def recipes(directory: Path) -> dict[str, Any]:
    return {name: entry.get("from", name) for name, entry in read(directory)["tensors"].items()}


def test_a_cast_is_recorded(tmp_path: Path) -> None:
    consolidate(CASE / "checkpoint", tmp_path / "out", weights_only=True, dtype="fp16")

    found = recipes(tmp_path / "out")
    assert found == {n: {"op": "cast", "of": n, "dtype": "float16"} for n in found}


def test_what_lies_as_it_lay_has_no_recipe(tmp_path: Path) -> None:
    consolidate(CASE / "checkpoint", tmp_path / "out", weights_only=True, dtype="keep")

    assert not [entry for entry in read(tmp_path / "out")["tensors"].values() if "from" in entry]
    assert read(tmp_path / "out")["options"]["dtype"] == "keep"


def test_the_other_copy_is_said_by_the_options(tmp_path: Path) -> None:
    consolidate(
        CASE / "checkpoint", tmp_path / "out", weights_only=True, dtype="keep", weights="model"
    )

    assert not [entry for entry in read(tmp_path / "out")["tensors"].values() if "from" in entry]
    assert read(tmp_path / "out")["options"]["weights"] == "model"


def test_a_rename_is_recorded(tmp_path: Path) -> None:
    source = FIXTURES / "composite" / "zero2-policy-value" / "checkpoint"

    consolidate(source, tmp_path / "out", attribute="policy", weights_only=True, dtype="keep")

    content = read(tmp_path / "out")
    assert content["command"] == "extract-attr"
    assert content["options"]["attribute"] == "policy"
    found = recipes(tmp_path / "out")
    assert found == {name: f"policy.{name}" for name in found}
    assert set(found.values()) <= open_checkpoint(source).keys()


def followed(recipe: Any, source: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What a recipe of moves makes, by torch."""
    if isinstance(recipe, str):
        return source[recipe]
    if recipe["op"] == "cast":
        return followed(recipe["of"], source).to(getattr(torch, recipe["dtype"]))
    if recipe["op"] == "concat":
        return torch.cat([followed(part, source) for part in recipe["of"]], recipe["axis"])
    assert recipe["op"] == "view"
    of = followed(recipe["of"], source).contiguous()
    return of.as_strided(recipe["shape"], recipe["strides"], recipe["offset"])


def test_experts_that_are_taken_apart_are_recorded(tmp_path: Path) -> None:
    case = Case("MixtralForCausalLM", tmp_path)
    state = case.model.state_dict()
    save_state(case.model, tmp_path / "state")

    consolidate(
        tmp_path / "state", tmp_path / "out", config=tmp_path / "truth", dtype="bf16", card=False
    )

    found = recipes(tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == written.keys()
    assert not written.keys() <= state.keys(), "experts have names of their own"
    named = {f"model.{name}": tensor for name, tensor in state.items()} | state
    for name, tensor in written.items():
        assert torch.equal(followed(found[name], named), tensor)
    assert any(isinstance(r, dict) and "view" in json.dumps(r) for r in found.values())


def test_a_mean_is_recorded_with_its_weights_and_sources(tmp_path: Path) -> None:
    other = ZERO / "zero3-bf16-llama-7ranks"

    average(
        [CASE / "checkpoint", other / "checkpoint"],
        tmp_path / "out",
        coefficients=[0.25, 0.75],
        dtype="fp32",
        weights_only=True,
    )

    content = read(tmp_path / "out")
    assert content["command"] == "average"
    assert [source["title"] for source in content["sources"]] == [
        "DeepSpeed ZeRO-2",
        "DeepSpeed ZeRO-3",
    ]
    found = recipes(tmp_path / "out")
    assert found == {
        name: {
            "op": "mean",
            "of": [name, {"op": "stored", "source": 1, "name": name}],
            "weights": [0.25, 0.75],
        }
        for name in found
    }
    assert_digests(tmp_path / "out")


def test_a_merge_is_recorded_with_its_factors_and_scale(tmp_path: Path) -> None:
    run = write_checkpoint(tmp_path / "run", lora_state(), adapter_config(lora_alpha=3))

    merge_lora(run, tmp_path / "out", weights_only=True, dtype="keep")

    merged = recipes(tmp_path / "out")["layers.0.q_proj.weight"]
    prefix = "base_model.model.layers.0.q_proj."
    assert merged["op"] == "merge"
    assert merged["base"] == prefix + "base_layer.weight"
    assert merged["a"] == prefix + "lora_A.default.weight"
    assert merged["b"] == prefix + "lora_B.default.weight"
    assert merged["scale"] == 1.5
    assert (merged["transposed"], merged["magnitude"]) == (False, None)
    assert (merged["expert"], merged["experts"]) == (0, 1)
    assert_digests(tmp_path / "out")


def test_an_adapter_from_a_directory_of_its_own_is_a_source(tmp_path: Path) -> None:
    run = write_checkpoint(tmp_path / "run", lora_state(), adapter_config())
    extract_lora(run, tmp_path / "adapter")
    plain = {
        n.replace("base_layer.", "").removeprefix("base_model.model."): t
        for n, t in lora_state().items()
        if "lora_" not in n
    }
    base = write_checkpoint(tmp_path / "base", plain)

    merge_lora(base, tmp_path / "out", adapter_dir=tmp_path / "adapter", weights_only=True)

    content = read(tmp_path / "out")
    assert [source["name"] for source in content["sources"]] == ["base", "adapter"]
    assert content["sources"][1]["path"] == str(tmp_path / "adapter")
    merged = json.dumps(recipes(tmp_path / "out")["layers.0.q_proj.weight"])
    assert '"source": 1' in merged


# -- whether two runs are of the same sources -------------------------------------------------------


def identity(run: Path, beside: Path | None = None) -> str:
    catalogues = {}
    if beside is not None:
        catalogues[beside] = read_adapter_directory(beside, "default")[0].catalogue
    return Provenance("merge-lora", (open_checkpoint(run),), {}, catalogues).identity()


def test_a_source_that_changed_is_another(tmp_path: Path) -> None:
    run = write_checkpoint(tmp_path / "run", lora_state(), adapter_config())
    weights = run / "model.safetensors"
    before, stat = identity(run), weights.stat()
    assert identity(run) == before

    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert identity(run) != before

    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert identity(run) == before


def identity_of_files(*files: Path) -> str:
    """Of a checkpoint that was read from these, whatever is in them."""
    checkpoint = open_checkpoint(CASE / "checkpoint")
    checkpoint = replace(checkpoint, files={file: file.stat().st_size for file in files})
    return Provenance("consolidate", (checkpoint,), {}).identity()


def test_files_of_other_names_sizes_or_number_are_another_source(tmp_path: Path) -> None:
    for name, content in (("a", "1"), ("b", "1"), ("c", "12")):
        (tmp_path / name).write_text(content)
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / "moved").mkdir()
    shutil.copy2(tmp_path / "a", tmp_path / "moved" / "a")
    a, b, c = (tmp_path / name for name in "abc")

    found = [identity_of_files(*files) for files in ([a], [b], [c], [a, b], [])]

    assert len(set(found)) == len(found)
    assert identity_of_files(tmp_path / "moved" / "a") == found[0], "it may lie elsewhere"


def test_a_directory_beside_that_changed_is_another_source(tmp_path: Path) -> None:
    run = write_checkpoint(tmp_path / "run", lora_state(), adapter_config())
    extract_lora(run, tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    before, stat = identity(run, tmp_path / "adapter"), weights.stat()
    assert before == identity(run, tmp_path / "adapter") != identity(run)

    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))

    assert identity(run, tmp_path / "adapter") != before


# -- checksums --------------------------------------------------------------------------------------


def checked(directory: Path) -> list[str]:
    """The files that sha256sum finds right."""
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", SUMS_NAME],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert all(line.endswith(": OK") for line in lines)
    return sorted(line.removesuffix(": OK") for line in lines)


def test_sha256sum_accepts_the_checksums_of_every_file(tmp_path: Path) -> None:
    consolidate(
        CHAT / "checkpoint",
        tmp_path / "out",
        config=CHAT / "hf",
        tokenizer=CHAT / "hf",
        max_shard_size=4_000,
        sha256=True,
    )

    assert checked(tmp_path / "out") == [n for n in paths(tmp_path / "out") if n != SUMS_NAME]
    assert NAME in checked(tmp_path / "out")
    with (tmp_path / "out" / "tokenizer.json").open("r+b") as stream:
        stream.seek(5)
        stream.write(b"!")
    run = subprocess.run(
        ["sha256sum", "-c", SUMS_NAME], cwd=tmp_path / "out", capture_output=True, check=False
    )
    assert run.returncode == 1


def test_no_checksums_are_written_unasked(tmp_path: Path) -> None:
    consolidate(CASE / "checkpoint", tmp_path / "out", weights_only=True)

    assert not (tmp_path / "out" / SUMS_NAME).exists()


ODD = [
    "with space",
    " leading",
    "ü",
    "层.json",
    "in/a folder/of its own",
    "*",
    "'quoted' \"twice\"",
]


@pytest.mark.parametrize("workers", [1, 4])
def test_odd_names_are_summed_and_checked(tmp_path: Path, workers: int) -> None:
    for number, name in enumerate(ODD):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes([number]) * (number * 500_000))
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / ".hidden").write_text("hidden")

    text = sums_text(tmp_path, workers)

    (tmp_path / SUMS_NAME).write_text(text)
    assert checked(tmp_path) == sorted(ODD)
    assert text.splitlines() == [
        f"{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}  {name}"
        for name in sorted(ODD)
    ]
    assert sums_text(tmp_path, workers) == text, "its own file is not summed"


def test_an_adapter_with_an_odd_name_is_written_and_summed(tmp_path: Path) -> None:
    renamed = {n.replace(".default.", ".zwei ö."): t for n, t in lora_state().items()}
    run = write_checkpoint(tmp_path / "run", renamed, adapter_config())

    extract_lora(run, tmp_path / "out", adapter="all", sha256=True)

    folder = tmp_path / "out" / "zwei ö"
    assert_digests(folder)
    assert checked(folder) == ["adapter_config.json", "adapter_model.safetensors", NAME]


def test_a_file_that_cannot_be_read_back_is_a_failure_of_the_output(tmp_path: Path) -> None:
    (tmp_path / "file").symlink_to("/proc/self/mem")  # whose first byte nobody may read

    with pytest.raises(OutputFailed, match="cannot be read back"):
        sums_text(tmp_path, 1)
