"""A pickle cannot kill the process, or take memory and time beyond its length, by what it builds."""

from __future__ import annotations

import io
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from ckpt_tools import open_checkpoint
from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.readers.containers import (
    pickle_alike,
    pickle_limits,
    pickle_opcodes,
    pickle_sharing,
    restricted_pickle,
)
from ckpt_tools.readers.containers.pickle_keys import Key
from ckpt_tools.readers.containers.pickle_limits import follow
from ckpt_tools.readers.containers.pickle_sharing import Endless
from ckpt_tools.readers.containers.restricted_pickle import Opaque, unpickle
from ckpt_tools.readers.containers.torch_file import TorchFile
from tests.conftest import FIXTURES
from tests.support import damage
from tests.support.hostile import call, name, splice, value
from tests.support.sampled import sampled

DEEP = 300_000
FOUR_BYTES = [i.to_bytes(4, "little") for i in range(DEEP + 1)]


def as_key(nest: bytes) -> bytes:
    """A dictionary with the nest as a key, which hashes it."""
    return b"}" + nest + b"Ns"


NESTS = {
    "tuples of one": as_key(b"N" + b"\x85" * DEEP),
    "tuples of two": as_key(b"N" + b"K\x01\x86" * DEEP),
    "tuples of three": as_key(b"N" + b"NN\x87" * DEEP),
    "tuples after marks": as_key(b"(N" * DEEP + b"t" * DEEP),
    "by the memo": as_key(b"Nq\x00" + b"h\x00\x85q\x000" * DEEP + b"h\x00"),
    "by the memo in lines": as_key(b"Np0\n" + b"g0\n\x85p0\n0" * DEEP + b"g0\n"),
    "by a memo that counts": as_key(
        b"N\x94"
        + b"".join(b"j" + i + b"\x85\x940" for i in FOUR_BYTES[:-1])
        + b"j"
        + FOUR_BYTES[-1]
    ),
    "by copies of the top": b"(N" + b"2\x85" * DEEP + b"\x91",
    "among marks that are popped": as_key(b"N" + b"\x85(0" * DEEP),
    "behind names that look like opcodes": value("(((t)R}s.")
    + b"0"
    + as_key(b"N" + b"\x85" * DEEP),
    "behind bytes that are no end": b"C\x02..0" + as_key(b"N" + b"\x85" * DEEP),
    "frozen sets": as_key(b"(" * DEEP + b"K\x01" + b"\x91" * DEEP),
    "in a set": b"\x8f(N" + b"\x85" * DEEP + b"\x90",
    "in a frozen set": b"(N" + b"\x85" * DEEP + b"\x91",
    "as arguments": b"N" + b"\x85" * DEEP + name("x", "Y") + b"2" + as_key(b"N" + b"\x85" * DEEP),
}
# Ways to get a tuple out of a list, which is not hashed by what it holds and ends a nest.
SMUGGLED = {
    "torch.Size": (name("torch", "Size") + b"]") * DEEP + b"N" + b"a\x85R" * DEEP,
    "a parameter": call(
        name("torch._tensor", "_rebuild_from_type_v2"),
        name("torch._utils", "_rebuild_parameter"),
        b"N",
        b"](N" + b"\x85" * 10 + b"e",
        b"N",
    ),
}
# What is freed as deep as it was built.
HARMLESS = {
    "lists": b"]" * DEEP + b"a" * (DEEP - 1),
    "dictionaries": b"}" + b"K\x01}" * DEEP + b"s" * DEEP,
    "ordered dictionaries": (name("collections", "OrderedDict") + b")RK\x01") * DEEP
    + b"N"
    + b"s" * DEEP,
    "default dictionaries": (name("collections", "defaultdict") + b")RK\x01") * DEEP
    + b"N"
    + b"s" * DEEP,
    "counters": (name("collections", "Counter") + b")RK\x01") * DEEP + b"N" + b"s" * DEEP,
    "attributes": (name("collections", "OrderedDict") + b")R}X\x01\x00\x00\x00a") * DEEP
    + b"N"
    + b"sb" * DEEP,
    "inert objects": name("x", "Y") * DEEP + b"N" + b"\x85R" * DEEP,
    "their states": (name("x", "Y") + b")\x81") * DEEP + b"N" + b"b" * DEEP,
    "their results": name("x", "Y") + b")R" * DEEP,
}
READ = """
import io, sys
from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.readers.containers.pickle_sharing import Endless
from ckpt_tools.readers.containers.restricted_pickle import unpickle
try:
    built = unpickle(io.BytesIO(sys.stdin.buffer.read()), "some/file.pt")
    print("built", flush=True)
    del built
    print("and freed")
except DamagedCheckpoint as error:
    print(error.fact)
"""


def in_a_child(program: str, fragment: bytes) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    return subprocess.run(
        [sys.executable, "-c", program],
        input=b"\x80\x04" + fragment + b".",
        capture_output=True,
        env=environment,
        check=False,
    )


@pytest.mark.slow
def test_the_attack_is_real() -> None:
    program = "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"

    assert in_a_child(program, NESTS["tuples of one"]).returncode == -signal.SIGSEGV


@pytest.mark.parametrize("nest", sampled(NESTS, 8))
def test_a_nest_of_tuples_is_refused(nest: str) -> None:
    done = in_a_child(READ, NESTS[nest])

    assert done.returncode == 0, done.stderr
    assert b"a key in it is not a plain value, or too large" in done.stdout


@pytest.mark.slow
def test_a_nest_of_tuples_that_is_no_key_gives_way() -> None:
    """Readers may use it as a key."""
    done = in_a_child(
        READ.replace("    del built", "    hash(built[0].state)\n    del built"),
        b"]" + name("x", "Y") + b")RN" + b"\x85" * DEEP + b"ba",
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [b"built", b"and", b"freed"]


@pytest.mark.slow
@pytest.mark.parametrize("way", SMUGGLED)
def test_no_function_makes_tuples_that_nobody_counts(way: str) -> None:
    with pytest.raises(DamagedCheckpoint, match=r"that is not a number|that is not a tensor"):
        unpickle(io.BytesIO(b"\x80\x04" + SMUGGLED[way] + b"."), "some/file.pt")


@pytest.mark.slow
@pytest.mark.parametrize("nest", HARMLESS)
def test_any_other_nest_is_built_and_freed(nest: str) -> None:
    done = in_a_child(READ, HARMLESS[nest])

    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [b"built", b"and", b"freed"]


def opened_in_a_child(path: Path) -> str:
    """What opening it says, which might be nothing any more."""
    program = f"""
from ckpt_tools import open_checkpoint
from ckpt_tools.errors import DamagedCheckpoint
try:
    open_checkpoint({str(path)!r})
except DamagedCheckpoint as error:
    print(error)
"""
    done = in_a_child(program, b"")
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def test_a_checkpoint_with_such_a_pickle_is_damaged(tmp_path: Path) -> None:
    path = damage.copy_of("zero2-bf16-llama-3ranks", tmp_path) / "mp_rank_00_model_states.pt"
    splice(path, "client_state", NESTS["tuples of one"])

    assert opened_in_a_child(path.parent).startswith(f"{path}: the pickle in it cannot be read")


def test_a_legacy_file_with_such_a_pickle_is_damaged(tmp_path: Path) -> None:
    """Several pickles in a stream, whose lengths nobody tells beforehand."""
    saved = io.BytesIO()
    torch.save({"x": torch.zeros(2)}, saved, _use_new_zipfile_serialization=False)
    ends = [saved.seek(0)]
    for _ in range(3):
        pickle.Unpickler(saved).load()
        ends.append(saved.tell())
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(
        saved.getvalue()[: ends[3]] + b"\x80\x04" + NESTS["tuples of two"] + b"." + bytes(1000)
    )

    assert "a key in it is not a plain value" in opened_in_a_child(path)


def test_a_legacy_file_with_pickles_larger_than_a_look_is_read(tmp_path: Path) -> None:
    state = {f"layers.{i}.weight": torch.full((2,), float(i)) for i in range(3000)}
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert path.stat().st_size > 4 * pickle_limits._WINDOW

    checkpoint = open_checkpoint(path)

    assert [*checkpoint] == [*state]
    assert torch.equal(checkpoint["layers.2999.weight"].load(), state["layers.2999.weight"])


def test_a_class_within_classes_without_end_is_refused_at_once() -> None:
    """Each is named after all around it, which would take the square of the length."""
    names = name("builtins", "getattr") * DEEP + name("x", "Y") + (value("a") + b"\x86R") * DEEP

    with pytest.raises(DamagedCheckpoint, match=r"names more than|name of a class"):
        unpickle(io.BytesIO(b"\x80\x04" + names + b"."), "some/file.pt")


# Memory and time follow from the length of the pickle.

GIGABYTE = 1 << 30
SHARED = {
    "tuples as keys": b")q\x00" + b"h\x00h\x00\x86q\x00" * 40 + b"}h\x00Ns",
    "tuples as values": b")q\x00" + b"h\x00h\x00\x86q\x00" * 40,
    "copies of tuples": b")" + b"2\x86" * 60,
    "lists": b"]q\x00" + b"](h\x00h\x00eq\x00" * 40,
    "lists that are filled late": b"".join(b"]q" + bytes([i]) + b"0" for i in range(60))
    + b"".join(
        b"h" + bytes([i]) + b"(h" + bytes([i + 1]) + b"h" + bytes([i + 1]) + b"e0"
        for i in range(59)
    )
    + b"h\x00",
    "mappings": b"}q\x00" + b"}(K\x01h\x00K\x02h\x00uq\x00" * 40,
    "mappings by calls": name("collections", "OrderedDict")
    + b"q\x01)Rq\x000"
    + b"h\x01)R(K\x01h\x00K\x02h\x00uq\x000" * 40
    + b"h\x00",
    "frozen sets": b"(K\x01\x91q\x000" + b"(h\x00(h\x00\x91\x91q\x000" * 40 + b"}h\x00Ns",
    "in an object": b"]q\x00" + b"](h\x00h\x00eq\x00" * 40 + name("x", "Y") + b"q\x01h\x00\x85R",
}
HUNGRY = {
    "an index of the memo": b"Nr" + (150_000_000).to_bytes(4, "little"),
    "an index of the memo in a line": b"Np150000000\n",
    "a number of digits": b"L" + b"9" * 4000 + b"L\n",
    "a number of bytes": b"\x8b" + (1 << 20).to_bytes(4, "little") + bytes(1 << 20),
    "a frame": b"\x95" + (1 << 40).to_bytes(8, "little"),
    "names": b"".join(b"c\nn%d\n0" % i for i in range(5_000)) + b"N",
    "arguments": name("x", "Y")
    + b"q\x01(("
    + b"N" * 50_000
    + b"tq\x02"
    + b"h\x01h\x02R" * 50_000
    + b"t",
    "a set of one list": name("builtins", "set")
    + b"q\x010]("
    + b"".join(b"M" + i.to_bytes(2, "little") for i in range(50_000))
    + b"e\x85q\x02("
    + b"h\x01h\x02R" * 50_000
    + b"t",
    "a mapping of one mapping": name("collections", "OrderedDict")
    + b"q\x010}("
    + b"".join(b"M" + i.to_bytes(2, "little") + b"N" for i in range(50_000))
    + b"u\x85q\x02("
    + b"h\x01h\x02R" * 50_000
    + b"t",
    "bytes": name("builtins", "bytearray")
    + b"q\x01C\xff"
    + b"x" * 255
    + b"\x85q\x02("
    + b"h\x01h\x02R" * 200_000
    + b"t",
    "a text that is encoded": name("_codecs", "encode")
    + b"q\x01X"
    + (100_000).to_bytes(4, "little")
    + b"x" * 100_000
    + b"\x85q\x02("
    + b"h\x01h\x02R" * 100_000
    + b"t",
    "a long number as text": call(name("builtins", "complex"), value("1" * 10_000)),
    "a device of many parts": call(name("torch", "device"), *[value("x")] * 10),
    "a size of many parts": call(name("torch", "Size"), value([1] * 100)),
    "a chain of functions": name("torch._tensor", "_rebuild_from_type_v2")
    + b"q\x01"
    + b"(h\x01NNNt" * 1
    + b"q\x02(h\x01Nh\x02NtR",
}


@pytest.mark.parametrize("shape", SHARED)
def test_what_shares_without_end_ends_at_once(shape: str) -> None:
    """Where it is refused, and where the innermost values give way: both can be printed and compared."""
    try:
        shown = repr(unpickle(io.BytesIO(b"\x80\x04" + SHARED[shape] + b"."), "some/file.pt"))
    except DamagedCheckpoint as error:
        shown = error.fact
    assert re.search(r"expands to much more|not a plain value|expands without end|x\.Y", shown)
    assert len(shown) < 100 * pickle_sharing._ITEMS


@pytest.mark.slow
@pytest.mark.parametrize("want", HUNGRY)
def test_what_takes_more_than_it_holds_is_refused(want: str) -> None:
    with pytest.raises(DamagedCheckpoint):
        unpickle(io.BytesIO(b"\x80\x04" + HUNGRY[want] + b"."), "some/file.pt")


def test_what_contains_itself_gives_way_to_an_inert_object() -> None:
    cycle = unpickle(io.BytesIO(b"\x80\x04]q\x00(h\x00K\x07e."), "some/file")

    assert isinstance(cycle[0], Endless)
    assert cycle[1:] == [7]


def test_what_is_beside_it_is_read() -> None:
    """Of an object with endless arguments too: the object keeps its name."""
    for shape in SHARED:
        if shape != "tuples as keys" and not shape.startswith("frozen"):
            data = (
                b"\x80\x04}("
                + value("held")
                + b"("
                + SHARED[shape]
                + b"t"
                + value("beside")
                + b"K\x07u."
            )
            assert unpickle(io.BytesIO(data), "some/file")["beside"] == 7
    object_ = unpickle(io.BytesIO(b"\x80\x04" + SHARED["in an object"] + b"."), "some/file")
    assert object_.global_name == "x.Y"


def test_what_frameworks_share_is_read() -> None:
    """One mesh in every tensor of a rank, settings in several places, and objects in cycles."""
    ranks = [*range(512)]
    settings = {"betas": (0.9, 0.999), "ranks": ranks}
    groups = [{"settings": settings, "of": [name, ranks]} for name in ("a", "b", "c")]
    data = pickle.dumps({"groups": groups, "settings": settings, "all": [groups, groups]}, 2)

    assert unpickle(io.BytesIO(data), "some/file")["all"][1][2]["of"] == ["c", ranks]

    class Node:
        pass

    node = Node()
    node.self, node.held = node, [node]  # type: ignore[attr-defined]
    globals()["Node"] = Node
    Node.__qualname__ = "Node"
    read = unpickle(io.BytesIO(pickle.dumps({"n": (node, [node])}, 2)), "some/file")

    assert read["n"][0].state["self"] is read["n"][0]


@pytest.mark.slow
def test_a_signal_is_answered_while_a_pickle_is_read() -> None:
    """Reading a hundred megabytes of numbers takes seconds in one call of the unpickler."""
    program = """
import io, os, signal, threading, time
from ckpt_tools.readers.containers.restricted_pickle import RestrictedUnpickler
from ckpt_tools.readers.containers.pickle_limits import Meter
asked = []
def note(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, note)
data = b"\\x80\\x02(" + b"K\\x01" * 60_000_000 + b"l."
unpickler = RestrictedUnpickler(data, Meter(len(data)))
signal.setitimer(signal.ITIMER_REAL, 0.05)
try:
    unpickler.load()
    print("not interrupted")
except KeyboardInterrupt:
    print("interrupted")
"""
    assert in_a_child(program, b"").stdout == b"interrupted\n"


# Following itself, on what is no attack.


def shipped_pickles() -> list[bytes]:
    found = [path.read_bytes() for path in FIXTURES.rglob("*.metadata")]
    for path in [*FIXTURES.rglob("*.pt"), *FIXTURES.rglob("*.bin"), *FIXTURES.rglob("*.pkl")]:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                found += [archive.read(n) for n in archive.namelist() if n.endswith("data.pkl")]
    return found


def test_every_shipped_pickle_passes() -> None:
    pickles = shipped_pickles()

    for data in pickles:
        follow(io.BytesIO(data))
    assert len(pickles) > 300


def random_value(generator: random.Random, depth: int) -> Any:
    kind = generator.randrange(10) if depth else 9
    if kind == 9:
        return generator.choice(
            [None, True, 7, 70_000, -3, 1 << 40, 2.5, "t(t", "R" * 300, b"\x85\x85", b"(", "é"]
        )
    items = [random_value(generator, depth - 1) for _ in range(generator.randrange(5))]
    if kind == 8 and items:
        return [items[0], items[0], (items[0],)]
    if kind == 7:
        return {f"k{i}": item for i, item in enumerate(items)}
    if kind == 6:
        return {1, 2, "three"} if generator.random() < 0.5 else frozenset(["a", 1.5])
    return items if kind == 5 else tuple(items)


def largest(plain: Any) -> int:
    """The size of the largest tuple or frozen set, counting a list or mapping in it as one without limit."""

    def size(one: Any) -> int:
        if isinstance(one, tuple | frozenset):
            return 1 + sum(map(size, one)) if one else 1
        return pickle_opcodes.MUTABLE if isinstance(one, list | dict | set) else 1

    inner = plain.values() if isinstance(plain, dict) else plain
    nested = [largest(one) for one in inner] if isinstance(plain, list | tuple | dict) else []
    own = size(plain) if isinstance(plain, tuple | frozenset) else 1
    return max([own, *nested])


@pytest.mark.parametrize("protocol", range(4, pickle.HIGHEST_PROTOCOL + 1))
def test_it_counts_as_much_as_there_is(protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key may be as large as the limit, and not larger."""
    generator = random.Random(protocol)
    seen = set()
    for _ in range(1000):
        plain = random_value(generator, 6)
        size = largest((plain,))
        whole = pickle.dumps((plain,), protocol)
        opcodes = whole[11:-1] if whole[2:3] == b"\x95" else whole[2:-1]
        data = b"\x80\x04}" + opcodes + b"Ns."
        monkeypatch.setattr(pickle_limits, "_LARGEST_KEY", size)
        follow(io.BytesIO(data))
        monkeypatch.setattr(pickle_limits, "_LARGEST_KEY", min(size, pickle_opcodes.MUTABLE) - 1)
        with pytest.raises(pickle.UnpicklingError, match="not a plain value"):
            follow(io.BytesIO(data))
        seen.add(size)
    assert seen >= {2, 3, 4, 5}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_it_reads_what_python_pickles(protocol: int) -> None:
    generator = random.Random(protocol)
    for _ in range(500):
        plain = random_value(generator, 6)
        data = pickle.dumps(plain, protocol)
        if protocol < 4 and b"frozenset" in data:
            continue  # becomes an inert object

        assert follow(io.BytesIO(data + b"after")).data == data
        assert unpickle(io.BytesIO(data), "some/file") == plain


@pytest.mark.parametrize(
    "odd",
    [
        b"(K\x01K\x020t.",
        b"K\x01(0.",
        b"K\x01(K\x02K\x031.",
        b"(K\x01(0K\x02t.",
        b"K\x01q\xff0K\x02\x940h\xffh\x01\x86.",
        b"I01\nL7L\nF1.5\nS'a'\nVb\n\x87\x86\x86.",
        b"(I1\nI2\nl(dp3\n0g3\n\x86.",
    ],
)
def test_what_no_pickler_writes_and_python_reads_passes(odd: bytes) -> None:
    plain = pickle.loads(b"\x80\x02" + odd)

    assert unpickle(io.BytesIO(b"\x80\x02" + odd), "some/file") == plain


def test_it_ends_where_the_pickle_ends() -> None:
    first, second = pickle.dumps(["x" * 500] * 3), pickle.dumps((1, (2, (3,))))
    stream = io.BufferedReader(io.BytesIO(b"before" + first + second + b"\xff" * 100))  # type: ignore[arg-type]
    stream.seek(6)

    assert follow(stream).data == first
    assert follow(stream).data == second
    with pytest.raises(pickle.UnpicklingError, match="invalid load key"):
        follow(stream)


def test_a_pickle_cut_anywhere_ends_too_early() -> None:
    data = pickle.dumps({"name": ("x", 1 << 70, [2.5, b"bytes"]), "other": {3}}, 4)
    for length in range(2, len(data)):
        for stream in (io.BytesIO(data[:length]), io.BufferedReader(io.BytesIO(data[:length]))):  # type: ignore[arg-type]
            with pytest.raises(EOFError):
                follow(stream)


def test_many_tuples_are_no_nest() -> None:
    plain = {f"layers.{i}": ((i, i + 1), (i,)) for i in range(120_000)}

    assert unpickle(io.BytesIO(pickle.dumps(plain, 2)), "some/file") == plain


# Pickles that are like one that was followed.


def ranks_pickle(rank: int, *more: Any) -> bytes:
    state = {f"layers.{i}": (rank, [i], f"cuda:{rank}") for i in range(2_000)}
    return pickle.dumps([state, *more], 2)


@pytest.fixture
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_alike, "_known", {})


@pytest.mark.usefixtures("nothing_known")
def test_pickles_that_differ_in_values_are_followed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    followed = []
    monkeypatch.setattr(pickle_alike, "follow", lambda file: followed.append(file) or follow(file))

    for rank in range(4):
        data = ranks_pickle(rank)
        assert pickle_alike.follow_alike(io.BytesIO(data)).data == data
        assert unpickle(io.BytesIO(data), "some/file") == pickle.loads(data)
    assert len(followed) == 1


@pytest.mark.usefixtures("nothing_known")
@pytest.mark.parametrize(
    ("sound", "hostile"),
    [
        # An index of the memo, a count of bytes and an opcode are no values.
        (b"Nr" + bytes(4), b"Nr" + (150_000_000).to_bytes(4, "little")),
        (b"\x95" + bytes(8), b"\x95" + (1 << 40).to_bytes(8, "little")),
        (b"M\x01\x00", b"NN0"),
    ],
)
def test_what_differs_in_more_than_values_is_followed_anew(sound: bytes, hostile: bytes) -> None:
    filler = b"C" + bytes([255]) + bytes(255) + b"0"
    pickles = [b"\x80\x04" + filler * 40 + part + b"N." for part in (sound, hostile)]
    assert len(pickles[0]) == len(pickles[1])

    def told(data: bytes, look: Any) -> Any:
        try:
            found = look(io.BytesIO(data))
        except (pickle.UnpicklingError, EOFError) as error:
            return str(error)
        return found.is_odd, found.has_containers, [*found.shares]

    alone = [told(data, follow) for data in pickles]
    for first, second in ((0, 1), (1, 0)):
        pickle_alike._known.clear()
        told(pickles[first], pickle_alike.follow_alike)
        assert told(pickles[second], pickle_alike.follow_alike) == alone[second]
    assert isinstance(alone[1], str) or alone[0] == alone[1]


@pytest.mark.usefixtures("nothing_known")
def test_a_key_that_grows_is_seen_behind_a_like_pickle() -> None:
    """A nest of the same length has other opcodes."""
    flat, nest = b"K\x010" * 2_000, b"\x85\x85\x85" * 2_000
    unpickle(io.BytesIO(b"\x80\x04}N" + flat + b"Ns."), "some/file")
    with pytest.raises(DamagedCheckpoint, match="a key in it is not a plain value"):
        unpickle(io.BytesIO(b"\x80\x04}N" + nest + b"Ns."), "some/file")


def test_what_is_shared_within_the_limit_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mesh in each tensor of a rank; measuring all that was built takes longer than building it."""
    monkeypatch.setattr(restricted_pickle, "without_expansion", None)
    mesh = (*range(1_024),)
    data = pickle.dumps([OrderedDict({f"layers.{i}": (i, mesh) for i in range(200)})], 2)

    assert unpickle(io.BytesIO(data), "some/file") == pickle.loads(data)


PRIME = (1 << 61) - 1  # whole numbers that differ by it have one hash


def tuples_of_one_hash(count: int) -> bytes:
    """-1 and -2 have one hash, and so do the tuples that they are in."""
    numbers = b"J\xff\xff\xff\xff\x940J\xfe\xff\xff\xff\x940"
    places = (
        b"".join(b"h\x01" if i >> k & 1 else b"h\x00" for k in range(16)) for i in range(count)
    )
    return numbers + b"}(" + b"".join(b"(" + place + b"tN" for place in places) + b"u"


def sizes(count: int) -> bytes:
    keys = (call(name("torch", "Size"), value((i, 1))) for i in range(count))
    return b"}(" + b"".join(key + b"N" for key in keys) + b"u"


def numbers_as_text(count: int) -> bytes:
    return b"}(" + b"".join(b"I%d\nN" % (i * PRIME) for i in range(9, count + 9)) + b"u"


KEYS_OF_ONE_HASH = {
    "long numbers": lambda n: value({i * PRIME: None for i in range(4, n + 4)}),
    "long numbers as text": numbers_as_text,
    "tuples": tuples_of_one_hash,
    "sizes": sizes,
    "items of a set": lambda n: b"\x8f(" + b"".join(value((i, 1)) for i in range(n)) + b"\x90",
}


@pytest.mark.parametrize("keys", KEYS_OF_ONE_HASH)
def test_keys_that_may_have_one_hash_are_compared_while_they_are_few(keys: str) -> None:
    """Comparing each with all others would take minutes or hours."""
    few = b"\x80\x04" + KEYS_OF_ONE_HASH[keys](300) + b"."
    held = unpickle(io.BytesIO(few), "x")
    assert len(held) == 300
    assert not any(isinstance(key, Opaque) for key in held)
    assert follow(io.BytesIO(few)).odd_keys == 300

    many = b"\x80\x04" + KEYS_OF_ONE_HASH[keys](pickle_limits.MOST_ODD_KEYS + 1) + b"."
    held = unpickle(io.BytesIO(many), "x")
    assert len(held) == pickle_limits.MOST_ODD_KEYS + 1
    assert all(isinstance(key, Key) for key in held)


def test_calls_give_few_keys_that_may_have_one_hash() -> None:
    numbers = [i * PRIME for i in range(4, pickle_limits.MOST_ODD_KEYS + 6)]
    pairs = call(name("collections", "OrderedDict"), value([[i, None] for i in numbers]))
    for made in (pairs, call(name("builtins", "set"), value(numbers))):
        held = unpickle(io.BytesIO(b"\x80\x04" + made + b"."), "x")
        assert len(held) == len(numbers)
        assert sum(isinstance(key, Key) for key in held) == 2


def test_a_pickled_tokenizer_is_read_like_every_object() -> None:
    """Slow tokenizers have a dictionary of pairs, with more keys than are compared."""
    ranks = {(f"a{i}", f"b{i}"): i for i in range(pickle_limits.MOST_ODD_KEYS + 1)}
    state = {"step": 7, "ranks": ranks, "pairs": Counter(ranks), "names": ["x"], ("a", 1): [ranks]}
    for protocol in (0, 2, 4):
        read = unpickle(io.BytesIO(pickle.dumps(state, protocol)), "x")
        assert (read["step"], read["names"]) == (7, ["x"])
        assert {key.args[0]: n for key, n in read["ranks"].items()} == ranks
        assert len(read["pairs"]) == len(ranks)
        (last,) = (value for key, value in read.items() if isinstance(key, Key))
        assert last[0] is read["ranks"]


def test_both_unpicklers_read_shipped_files_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(path: Path) -> str:
        value = (
            unpickle(io.BytesIO(path.read_bytes()), "x")
            if path.suffix == ""
            else TorchFile(path).load()
        )
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))

    names = (".metadata", "mp_rank_00_model_states.pt", "*_rank_0_mp_rank_00_optim_states.pt")
    paths = [path for each in names for path in sorted(FIXTURES.rglob(each))[:40:4]]
    usual = [shown(path) for path in paths]
    monkeypatch.setattr(restricted_pickle, "MOST_ODD_KEYS", -1)

    assert [shown(path) for path in paths] == usual
    assert len(paths) == 30


def test_texts_small_numbers_and_objects_are_any_number_of_keys() -> None:
    count = pickle_limits.MOST_ODD_KEYS + 1
    held = [{f"n{i}": None for i in range(count)}, {i << 20: None for i in range(count)}]

    assert unpickle(io.BytesIO(pickle.dumps(held)), "x") == held
    index = [MetadataIndex(f"n{i}", torch.Size([i, 0])) for i in range(count)]
    assert len(unpickle(io.BytesIO(pickle.dumps(dict.fromkeys(index))), "x")) == count
