"""The planned bytes are those that safetensors and transformers write for the same tensors."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ckpt_tools.errors import UsageError
from ckpt_tools.tensors.catalogue import FlatRange, Fragment, Stored
from ckpt_tools.tensors.dtypes import ALL, BY_NAME, FLOAT32, DType
from ckpt_tools.writing.header import file_header
from ckpt_tools.writing.layout import Plan, PlannedFile, plan

FORMAT = {"format": "pt"}
SHAPES = ((), (0,), (3, 0, 2), (1,), (7,), (3, 5), (2, 3, 4, 1))
NAMES = (
    "",
    "a",
    "a.b",
    "a.b.c",
    "a_b",
    "A",
    "ключ.вес",
    "层.0.权重",
    "smile \N{GRINNING FACE}",
    "\uffee above the surrogates",
    "line\u2028separator",
    "tab\tand \x1f",
    "delete\x7f",
    'quote"s and back\\slashes/',
    "z" * 300,
)


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, row-major."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def our_dtype(tensor: torch.Tensor) -> DType:
    return BY_NAME[str(tensor.dtype).removeprefix("torch.")]


def counted(dtype: DType, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Arbitrary bytes; a bool may only be 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape) * dtype.itemsize
    values = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    if dtype.name == "bool":
        values %= 2
    return values.view(dtype.torch).reshape(shape)


def zoo() -> dict[str, torch.Tensor]:
    """Every dtype in every awkward shape, and every awkward name, in no particular order."""
    tensors = {
        f"{dtype.name}.{index}": counted(dtype, shape, index)
        for index, shape in enumerate(SHAPES)
        for dtype in ALL
    }
    tensors |= {name: counted(ALL[i % 4], (i,), i) for i, name in enumerate(NAMES)}
    names = list(tensors)
    random.Random(0).shuffle(names)
    return {name: tensors[name] for name in names}


def described(tensors: Mapping[str, torch.Tensor]) -> dict[str, Stored]:
    """The tensors as a catalogue knows them; the file is never opened, because a plan is pure."""
    return {
        name: Stored(
            our_dtype(tensor),
            tuple(tensor.shape),
            [Fragment(Path("/nowhere"), 0, FlatRange(0, tensor.numel()))],
        )
        for name, tensor in tensors.items()
    }


def laid_out(file: PlannedFile, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """What the planned file will hold."""
    content = bytearray(b"\xee" * file.size)
    content[: len(file.header)] = file.header
    for slot in file.slots:
        assert slot.end - slot.offset == len(raw(tensors[slot.name]))
        content[slot.offset : slot.end] = raw(tensors[slot.name])
    return bytes(content)


def with_blocks_of(layout: Plan, nbytes: int) -> Plan:
    """The plan with another size of block, which is otherwise chosen for speed."""
    vars(layout)["block_bytes"] = nbytes
    return layout


def test_one_file_is_what_save_file_writes(tmp_path: Path) -> None:
    tensors = zoo()
    save_file(tensors, tmp_path / "theirs", metadata=FORMAT)

    layout = plan(described(tensors))

    assert [file.name for file in layout.files] == ["model.safetensors"]
    assert layout.index is None
    assert laid_out(layout.files[0], tensors) == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_tensor_is_what_save_file_writes(
    tmp_path: Path, dtype: DType, shape: tuple[int, ...]
) -> None:
    tensors = {"x": counted(dtype, shape)}
    save_file(tensors, tmp_path / "theirs", metadata=FORMAT)

    (file,) = plan(described(tensors)).files

    assert laid_out(file, tensors) == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_the_data_begins_at_a_multiple_of_the_alignment(tmp_path: Path, alignment: int) -> None:
    tensors = {"x": counted(FLOAT32, (3,)), "y": counted(FLOAT32, (5,))}
    layouts = {name: (our_dtype(t), tuple(t.shape)) for name, t in tensors.items()}

    header, offsets = file_header(layouts, {"note": "words"}, alignment=alignment)

    assert len(header) % alignment == 0
    assert offsets == {"x": len(header), "y": len(header) + 12}
    (tmp_path / "file").write_bytes(header + raw(tensors["x"]) + raw(tensors["y"]))
    with safe_open(tmp_path / "file", "pt") as held:
        assert held.metadata() == {"note": "words"}
        assert all(torch.equal(held.get_tensor(name), tensors[name]) for name in tensors)


def test_no_tensors_are_what_save_file_writes(tmp_path: Path) -> None:
    save_file({}, tmp_path / "theirs", metadata=FORMAT)

    layout = plan({})

    assert [file.name for file in layout.files] == ["model.safetensors"]
    assert laid_out(layout.files[0], {}) == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("size", [1, 10, 47, 64, 200, 1_000, "1KB", "2KB", 10**6])
def test_shards_are_what_huggingface_hub_writes(tmp_path: Path, size: int | str) -> None:
    tensors = {name: tensor for name, tensor in zoo().items() if tensor.numel()}
    tensors["empty"] = torch.empty(0, 4)

    assert shards(tensors, size) == shards_of_huggingface_hub(tensors, tmp_path, size)


def test_tensors_without_elements_lie_where_huggingface_hub_puts_them(tmp_path: Path) -> None:
    """All in the shard of the first: they share one storage, the null pointer."""
    tensors = zoo()

    assert shards(tensors, 1_000) == shards_of_huggingface_hub(tensors, tmp_path, 1_000)


Shards = tuple[dict[str, bytes], dict[str, str] | None]


def shards(tensors: Mapping[str, torch.Tensor], size: int | str) -> Shards:
    """The content of each file, and the index's map."""
    layout = plan(described(tensors), max_shard_size=size)
    files = {file.name: laid_out(file, tensors) for file in layout.files}
    if layout.index is None:
        return files, None
    name, content = layout.index
    assert name == "model.safetensors.index.json"
    index = json.loads(content)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    return files, index["weight_map"]


def shards_of_huggingface_hub(
    tensors: dict[str, torch.Tensor], directory: Path, size: int | str
) -> Shards:
    huggingface_hub.save_torch_state_dict(tensors, directory, max_shard_size=size)
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    index = files.pop("model.safetensors.index.json", None)
    return files, None if index is None else json.loads(index)["weight_map"]


@pytest.mark.parametrize("size", ["100GB", "20KB", "3KB", "100B", 7_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_is_what_save_pretrained_writes(
    tmp_path: Path, size: int | str, dtype: torch.dtype
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=61,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=11,
        num_attention_heads=3,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config).to(dtype)
    size = 100 if size == "100B" else size
    model.save_pretrained(tmp_path, max_shard_size=size)
    theirs = {p.name: p.read_bytes() for p in tmp_path.iterdir() if "model" in p.name}

    tensors = model.state_dict()
    layout = plan(described(tensors), max_shard_size=size)

    ours = {file.name: laid_out(file, tensors) for file in layout.files}
    ours |= dict([layout.index] if layout.index else [])
    assert ours == theirs
    assert layout.sizes == {name: len(content) for name, content in theirs.items()}
    assert layout.nbytes == sum(map(len, theirs.values()))
    assert layout.tensor_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_the_stem_names_files_and_index() -> None:
    layout = plan(described(zoo()), max_shard_size=2_000, stem="adapter_model")

    count = len(layout.files)
    assert count > 1
    assert [file.name for file in layout.files] == [
        f"adapter_model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)
    ]
    assert layout.index is not None
    assert layout.index[0] == "adapter_model.safetensors.index.json"


def test_the_listing_names_every_file_and_tensor() -> None:
    tensors = zoo()
    layout = plan(described(tensors), max_shard_size=2_000)

    listing = json.loads(json.dumps(layout.listing()))

    assert [entry["file"] for entry in listing] == [file.name for file in layout.files]
    assert [entry["bytes"] for entry in listing] == [file.size for file in layout.files]
    listed = {entry["name"]: entry for file in listing for entry in file["tensors"]}
    assert listed.keys() == tensors.keys()
    assert listed["float32.5"] == {"name": "float32.5", "dtype": "float32", "shape": [3, 5]}


@pytest.mark.parametrize("size", ["5 apples", "", "GB", "1GiB", "nanGB", "infGB", "-1GB", 0, -5])
def test_a_size_that_is_none_is_refused(size: int | str) -> None:
    with pytest.raises(UsageError) as caught:
        plan(described({"x": torch.zeros(3)}), max_shard_size=size)
    assert repr(size) in caught.value.fact
    assert caught.value.hint is not None
    assert "5GB" in caught.value.hint


def test_planning_terabytes_reads_nothing_and_is_done_at_once() -> None:
    shape = (1 << 20, 1 << 17)
    fragment = Fragment(Path("/nowhere"), 0, FlatRange(0, math.prod(shape)))
    tensors = {f"layer.{i}.weight": Stored(FLOAT32, shape, [fragment]) for i in range(20)}

    layout = plan(tensors, max_shard_size="1TB")

    assert len(layout.files) == 20
    assert layout.files[0].size == len(layout.files[0].header) + 4 * math.prod(shape)
