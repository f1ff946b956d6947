"""Owns addresses, such as ``s3://bucket/prefix``: their forms, and the path that stands for what they name.

An address has no credentials. Those come from the environment variables and files of each cloud, because
command lines are shown in lists of processes, and addresses in manifests and messages.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ckpt_tools.errors import UsageError

PathLike = str | os.PathLike[str]

SCHEMES = ("s3", "gs", "az", "hf", "https", "http")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_ONE_SLASH = re.compile(rf"({'|'.join(SCHEMES)}):/?([^/].*)")
_FORMS = "s3://BUCKET/PATH, gs://BUCKET/PATH, az://CONTAINER/PATH, hf://ORG/REPO@REVISION/PATH, https://HOST/PATH"


@dataclass(frozen=True, slots=True)
class Address:
    """A file or folder of a store.

    Attributes:
        scheme: one of :data:`SCHEMES`.
        host: bucket, container, host with port, or ``ORG/REPO@REVISION``.
        path: the file or folder in it, with forward slashes and none at its ends.
    """

    scheme: str
    host: str
    path: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}" + (f"/{self.path}" if self.path else "")

    @property
    def root(self) -> Address:
        """All of the bucket, host or repository."""
        return replace(self, path="")

    @property
    def name(self) -> Path:
        """A path that no file of this machine has, as the name of the address in a tree."""
        return Path(f"/{self.scheme}:/{self.host}")


def is_address(value: object) -> bool:
    """Whether a value is the text of an address, of any scheme."""
    return isinstance(value, str) and _SCHEME.match(value) is not None


def hint_of_address(path: Path) -> str | None:
    """What to write where a path that does not exist looks like an address; None where it does not."""
    found = _ONE_SLASH.fullmatch(str(path))
    if found is None:
        return None
    return f"If it is an address, write it as text, with two slashes: {found[1]}://{found[2]}."


def parsed(text: str) -> Address:
    """The address that a text names.

    Raises:
        UsageError: it has an unknown scheme or form, or credentials.
    """
    match = _SCHEME.match(text)
    scheme = match[1].lower() if match else ""
    if scheme not in SCHEMES:
        raise UsageError(
            f"{scheme}:// is not read",
            hint=f"Name a path or an address of one of these forms: {_FORMS}.",
        )
    rest = text[len(scheme) + 3 :]
    is_web = scheme in ("http", "https")
    host, _, path = rest.partition("/")
    if (is_web and ("?" in rest or "#" in rest)) or ("@" in host and scheme != "hf"):
        raise UsageError(
            f"an address of {scheme}:// must have no user name, password, query or signature",
            hint="Lists of processes show command lines. Set the credentials in the environment variables or "
            "files of the store. docs/remote.md lists them.",
        )
    if is_web:
        path = unquote(urlsplit(text).path)
    parts = [part for part in path.split("/") if part]
    if scheme == "hf":
        host, parts = _repository(host, parts, text)
    if not host or ".." in parts:
        raise UsageError(
            f"{text} names no place in a store",
            hint=f"Name an address of one of these forms: {_FORMS}.",
        )
    return Address(scheme, host, "/".join(parts))


def _repository(host: str, parts: list[str], text: str) -> tuple[str, list[str]]:
    """The repository with its revision, and the path in it."""
    if host in ("models", "datasets", "spaces"):
        host = parts.pop(0) if host == "models" and parts else ""
    if not host or not parts:
        raise UsageError(
            f"{text} names no repository of models",
            hint="Name it as hf://ORG/REPO or hf://ORG/REPO@REVISION/PATH.",
        )
    name, _, revision = parts[0].partition("@")
    # As huggingface_hub has it, a slash of the revision is written %2F.
    return f"{host}/{name}@{revision or 'main'}", parts[1:]
