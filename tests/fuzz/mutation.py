"""Structured mutation: files that are whole, and say something else in a few places."""

from __future__ import annotations

import io
import json
import pickletools
import random
import zipfile
from typing import Any

# Opcodes of values that a reader may not expect, each of which leaves one object.
_VALUES = [
    b"N",
    b"\x88",
    b"K\x00",
    b"K\x01",
    b"K\xff",
    b"J\xff\xff\xff\xff",
    b"J\xff\xff\xff\x7f",
    b"\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\x00",
    b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"G\x7f\xf8\x00\x00\x00\x00\x00\x00",
    b"G?\xf8\x00\x00\x00\x00\x00\x00",
    b"X\x00\x00\x00\x00",
    b"X\x03\x00\x00\x00\xed\xa0\x80",
    b"X\x03\x00\x00\x00a\x00b",
    b"X\x06\x00\x00\x00../../",
    b"X\x05\x00\x00\x00\x1b]0;x",
    b"]",
    b"}",
    b")",
    b"](K\x01K\x02e",
    b"}K\x00K\x01s",
    b"K\x01K\x02\x86",
    b"N\x85",
    b"cx\nY\n",
    b"cx\nY\n)R",
    b"ctorch\nfloat32\n",
    b"cos\nsystem\nX\x02\x00\x00\x00id\x85R",
    b"ccollections\nOrderedDict\n)R",
]
_JSON: list[Any] = [
    None,
    True,
    0,
    -1,
    1 << 31,
    1 << 64,
    10**400,
    1.5,
    float("nan"),
    "",
    "x",
    "\ud800",
    "a\0b",
    "../../x",
    "\x1b]0;x\x07",
    [],
    {},
    [1, 2],
    [[[]]],
    {"a": {}},
]
_NUMBERS = [b"\0", b"\xff", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0" * 8]
_NUMBERS += [b"\xff" * 8, b"\xff" * 7 + b"\x7f", (1 << 40).to_bytes(8, "little")]


def mutated(data: bytes, generator: random.Random) -> bytes:
    """A file with a few changes, by what it is."""
    if generator.random() < 0.25:
        return _bytes(data, generator)
    try:
        if data[:4] == b"PK\x03\x04":
            return _zip(data, generator)
        if data[:1] == b"\x80":
            return _pickle(data, generator)
        if data.lstrip()[:1] in (b"{", b"["):
            return json.dumps(_json(json.loads(data), generator)).encode()
        length = int.from_bytes(data[:8], "little")
        if data[8:9] == b"{" and length < len(data):
            header = json.dumps(_json(json.loads(data[8 : 8 + length]), generator)).encode()
            return len(header).to_bytes(8, "little") + header + data[8 + length :]
    except Exception:
        pass  # it is not what it looks like
    return _bytes(data, generator)


def _bytes(data: bytes, generator: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        at = generator.randrange(len(changed) + 1)
        match generator.randrange(5):
            case 0:
                del changed[at:]
            case 1:
                del changed[at : at + generator.randint(1, 64)]
            case 2:
                number = generator.choice(_NUMBERS)
                changed[at : at + len(number)] = number
            case 3 if changed:
                changed[at % len(changed)] ^= 1 << generator.randrange(8)
            case _:
                changed[at:at] = changed[at : at + generator.randint(1, 64)]
    return bytes(changed)


def _pickle(data: bytes, generator: random.Random) -> bytes:
    stream = io.BytesIO(data)
    spans = []
    while True:  # a legacy file holds several
        try:
            starts = [(op, position) for op, _, position in pickletools.genops(stream)]
        except ValueError:
            break
        ends = [*(position for _, position in starts[1:]), stream.tell()]
        spans += [
            (op, start, end)
            for (op, start), end in zip(starts, ends, strict=True)
            if op.name != "PROTO"
        ]
        if stream.tell() >= len(data):
            break
    if not spans:
        return _bytes(data, generator)
    for op, start, end in sorted(
        generator.sample(spans, min(len(spans), generator.randint(1, 3))),
        key=lambda span: -span[1],
    ):
        makes_one = not op.stack_before and len(op.stack_after) == 1
        if makes_one or generator.random() < 0.2:
            piece = generator.choice(_VALUES)
        else:
            piece = generator.choice([b"", data[start:end] * 2, b"0", b"2", b"\x85", b"a", b"s"])
        data = data[:start] + piece + data[end:]
    # Frames have lengths, which no longer fit.
    return data if data[2:3] != b"\x95" else data[:2] + data[11:]


def _zip(data: bytes, generator: random.Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(records)).partition("/")[0]
    inner = {
        name.removeprefix(f"{root}/data/"): held
        for name, held in records.items()
        if name.startswith(f"{root}/data/")
    }
    if inner and generator.random() < 0.2:
        name = generator.choice([*inner])
        if generator.random() < 0.5:
            inner[name] = _bytes(inner[name], generator)
        else:
            del inner[name]
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", _pickle(records[f"{root}/data.pkl"], generator))
        archive.writestr("archive/byteorder", "little")
        for name, held in inner.items():
            archive.writestr(f"archive/data/{name}", held)
    return stream.getvalue()


def _json(value: Any, generator: random.Random) -> Any:
    for _ in range(generator.randint(1, 3)):
        value = _changed(value, generator)
    return value


def _changed(value: Any, generator: random.Random) -> Any:
    if isinstance(value, dict) and value and generator.random() < 0.9:
        key = generator.choice([*value])
        if generator.random() < 0.1:
            return {("x" if k == key else k): v for k, v in value.items()}
        return {**value, key: _changed(value[key], generator)}
    if isinstance(value, list) and value and generator.random() < 0.7:
        at = generator.randrange(len(value))
        return [*value[:at], _changed(value[at], generator), *value[at + 1 :]]
    return generator.choice(_JSON)
