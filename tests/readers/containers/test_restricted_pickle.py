"""No code from a pickle runs, nothing of ours is changed by one, and what is harmless is still read."""

from __future__ import annotations

import collections
import copy
import copyreg
import datetime
import enum
import io
import os
import pathlib
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ckpt_tools import consolidate, open_checkpoint
from ckpt_tools.errors import CkptError, DamagedCheckpoint, UnsafePickle, UnsupportedLayout
from ckpt_tools.readers.containers.restricted_pickle import Opaque, TensorRef, unpickle
from ckpt_tools.readers.containers.torch_file import TorchFile, stored
from ckpt_tools.tensors.dtypes import ALL, BFLOAT16, BY_NAME, FLOAT32
from tests.support import damage
from tests.support.hostile import CALLS, call, name, splice, value
from tests.support.readers.contract import Case, assert_same

FIXTURE = "zero2-bf16-llama-3ranks"
TRUTH = Case(damage.ZERO / FIXTURE).masters["lm_head.weight"]


def loads(fragment: bytes) -> Any:
    return unpickle(io.BytesIO(b"\x80\x02" + fragment + b"."), "some/file.pt")


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def model_file(tmp_path: Path) -> Path:
    return damage.copy_of(FIXTURE, tmp_path) / "mp_rank_00_model_states.pt"


# Code that runs under pickle does not run here.


@pytest.mark.parametrize("attack", CALLS)
def test_the_attack_is_real(attack: str, canary: Path) -> None:
    fragment = CALLS[attack](canary)
    program = "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"
    if "torch" in attack:  # slow to import in a child
        pickle.loads(b"\x80\x02" + fragment + b".")
    else:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
        subprocess.run(
            [sys.executable, "-c", program],
            input=b"\x80\x02" + fragment + b".",
            capture_output=True,
            env=environment,
        )
    assert canary.exists()


@pytest.mark.parametrize("attack", CALLS)
def test_an_attack_where_nothing_is_needed_does_not_run_and_the_rest_is_read(
    attack: str, tmp_path: Path, canary: Path
) -> None:
    path = model_file(tmp_path)
    splice(path, "client_state", CALLS[attack](canary))
    checkpoint = open_checkpoint(path.parent)
    assert_same(checkpoint["lm_head.weight"].load(), TRUTH, "lm_head.weight")
    assert not canary.exists()


@pytest.mark.parametrize("attack", CALLS)
@pytest.mark.parametrize("key", ["module", "param_shapes"])
def test_an_attack_where_something_is_needed_does_not_run_and_is_refused(
    attack: str, key: str, tmp_path: Path, canary: Path
) -> None:
    path = model_file(tmp_path)
    splice(path, key, CALLS[attack](canary))
    with pytest.raises(DamagedCheckpoint) as caught:
        open_checkpoint(path.parent)
    assert caught.value.exit_code == 4
    assert caught.value.path is not None
    assert caught.value.path.is_relative_to(path.parent)
    assert not canary.exists()


@pytest.mark.parametrize("attack", CALLS)
def test_an_attack_in_an_optimizer_file_does_not_run(
    attack: str, tmp_path: Path, canary: Path
) -> None:
    directory = damage.copy_of(FIXTURE, tmp_path)
    splice(damage.optim_files(directory)[1], "optimizer_state_dict", CALLS[attack](canary))
    with pytest.raises(DamagedCheckpoint) as caught:
        open_checkpoint(directory)
    assert caught.value.path == damage.optim_files(directory)[1]
    assert not canary.exists()


def test_an_attack_in_a_weight_is_refused_by_name(tmp_path: Path, canary: Path) -> None:
    path = model_file(tmp_path)
    attack = call(name("os", "system"), value(f"touch {canary}"))
    splice(path, "module", b"}" + value("lm_head.weight") + attack + b"s")
    with pytest.raises(UnsafePickle) as caught:
        open_checkpoint(path.parent)
    assert caught.value.tensor == "lm_head.weight"
    assert caught.value.fact == "it is not a plain tensor but a os.system"
    assert "No code from the file was run" in str(caught.value)
    assert not canary.exists()


def test_extra_state_that_only_code_could_build_is_no_weight(tmp_path: Path, canary: Path) -> None:
    path = model_file(tmp_path)

    def add(content: damage.Content) -> None:
        content["module"]["model.norm._extra_state"] = pathlib.PurePosixPath("anything")

    damage.edit(path, add)
    checkpoint = open_checkpoint(path.parent)
    assert "model.norm._extra_state" not in checkpoint
    assert_same(checkpoint["lm_head.weight"].load(), TRUTH, "lm_head.weight")


@pytest.fixture
def registered_extension() -> Iterator[int]:
    """An extension code for ``os.system``, already looked up by somebody in this process."""
    copyreg.add_extension("os", "system", 0xF1)
    pickle.loads(b"\x80\x02\x82\xf1.")
    yield 0xF1
    copyreg.remove_extension("os", "system", 0xF1)


def test_an_extension_code_does_not_reach_what_was_registered(
    canary: Path, registered_extension: int
) -> None:
    attack = b"\x82" + bytes([registered_extension]) + value(f"touch {canary}") + b"\x85R"
    assert isinstance(loads(attack), Opaque)
    assert not canary.exists()
    # And what we put in its place does not reach others.
    assert pickle.loads(b"\x80\x02\x82\xf1.") is os.system


@pytest.mark.parametrize(
    "code", [b"\x82\xf2", b"\x83\xf2\xf2", b"\x84\xf2\xf2\xf2\x00", b"\x84\0\0\0\0"]
)
def test_an_extension_code_that_nobody_registered_is_refused(code: bytes) -> None:
    with pytest.raises(DamagedCheckpoint):
        loads(code)


@pytest.mark.parametrize(
    ("fragment", "args"),
    [
        (name("subprocess", "Popen") + b"(" + value("id") + b"t\x81", ("id",)),
        (name("subprocess", "Popen") + value(("id",)) + value({"shell": True}) + b"\x92", ("id",)),
        (
            call(name("copyreg", "_reconstructor"), value("x"), name("builtins", "object"), b"N"),
            None,
        ),
        (call(name("copyreg", "__newobj__"), name("subprocess", "Popen"), value("id")), None),
        (call(name("copyreg", "add_extension"), value("os"), value("system"), value(7)), None),
    ],
    ids=["NEWOBJ", "NEWOBJ_EX", "copyreg._reconstructor", "copyreg.__newobj__", "add_extension"],
)
def test_every_way_to_make_an_object_makes_an_inert_one(fragment: bytes, args: Any) -> None:
    made = loads(fragment)
    assert isinstance(made, Opaque)
    assert args is None or made.args == args
    assert "not run" in repr(made)


def test_the_name_of_what_was_not_run_is_kept() -> None:
    assert loads(call(name("os", "system"), value("id"))).global_name == "os.system"


# Nothing of ours is changed.

SPARE = b"}" + value("spare") + b"Ns"
POISON: dict[str, bytes] = {
    "a dtype": name("torch", "float32") + value(["float32", "F32", 1, True]) + b"b",
    "a dtype's slots": name("torch", "float32") + b"N" + value({"itemsize": 1}) + b"\x86b",
    "a storage class": name("torch", "FloatStorage") + value(["uint8", "U8", 1, False]) + b"b",
    "OrderedDict itself": name("collections", "OrderedDict") + value({"__init__": 1}) + b"b",
    "OrderedDict's slots": name("collections", "OrderedDict")
    + b"N"
    + value({"__setitem__": 1})
    + b"\x86b",
    "set itself": name("builtins", "set") + b"N" + value({"add": 1}) + b"\x86b",
    "an inert class": name("os", "system") + value({"global_name": "harmless"}) + b"b",
    "a function's code": name("torch._utils", "_rebuild_tensor_v2")
    + b"N"
    + value({"__code__": None})
    + b"\x86b",
}


@pytest.mark.parametrize("poison", POISON)
def test_setting_state_on_what_the_pickle_was_handed_changes_nothing(poison: str) -> None:
    before = [(d.name, d.safetensors, d.itemsize, d.is_floating) for d in ALL]
    inert, ordered = dict(vars(Opaque)), dict(vars(collections.OrderedDict))
    with pytest.raises(DamagedCheckpoint):
        loads(POISON[poison])
    assert [(d.name, d.safetensors, d.itemsize, d.is_floating) for d in ALL] == before
    assert dict(vars(Opaque)) == inert
    assert dict(vars(collections.OrderedDict)) == ordered
    tensor = torch.arange(3.0)
    assert torch.equal(loaded({"t": tensor})["t"], tensor)


def test_an_allowed_function_takes_no_attributes() -> None:
    function = name("torch._utils", "_rebuild_tensor_v2")
    with pytest.raises(DamagedCheckpoint, match="it tries to change a _Function"):
        loads(function + value({"mark": 1}) + b"b")


def test_inert_classes_are_made_anew_for_every_pickle() -> None:
    assert loads(name("os", "system")) is not loads(name("os", "system"))


def test_dtypes_can_be_copied_all_the_same() -> None:
    assert copy.deepcopy(BFLOAT16) is BFLOAT16
    assert pickle.loads(pickle.dumps(FLOAT32)) is FLOAT32


# Lies about where tensors lie.


class TensorLie:
    """A torch file with one tensor of four floats, about which something is not true."""

    def __init__(self, directory: Path, **lies: bytes) -> None:
        parts = {
            "kind": value("storage"),
            "dtype": name("torch", "FloatStorage"),
            "key": value("0"),
            "location": value("cpu"),
            "numel": value(4),
            "offset": value(0),
            "size": value((4,)),
            "stride": value((1,)),
            "after_storage": b"",
            "after_tensor": b"",
            **lies,
        }
        pid = b"".join(parts[k] for k in ("kind", "dtype", "key", "location", "numel"))
        self.pickle = (
            b"\x80\x02}"
            + value("t")
            + name("torch._utils", "_rebuild_tensor_v2")
            + b"("
            + (lies.get("storage") or b"(" + pid + b"tQ" + parts["after_storage"])
            + parts["offset"]
            + parts["size"]
            + parts["stride"]
            + value(False)
            + value(collections.OrderedDict())
            + b"tR"
            + parts["after_tensor"]
            + b"s."
        )
        self.path = directory / "lie.pt"
        data = torch.tensor([1.0, 2.0, 3.0, 4.0]).numpy().tobytes()
        self.path.write_bytes(damage.torch_zip(self.pickle, {"0": data}))

    def read(self) -> torch.Tensor:
        return stored(TorchFile(self.path).load()["t"]).load()


def test_the_tensor_that_is_lied_about_is_read_where_nothing_is_a_lie(tmp_path: Path) -> None:
    assert TensorLie(tmp_path).read().tolist() == [1, 2, 3, 4]


LIES: dict[str, dict[str, bytes]] = {
    "negative number of elements": {"numel": value(-1)},
    "more elements than the record has": {"numel": value(5)},
    "a huge number of elements": {"numel": value(2**62), "size": value((2**62,))},
    "number of elements is a text": {"numel": value("4")},
    "number of elements is a fraction": {"numel": value(4.0)},
    "a key that is not there": {"key": value("1")},
    "a key that climbs out": {"key": value("../data.pkl")},
    "a key that is a number": {"key": value(0)},
    "a key that is an object": {"key": name("os", "system")},
    "another kind of reference": {"kind": value("module")},
    "negative offset": {"offset": value(-1)},
    "huge offset": {"offset": value(2**70)},
    "offset that leaves too little": {"offset": value(1)},
    "offset is a text": {"offset": value("0")},
    "more elements than the storage": {"size": value((5,))},
    "a huge size": {"size": value((2**40, 2**40)), "stride": value((2**40, 1))},
    "negative size": {"size": value((-4,))},
    "two negative sizes": {"size": value((-2, -2)), "stride": value((-2, 1))},
    "size is a text": {"size": value(("4",))},
    "size is a number": {"size": value(4)},
    "negative stride": {"stride": value((-1,))},
    "huge stride": {"size": value((2, 2)), "stride": value((2**62, 1))},
    "fewer strides than sizes": {"size": value((2, 2))},
    "a storage that is a dictionary": {"storage": value({})},
    "a storage that only looks like one": {
        "storage": call(name("collections", "OrderedDict"))
        + b"}("
        + value("path")
        + value("/etc/passwd")
        + value("data_offset")
        + value(0)
        + value("numel")
        + value(100)
        + value("dtype")
        + name("torch", "float32")
        + b"ub"
    },
    "a storage moved to another file": {
        "after_storage": b"N}("
        + value("file")
        + call(name("collections", "OrderedDict"))
        + value({"path": "/etc/passwd", "size": 10**6})
        + b"b"
        + value("_offset")
        + value(0)
        + b"u\x86b"
    },
    "a storage moved in its file": {"after_storage": b"N" + value({"_offset": 0}) + b"\x86b"},
    "a tensor with another state": {
        "after_tensor": value(["/etc/passwd", "float32", 0, [4], [1]]) + b"b"
    },
    "a tensor with another dictionary": {"after_tensor": value({"note": 1}) + b"b"},
    "a tensor with other slots": {"after_tensor": b"N" + value({"storage_offset": -9}) + b"\x86b"},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_about_a_tensor_is_refused(lie: str, tmp_path: Path) -> None:
    with pytest.raises(CkptError) as caught:
        TensorLie(tmp_path, **LIES[lie]).read()
    assert isinstance(caught.value, DamagedCheckpoint | UnsupportedLayout)
    assert caught.value.path is not None
    assert caught.value.path.name == "lie.pt"


def test_a_tensor_without_a_storage_is_no_tensor(tmp_path: Path) -> None:
    lie = TensorLie(tmp_path, storage=call(name("os", "system"), value("id")))
    assert isinstance(TorchFile(lie.path).load()["t"], Opaque)


@pytest.mark.parametrize("pid", [b"P0\n", value("storage") + b"Q", value(()) + b"Q", b"NQ"])
def test_a_reference_that_is_not_to_a_storage_is_refused(pid: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(damage.torch_zip(b"\x80\x02" + pid + b"."))
    with pytest.raises(DamagedCheckpoint, match="reference"):
        TorchFile(path).load()
    with pytest.raises(DamagedCheckpoint, match="reference to a storage outside a torch file"):
        loads(pid)


# Bombs and broken pickles.

DEEP = 100_000
BOMBS: dict[str, bytes] = {
    "lists in lists": b"]" * DEEP + b"a" * (DEEP - 1),
    "tuples in tuples": b"N" + b"\x85" * DEEP,
    "dictionaries in dictionaries": (b"}" + value("k")) * DEEP + b"N" + b"s" * DEEP,
    "calls of calls": name("os", "system") * DEEP + b")R" + b"\x85R" * (DEEP - 1),
    "a list that holds itself": b"]q\x01h\x01a",
    "doubled sixty times": b"]q\x010" + b"]h\x01ah\x01aq\x010" * 60 + b"h\x01",
}


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_where_nothing_is_needed_does_no_harm(bomb: str, tmp_path: Path) -> None:
    path = model_file(tmp_path)
    splice(path, "client_state", BOMBS[bomb])
    assert_same(open_checkpoint(path.parent)["lm_head.weight"].load(), TRUTH, "lm_head.weight")


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("key", ["module", "param_shapes", "buffer_names", "shared_params"])
def test_a_bomb_where_something_is_needed_is_refused(bomb: str, key: str, tmp_path: Path) -> None:
    path = model_file(tmp_path)
    splice(path, key, BOMBS[bomb])
    with pytest.raises(DamagedCheckpoint) as caught:
        open_checkpoint(path.parent)
    assert len(str(caught.value)) < 2000


def test_a_range_does_not_unfold() -> None:
    endless = call(name("builtins", "range"), value(10**15))
    assert isinstance(loads(endless), Opaque)
    with pytest.raises(DamagedCheckpoint):
        loads(call(name("builtins", "set"), endless))
    with pytest.raises(DamagedCheckpoint):
        loads(call(name("torch", "Size"), endless))


def test_a_bytearray_is_made_of_bytes_and_never_of_a_length() -> None:
    assert loads(call(name("builtins", "bytearray"), value(10**15))) == b""
    assert loads(pickle.dumps(bytearray(b"ab"), 2)[2:-1]) == b"ab"


@pytest.mark.parametrize(
    "broken",
    [b"", b"\x80", b"\x80\x02", b"\x80\x02]", b"\x80\x02.", b"\x80\x63N.", b"\x80\x02\xffN.", b"X.",
     b"\x80\x02X\xff\xff\xff\x7fabc.", b"\x80\x02h\x05.", b"\x80\x02X\x02\0\0\0\xff\xfe.", b"not a pickle"],
)  # fmt: skip
def test_a_broken_pickle_is_damage(broken: bytes) -> None:
    with pytest.raises(DamagedCheckpoint) as caught:
        unpickle(io.BytesIO(broken), "some/file.pt")
    assert str(caught.value).startswith("some/file.pt: the pickle in it cannot be ")
    assert caught.value.hint


def test_a_pickle_cut_anywhere_is_damage() -> None:
    whole = pickle.dumps({"a": [1, 2.5, ("x", None)], "b": collections.OrderedDict(k=b"v")}, 2)
    unpickle(io.BytesIO(whole), "f")
    for size in range(len(whole)):
        with pytest.raises(DamagedCheckpoint):
            unpickle(io.BytesIO(whole[:size]), "f")


# What people really keep in client state.


class Mood(enum.Enum):
    GOOD = 1


class Notes(dict):  # type: ignore[type-arg]
    pass


CLIENT_STATE: dict[str, Callable[[], Any]] = {
    "numpy array": lambda: np.arange(6.0).reshape(2, 3),
    "numpy scalar": lambda: np.float64(0.5),
    "random states": lambda: {"python": random.getstate(), "numpy": np.random.RandomState(0)},
    "times and paths": lambda: [datetime.datetime(2026, 1, 1), pathlib.PurePosixPath("/data")],
    "an enum member": lambda: Mood.GOOD,
    "a dictionary of a class of its own": lambda: Notes(a=1),
    "a deque and sets": lambda: [collections.deque([1]), {1}, frozenset({2}), slice(1), range(3)],
    "default dictionaries": lambda: collections.defaultdict(list, a=[1]),
    "complex numbers": lambda: torch.zeros(2, dtype=torch.complex128),
    "a dtype unknown here": lambda: torch.zeros(2, dtype=torch.float4_e2m1fn_x2),
    "a sparse tensor": lambda: torch.eye(3).to_sparse(),
    "a quantised tensor": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "a module": lambda: torch.nn.Linear(2, 2),
    "dtypes and devices": lambda: {"dtype": torch.bfloat16, "device": torch.device("cpu")},
    "a generator's state": lambda: torch.Generator().get_state(),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", CLIENT_STATE)
def test_client_state_of_any_class_does_not_hinder_reading(kind: str, tmp_path: Path) -> None:
    path = model_file(tmp_path)
    damage.edit(path, lambda content: content.update(client_state=CLIENT_STATE[kind]()))
    checkpoint = open_checkpoint(path.parent)
    assert_same(checkpoint["lm_head.weight"].load(), TRUTH, "lm_head.weight")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("a dtype unknown here", "its dtype is torch.float4_e2m1fn_x2"),
        ("a quantised tensor", "a quantised tensor of torch"),
        ("a sparse tensor", "a sparse tensor"),
    ],
)
def test_a_weight_that_is_no_plain_tensor_is_refused_by_name(
    kind: str, named: str, tmp_path: Path
) -> None:
    path = model_file(tmp_path)
    damage.edit(path, lambda content: content["module"].update(odd=CLIENT_STATE[kind]()))
    with pytest.raises(UnsupportedLayout, match=f"odd: {named}"):
        open_checkpoint(path.parent)


def test_a_weight_that_safetensors_cannot_hold_is_refused_only_where_it_is_written(
    tmp_path: Path,
) -> None:
    path = model_file(tmp_path)
    value = torch.tensor([1 + 2j, -0.0], dtype=torch.complex128)
    damage.edit(path, lambda content: content["module"].update(odd=value))
    checkpoint = open_checkpoint(path.parent)
    assert_same(checkpoint["odd"].load(), value, "odd")
    with pytest.raises(UnsupportedLayout, match="its dtype is complex128, which safetensors"):
        consolidate(path.parent, tmp_path / "all", weights_only=True)
    names = tmp_path / "names.json"
    names.write_text('{"odd": null, "*": "*"}')
    consolidate(path.parent, tmp_path / "rest", weights_only=True, key_map=names)
    assert "odd" not in load_file(tmp_path / "rest" / "model.safetensors")


# What is allowed means what it says.


def loaded(content: Any) -> dict[str, torch.Tensor]:
    stream = io.BytesIO()
    torch.save(content, stream)
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"restricted-{os.getpid()}.pt"
    path.write_bytes(stream.getvalue())
    try:
        return {n: stored(ref).load() for n, ref in TorchFile(path).load().items()}
    finally:
        path.unlink()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_plain_values_are_what_they_are_in_every_protocol(protocol: int) -> None:
    plain = {
        "i": [0, -1, 2**70], "f": 0.1, "s": "é", "b": b"\x00\xff", "t": (1, (2,)), "n": None,
        "o": collections.OrderedDict(z=1, a=2), "set": {1, 2}, "frozen": frozenset({3}),
        "count": collections.Counter("aab"), "c": 1 + 2j, "true": True,
    }  # fmt: skip
    found = unpickle(io.BytesIO(pickle.dumps(plain, protocol)), "f")
    assert found == plain
    assert list(found["o"]) == ["z", "a"]


def test_parameters_are_tensors_and_sizes_are_tuples(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    parameter = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    marked = torch.nn.Parameter(torch.ones(2))
    marked.mark = "kept by torch as state"  # type: ignore[attr-defined]
    torch.save({"p": parameter, "m": marked, "size": torch.Size([2, 3])}, path)
    content = TorchFile(path).load()
    assert content["size"] == (2, 3)
    assert isinstance(content["p"], TensorRef)
    assert stored(content["p"]).load().tolist() == parameter.tolist()
    assert stored(content["m"]).load().tolist() == [1, 1]


def test_dtypes_are_ours() -> None:
    for dtype in ALL:
        assert loads(name("torch", dtype.name)) is BY_NAME[dtype.name]
