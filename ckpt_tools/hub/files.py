"""Owns the description of an output file (bytes to write, or a file to copy), and reading and writing JSON.

Nothing is written to disk here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.storage.regular import content_of

_RESTORE = "Copy the file anew from the source of the model, or pass another directory."


@dataclass(frozen=True)
class AssetFile:
    """One file of the output directory that does not hold tensors.

    Attributes:
        name: path inside the output directory, with forward slashes.
        content: the bytes to write, or None if ``source`` is set.
        source: the file to copy byte for byte, or None if ``content`` is set.

    Raises:
        ValueError: both or neither of ``content`` and ``source`` are set.
    """

    name: str
    content: bytes | None = None
    source: Path | None = None

    def __post_init__(self) -> None:
        if (self.content is None) == (self.source is None):
            raise ValueError(f"{self.name}: exactly one of content and source must be set")

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes.

        Raises:
            OSError: ``source`` is gone.
        """
        return self.source.stat().st_size if self.source is not None else len(self.content or b"")

    def read(self) -> bytes:
        """The bytes that the output file will hold.

        Raises:
            OSError: ``source`` is gone.
        """
        return self.source.read_bytes() if self.source is not None else self.content or b""


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        DamagedCheckpoint: the file cannot be read, or is not JSON.
    """
    try:
        return json.loads(content_of(path))
    except OSError as error:
        raise DamagedCheckpoint(
            f"cannot be read ({error.strerror})",
            path=path,
            hint="Check the permissions of the file.",
        ) from error
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(
            f"is not valid JSON ({error})",
            path=path,
            hint=_RESTORE,
        ) from error


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        DamagedCheckpoint: the file cannot be read, is not JSON, or holds no object.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise DamagedCheckpoint(
            f"holds a JSON {type(data).__name__}, not an object",
            path=path,
            hint=_RESTORE,
        )
    return data


def json_bytes(data: Mapping[str, Any]) -> bytes:
    """JSON as transformers writes its configs: sorted keys, two spaces, one newline at the end."""
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()
