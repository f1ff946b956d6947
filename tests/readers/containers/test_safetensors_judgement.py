"""Headers are judged as the format's own library judges them."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import SafetensorError, safe_open

from ckpt_tools.errors import CkptError
from ckpt_tools.readers.containers.safetensors_file import read_safetensors

Judged = dict[str, tuple[str, list[int]]] | None
ENTRY = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


def file(text: str | bytes, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    header = text.replace("%s", ENTRY).encode() if isinstance(text, str) else text
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


HEADERS: dict[str, bytes] = {
    "plain": file('{"a":%s}'),
    "no tensors": file("{}", b""),
    "empty file": b"",
    "7 bytes": b"\0" * 7,
    "length 0": file("", b""),
    "BOM": file('\ufeff{"a":%s}'),
    "leading space": file(' {"a":%s}'),
    "leading newline": file('\n{"a":%s}'),
    "trailing spaces": file('{"a":%s}   '),
    "trailing newline": file('{"a":%s}\n\t'),
    "trailing NUL": file('{"a":%s}\0\0'),
    "trailing text": file('{"a":%s}x'),
    "duplicate same": file('{"a":%s,"a":%s}'),
    "duplicate differ": file('{"a":{"dtype":"I32","shape":[2],"data_offsets":[0,8]},"a":%s}'),
    "duplicate metadata": file('{"__metadata__":{},"__metadata__":{"a":"b"},"a":%s}'),
    "duplicate key in entry": file(
        '{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    ),
    "duplicate key in metadata": file('{"__metadata__":{"a":"b","a":"c"},"a":%s}'),
    "extra key in entry": file('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1}}'),
    "metadata null": file('{"__metadata__":null,"a":%s}'),
    "metadata number": file('{"__metadata__":{"a":1},"a":%s}'),
    "metadata list": file('{"__metadata__":[],"a":%s}'),
    "metadata str": file('{"__metadata__":"x","a":%s}'),
    "hole first": file('{"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}', b"\0" * 12),
    "hole middle": file(
        '{"a":%s,"b":{"dtype":"F32","shape":[1],"data_offsets":[12,16]}}', b"\0" * 16
    ),
    "overlap": file('{"a":%s,"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'),
    "same range": file('{"a":%s,"b":%s}'),
    "trailing bytes": file('{"a":%s}', b"\0" * 9),
    "truncated": file('{"a":%s}', b"\0" * 7),
    "reversed offsets": file('{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}'),
    "negative offset": file('{"a":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}}'),
    "float offset": file('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8.0]}}'),
    "float shape": file('{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}'),
    "bool shape": file('{"a":{"dtype":"F32","shape":[2,true],"data_offsets":[0,8]}}'),
    "bool offset": file('{"a":{"dtype":"U8","shape":[1],"data_offsets":[false,true]}}', b"\0"),
    "negative shape": file('{"a":{"dtype":"F32","shape":[-1,-2],"data_offsets":[0,8]}}'),
    "null shape": file('{"a":{"dtype":"F32","shape":null,"data_offsets":[0,8]}}'),
    "three offsets": file('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,8]}}'),
    "offsets as dict": file('{"a":{"dtype":"F32","shape":[2],"data_offsets":{"0":0,"1":8}}}'),
    "entry as list": file('{"a":["F32",[2],[0,8]]}'),
    "no dtype": file('{"a":{"shape":[2],"data_offsets":[0,8]}}'),
    "lower dtype": file('{"a":{"dtype":"f32","shape":[2],"data_offsets":[0,8]}}'),
    "wrong size": file('{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}'),
    "scalar": file('{"a":{"dtype":"F64","shape":[],"data_offsets":[0,8]}}'),
    "empty at 0": file('{"a":%s,"e":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
    "empty at end": file('{"a":%s,"e":{"dtype":"F32","shape":[0],"data_offsets":[8,8]}}'),
    "empty within": file('{"a":%s,"e":{"dtype":"F32","shape":[0],"data_offsets":[4,4]}}'),
    "2^70 then 0": file(
        '{"e":{"dtype":"F32","shape":[1180591620717411303424,0],"data_offsets":[0,0]}}', b""
    ),
    "0 then 2^70": file(
        '{"e":{"dtype":"F32","shape":[0,1180591620717411303424],"data_offsets":[0,0]}}', b""
    ),
    "2^40 2^40 0": file(
        '{"e":{"dtype":"F32","shape":[1099511627776,1099511627776,0],"data_offsets":[0,0]}}', b""
    ),
    "0 2^40 2^40": file(
        '{"e":{"dtype":"F32","shape":[0,1099511627776,1099511627776],"data_offsets":[0,0]}}', b""
    ),
    "2^62 0": file(
        '{"e":{"dtype":"F32","shape":[4611686018427387904,0],"data_offsets":[0,0]}}', b""
    ),
    "NaN": file('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'),
    "lone surrogate name": file('{"\\ud800":%s}'),
    "invalid utf8 name": file(b'{"\xff":' + ENTRY.encode() + b"}"),
    "control char in name": file('{"a\tb":%s}'),
    "empty name": file('{"":%s}'),
    "odd header length": file('{"aa":%s}'),
    "utf16": file('{"a":%s}'.replace("%s", ENTRY).encode("utf-16")),
    "list": file("[]", b""),
    "deep": file('{"a":' + "[" * 200 + "]" * 200 + "}"),
    "exp int": file('{"a":{"dtype":"F32","shape":[2e0],"data_offsets":[0,8]}}'),
    "-0": file('{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}'),
    "single quotes": file("{'a':1}"),
    "length beyond file": file('{"a":%s}', length=10**6),
    "length 2^63": file('{"a":%s}', length=2**63),
}


def judged_by_the_library(path: Path) -> Judged:
    try:
        with safe_open(path, "pt") as opened:
            found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: (part.get_dtype(), part.get_shape()) for name, part in found.items()}
    except (SafetensorError, OSError):
        return None


def judged_here(path: Path) -> Judged:
    try:
        tensors = read_safetensors(path).tensors
    except CkptError:
        return None
    return {name: (t.dtype.safetensors, list(t.shape)) for name, t in tensors.items()}


@pytest.mark.parametrize("title", HEADERS)
def test_an_odd_header_is_judged_as_the_library_judges_it(title: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(HEADERS[title])

    assert judged_here(path) == judged_by_the_library(path)


def test_the_table_has_headers_of_both_kinds(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    verdicts = []
    for content in HEADERS.values():
        path.write_bytes(content)
        verdicts.append(judged_by_the_library(path) is None)
    assert 15 < sum(verdicts) < len(verdicts) - 10
