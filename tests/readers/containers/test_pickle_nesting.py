"""What a pickle nests cannot kill the process: neither when it is built, nor hashed, nor freed."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import random
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tools import open_checkpoint
from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.readers.containers import pickle_nesting
from ckpt_tools.readers.containers.pickle_nesting import refuse_deep_nesting
from ckpt_tools.readers.containers.restricted_pickle import unpickle
from tests.conftest import FIXTURES
from tests.support import damage
from tests.support.hostile import call, name, splice, value

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
    "by a memo that is numbered and counts": as_key(
        b"Nq\x070N\x94"
        + b"".join(b"j" + i + b"\x85\x940" for i in FOUR_BYTES[1:-1])
        + b"j"
        + FOUR_BYTES[-1]
    ),
    "by copies of the top": b"(N" + b"2\x85" * DEEP + b"\x91",
    "among marks that are popped": as_key(b"N" + b"\x85(0" * DEEP),
    "behind names that look like opcodes": value("(((t)R}s.")
    + b"0"
    + as_key(b"N" + b"\x85" * DEEP),
    "behind bytes that are no end": b"C\x02..0" + as_key(b"N" + b"\x85" * DEEP),
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
    "frozen sets": b"(" * DEEP + b"K\x01" + b"\x91" * DEEP,
    "inert objects": name("x", "Y") * DEEP + b"N" + b"\x85R" * DEEP,
    "their states": (name("x", "Y") + b")\x81") * DEEP + b"N" + b"b" * DEEP,
    "their results": name("x", "Y") + b")R" * DEEP,
}
READ = """
import io, sys
from ckpt_tools.errors import DamagedCheckpoint
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


def test_the_attack_is_real() -> None:
    program = "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"

    assert in_a_child(program, NESTS["tuples of one"]).returncode == -signal.SIGSEGV


@pytest.mark.parametrize("nest", NESTS)
def test_a_nest_of_tuples_is_refused(nest: str) -> None:
    done = in_a_child(READ, NESTS[nest])

    assert done.returncode == 0, done.stderr
    assert b"it nests tuples too deep" in done.stdout


@pytest.mark.parametrize("way", SMUGGLED)
def test_no_function_makes_tuples_that_nobody_counts(way: str) -> None:
    with pytest.raises(DamagedCheckpoint, match=r"that is not a number|that is not a tensor"):
        unpickle(io.BytesIO(b"\x80\x04" + SMUGGLED[way] + b"."), "some/file.pt")


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

    assert "it nests tuples too deep" in opened_in_a_child(path)


def test_a_legacy_file_with_pickles_larger_than_a_look_is_read(tmp_path: Path) -> None:
    state = {f"layers.{i}.weight": torch.full((2,), float(i)) for i in range(3000)}
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert path.stat().st_size > 4 * pickle_nesting._WINDOW

    checkpoint = open_checkpoint(path)

    assert [*checkpoint] == [*state]
    assert torch.equal(checkpoint["layers.2999.weight"].load(), state["layers.2999.weight"])


def test_a_class_within_classes_without_end_is_refused_at_once() -> None:
    """Each is named after all around it, which would take the square of the length."""
    names = name("builtins", "getattr") * DEEP + name("x", "Y") + (value("a") + b"\x86R") * DEEP

    with pytest.raises(DamagedCheckpoint, match="the name of a class is too long"):
        unpickle(io.BytesIO(b"\x80\x04" + names + b"."), "some/file.pt")


# The looking itself, on what is no attack.


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pickle is looked at, however small."""
    monkeypatch.setattr(pickle_nesting, "_stack", lambda: -1)


def shipped_pickles() -> list[bytes]:
    found = [path.read_bytes() for path in FIXTURES.rglob("*.metadata")]
    for path in [*FIXTURES.rglob("*.pt"), *FIXTURES.rglob("*.bin"), *FIXTURES.rglob("*.pkl")]:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                found += [archive.read(n) for n in archive.namelist() if n.endswith("data.pkl")]
    return found


@pytest.mark.usefixtures("always")
def test_every_shipped_pickle_passes() -> None:
    pickles = shipped_pickles()

    for data in pickles:
        refuse_deep_nesting(io.BytesIO(data))
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


def deepest(plain: Any) -> int:
    """Levels of tuples, counting what is none as one."""

    def depth(one: Any) -> int:
        return 1 + max(map(depth, one)) if isinstance(one, tuple) and one else 1

    inner = plain.values() if isinstance(plain, dict) else plain
    nested = [deepest(one) for one in inner] if isinstance(plain, list | tuple | dict) else []
    return max([depth(plain), *nested])


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_it_counts_as_deep_as_it_is(protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what Python itself pickles, by every protocol: refused from the right depth on."""
    generator = random.Random(protocol)
    seen = set()
    for _ in range(1000):
        plain = random_value(generator, 6)
        data, depth = pickle.dumps(plain, protocol), deepest(plain)
        if any(opcode.name == "GLOBAL" for opcode, _, _ in pickletools.genops(data)):
            continue  # sets and bytes go through a function then, whose arguments are a tuple
        monkeypatch.setattr(pickle_nesting, "_DEEPEST", depth)
        refuse_deep_nesting(io.BytesIO(data))
        assert unpickle(io.BytesIO(data), "some/file") == plain
        if depth > 1:
            monkeypatch.setattr(pickle_nesting, "_DEEPEST", depth - 1)
            with pytest.raises(pickle.UnpicklingError, match="too deep"):
                refuse_deep_nesting(io.BytesIO(data))
        seen.add(depth)
    assert seen >= {1, 2, 3, 4}


CALL = b"cx\nY\n\x94"
SIZES = [b"K\x01\x85", b"K\x01M\x00\x01\x86", b"J\x00\x00\x01\x00K\x02K\x03\x87"]


@pytest.mark.parametrize("numbers", SIZES)
@pytest.mark.parametrize(("index", "depth"), [(1, 2), (2, 3), (3, 1)])
def test_sizes_count_in_the_memo(
    numbers: bytes, index: int, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such runs are followed as one step; each tuple in them can be taken from the memo and nested."""
    size = b"h\x00" + numbers + b"\x94\x85\x94R\x94"
    taken = CALL + size + b"0h" + bytes([index]) + b"\x85" * 5 + b"."
    for start in (b"\x80\x04", b"\x80\x04N\x94" + b"N\x94" * 7):
        data = start + (taken if start == b"\x80\x04" else moved(taken, 8))
        monkeypatch.setattr(pickle_nesting, "_DEEPEST", depth + 5)
        pickle_nesting._follow(data)
        monkeypatch.setattr(pickle_nesting, "_DEEPEST", depth + 4)
        with pytest.raises(pickle.UnpicklingError, match="too deep"):
            pickle_nesting._follow(data)


def moved(data: bytes, by: int) -> bytes:
    """A pickle that begins with ``by`` entries in the memo."""
    return b"".join(
        b"h" + bytes([arg + by]) if opcode.name == "BINGET" else data[at:end]
        for (opcode, arg, at), end in positions(data)
    )


def positions(data: bytes) -> list[tuple[tuple[Any, Any, int], int]]:
    found = [each for each in pickletools.genops(data) if each[2] is not None]
    ends = [at for _, _, at in found[1:] if at is not None] + [len(data)]
    return list(zip(found, ends, strict=True))  # type: ignore[arg-type]


def test_objects_and_their_states_count_in_the_memo(monkeypatch: pytest.MonkeyPatch) -> None:
    made = CALL + b"h\x00)\x81\x94}\x94(K\x01" + b"N" + b"\x85" * 7 + b"u"
    for end in (b"b\x85.", b"bh\x01\x85\x86.", b"bh\x02\x85\x86.", b"bh\x00\x85\x86."):
        monkeypatch.setattr(pickle_nesting, "_DEEPEST", 8)
        pickle_nesting._follow(b"\x80\x04" + made + end)
        monkeypatch.setattr(pickle_nesting, "_DEEPEST", 7)
        with pytest.raises(pickle.UnpicklingError, match="too deep"):
            pickle_nesting._follow(b"\x80\x04" + made + end)


@pytest.mark.parametrize("numbers", SIZES)
def test_a_run_without_what_it_takes_is_refused(numbers: bytes) -> None:
    run = b"\x80\x04h\x09" + numbers + b"\x94\x85\x94R\x94."
    for data in (run, b"\x80\x04h\x09)\x81\x94}\x94(u."):
        with pytest.raises(pickle.UnpicklingError, match="does not exist"):
            pickle_nesting._follow(data)


@pytest.mark.usefixtures("always")
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


@pytest.mark.usefixtures("always")
def test_it_leaves_a_stream_where_it_was_and_ends_where_the_pickle_ends() -> None:
    first, second = pickle.dumps(["x" * 500] * 3), pickle.dumps((1, (2, (3,))))
    stream = io.BufferedReader(io.BytesIO(b"before" + first + second + b"\xff" * 100))  # type: ignore[arg-type]
    stream.seek(6)

    refuse_deep_nesting(stream)

    assert stream.tell() == 6
    assert pickle.load(stream) == ["x" * 500] * 3
    refuse_deep_nesting(stream)
    assert pickle.load(stream) == (1, (2, (3,)))
    with pytest.raises(pickle.UnpicklingError, match="invalid load key"):
        refuse_deep_nesting(stream)


@pytest.mark.usefixtures("always")
def test_a_pickle_cut_anywhere_ends_too_early() -> None:
    data = pickle.dumps({"name": ("x", 1 << 70, [2.5, b"bytes"]), "other": {3}}, 4)
    for length in range(2, len(data)):
        for stream in (io.BytesIO(data[:length]), io.BufferedReader(io.BytesIO(data[:length]))):  # type: ignore[arg-type]
            with pytest.raises(EOFError):
                refuse_deep_nesting(stream)


def test_many_tuples_are_no_nest() -> None:
    plain = {f"layers.{i}": ((i, i + 1), (i,)) for i in range(120_000)}
    data = pickle.dumps(plain, 2)
    assert pickle_nesting._tuples(data) * pickle_nesting._STACK_BYTES > pickle_nesting._stack()

    assert unpickle(io.BytesIO(data), "some/file") == plain
