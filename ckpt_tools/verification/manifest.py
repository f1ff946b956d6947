"""Owns the check of ``ckpt_tools_manifest.json`` and ``SHA256SUMS`` against the files, without reading data.

Both files must be byte for byte as they were written. This code is independent of the code that writes them.
docs/verify.md has the schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import xxhash

from ckpt_tools.errors import listed
from ckpt_tools.storage.regular import content_of
from ckpt_tools.verification.directory import CONFIG, MANIFEST, SHA256SUMS, Directory, Manifest
from ckpt_tools.verification.problem import Findings
from ckpt_tools.verification.run import Run

ORDER = 40
VERSION = 1
_KEYS = (
    *("version", "tool", "command", "sources", "options", "request", "versions"),
    *("unit_bytes", "tensors", "files", "xxh3_128"),
)
# Written before there was a digest of the request.
_EARLIER_KEYS = tuple(key for key in _KEYS if key != "request")
_DIGEST = re.compile(r"[0-9a-f]{32}")
_SUM = re.compile(r"([0-9a-f]{64})  (.+)")
_WRITE_ANEW = "Write the directory again, or compare it with the checkpoint with --against CKPT."


def check(run: Run) -> None:
    """Compare the directory with its manifests, without reading data."""
    scopes = [manifest.folder for manifest in run.manifests]
    for manifest in run.manifests:
        _check_files(run.directory, manifest, scopes, run.findings)
        _check_tensors(run.directory, manifest, run.findings)


def read_manifests(directory: Directory, findings: Findings) -> list[Manifest]:
    """Every manifest. Adapters in folders have their own."""
    found = [
        _read(directory, file, findings)
        for file in directory.files
        if file.rpartition("/")[2] == MANIFEST
    ]
    if MANIFEST not in directory.files:
        findings.skipped.append(f"comparison with the manifest (there is no {MANIFEST})")
    return [manifest for manifest in found if manifest is not None]


def _read(directory: Directory, file: str, findings: Findings) -> Manifest | None:
    try:
        content = content_of(directory.path / file)
    except OSError as error:
        findings.add("file-unreadable", f"cannot be read ({error.strerror})", file=file)
        return None
    try:
        data = json.loads(content)
        if not isinstance(data, dict):
            raise ValueError("it is not an object")
        if data.get("version") != VERSION and content == _text(data):
            raise ValueError(
                f"its version is {data.get('version')}; this ckpt-tools reads version {VERSION}"
            )
        folder = file.removesuffix(MANIFEST)
        manifest = _parsed(data, folder)
        if content != _text(data):
            raise _Touched("its text differs from what ckpt-tools writes")
        if data["xxh3_128"] != xxhash.xxh3_128_hexdigest(_text({**data, "xxh3_128": ""})):
            raise _Touched("its digest of itself is wrong")
    except _Touched as error:
        findings.add("manifest-invalid", f"it was changed: {error}", file=file, hint=_WRITE_ANEW)
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        findings.add("manifest-invalid", f"it is damaged: {said}", file=file, hint=_WRITE_ANEW)
        return None
    findings.checked.append(f"{file}: intact, {data['command']} of {data['tool']}")
    return manifest


class _Touched(Exception):
    """The manifest can be read, but was changed."""


def _text(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()


def _parsed(data: dict[str, Any], folder: str) -> Manifest:
    if tuple(data) not in (_KEYS, _EARLIER_KEYS):
        raise ValueError(f"its keys are {listed([*data])}")
    unit = data["unit_bytes"]
    if type(unit) is not int or not 1 <= unit < 1 << 63:
        raise ValueError("unit_bytes is not a number of bytes")
    sizes, digests, headers = {}, {}, set()
    for name, record in data["files"].items():
        file = folder + name
        sizes[file] = record["bytes"]
        if type(sizes[file]) is not int or not 0 <= sizes[file] < 1 << 63:
            raise ValueError(f"the size of {name} is not a number of bytes")
        if "header_xxh3_128" in record:
            headers.add(file)
        digests[file] = record["header_xxh3_128" if file in headers else "xxh3_128"]
    tensors = {n: (folder + r["file"], r["xxh3_128"]) for n, r in data["tensors"].items()}
    everything = [*digests.values(), *(digest for _, digest in tensors.values())]
    if not all(isinstance(d, str) and _DIGEST.fullmatch(d) for d in everything):
        raise ValueError("a digest is invalid")
    return Manifest(folder, unit, tensors, sizes, digests, frozenset(headers))


def is_of_weights_alone(manifests: Sequence[Manifest]) -> bool:
    """Whether the directory was written without a config."""
    return any(not m.folder and CONFIG not in m.sizes for m in manifests)


def _check_files(
    directory: Directory, manifest: Manifest, scopes: list[str], findings: Findings
) -> None:
    for file, nbytes in manifest.sizes.items():
        if file not in directory.files:
            findings.add(
                "manifest-file-missing",
                f"it had {nbytes:,} bytes",
                file=file,
                hint=_WRITE_ANEW,
            )
        elif directory.files[file] != nbytes:
            findings.add(
                "manifest-file-size",
                f"it has {directory.files[file]:,} bytes; the manifest has {nbytes:,}",
                file=file,
                hint=_WRITE_ANEW,
            )
    inner = [
        scope for scope in scopes if scope != manifest.folder and scope.startswith(manifest.folder)
    ]
    for file in directory.files:
        name = file.removeprefix(manifest.folder)
        if not file.startswith(manifest.folder) or file in manifest.sizes:
            continue
        if any(file.startswith(scope) for scope in inner) or name == MANIFEST:
            continue
        # Other programs write hidden files at any time.
        if name.rpartition("/")[2] == SHA256SUMS or any(p.startswith(".") for p in name.split("/")):
            continue
        findings.add("manifest-file-unlisted", "the manifest does not list it", file=file)


def _check_tensors(directory: Directory, manifest: Manifest, findings: Findings) -> None:
    for name, (file, _) in manifest.tensors.items():
        container = directory.containers.get(file)
        if container is not None and name not in container.entries:
            findings.add(
                "manifest-tensor",
                "the manifest lists it in this file, but the file does not have it",
                file=file,
                tensor=name,
            )
    for file in sorted(manifest.headers & directory.containers.keys()):
        for name in directory.containers[file].entries:
            if manifest.tensors.get(name, ("", ""))[0] != file:
                findings.add(
                    "manifest-tensor",
                    "the manifest does not list it in this file",
                    file=file,
                    tensor=name,
                )


def read_sums(directory: Directory, findings: Findings) -> list[tuple[str, str]]:
    """Each file in a ``SHA256SUMS``, with its SHA-256 in hexadecimal. A file can be in several."""
    sums: list[tuple[str, str]] = []
    for file in directory.files:
        if file.rpartition("/")[2] != SHA256SUMS:
            continue
        folder = file.removesuffix(SHA256SUMS)
        for line, digest in _lines(directory, file, findings):
            name = line.removeprefix("./")
            if folder + name not in directory.files:
                findings.add("sha256-file-missing", f"{file} names it", file=folder + name)
            else:
                sums.append((folder + name, digest))
    return sums


def _lines(directory: Directory, file: str, findings: Findings) -> Iterator[tuple[str, str]]:
    try:
        text = content_of(directory.path / file).decode()
    except OSError as error:
        findings.add("file-unreadable", f"cannot be read ({error.strerror})", file=file)
        return
    except UnicodeDecodeError as error:
        findings.add("sha256-invalid", f"it is not text ({error})", file=file)
        return
    *lines, rest = text.split("\n")
    if rest or not lines:
        findings.add("sha256-invalid", "its last line has no line end", file=file)
    seen: set[str] = set()
    for number, line in enumerate(lines, 1):
        match = _SUM.fullmatch(line)
        if match is None or match[2] in seen:
            why = "names a file twice" if match else "is not a digest, two spaces and a name"
            findings.add("sha256-invalid", f"line {number} {why}", file=file)
            continue
        seen.add(match[2])
        yield match[2], match[1]
