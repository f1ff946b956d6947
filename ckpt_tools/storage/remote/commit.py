"""Owns the upload of a finished directory to a repository of the Hub, as one commit.

huggingface_hub sends the weights before the commit, and those that it sent before are not sent again. So a
reader sees all files or none, and an upload that was interrupted continues.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ckpt_tools.errors import OutputExists, UsageError
from ckpt_tools.storage.addresses import Address
from ckpt_tools.storage.remote.failures import Patience

# What the Hub itself puts into a new repository.
_OF_THE_HUB = {".gitattributes", "README.md"}


class HubOutput:
    """A repository that a directory is uploaded to.

    Args:
        address: the repository; its revision is a branch.
        private: whether a repository that does not exist is made private.
        patience: repeats requests.
    """

    def __init__(self, address: Address, private: bool, patience: Patience) -> None:
        if address.path:
            raise UsageError(
                "a model is written into a repository itself, not into a folder of it",
                path=str(address),
                hint=f"Name {address.root}.",
            )
        self.address = address
        self._repository, _, revision = address.host.partition("@")
        self._branch = revision.replace("%2F", "/")
        self._private = private
        self._patience = patience

    @property
    def _api(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi()

    def held(self) -> list[str]:
        """The files of the branch; none where it does not exist."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        def listed() -> list[str]:
            try:
                return list(self._api.list_repo_files(self._repository, revision=self._branch))
            except (RepositoryNotFoundError, RevisionNotFoundError):
                return []

        return self._patience.call(listed, lambda: str(self.address))

    def refuse_existing(self) -> None:
        """Refuse a branch that holds files.

        Raises:
            OutputExists: there are files of somebody.
        """
        if set(self.held()) - _OF_THE_HUB:
            raise OutputExists(
                "the branch holds files already",
                path=str(self.address),
                hint="Name another repository or branch, or pass --overwrite. The Hub keeps the old commit.",
            )

    def upload(self, directory: Path, message: str, overwrite: bool) -> str:
        """Upload every file of a directory as one commit; returns its address.

        Raises:
            StoreFailed: the Hub refuses, or cannot be reached.
        """
        api = self._api

        def attempt() -> str:
            api.create_repo(self._repository, private=self._private, exist_ok=True)
            if self._branch != "main":
                api.create_branch(self._repository, branch=self._branch, exist_ok=True)
            made = api.upload_folder(
                repo_id=self._repository,
                folder_path=directory,
                revision=self._branch,
                commit_message=message,
                delete_patterns="*" if overwrite else None,
            )
            return str(made.commit_url)

        with _bars_off():
            return self._patience.call(attempt, lambda: str(self.address))


@contextmanager
def _bars_off() -> Iterator[None]:
    """Switch off the progress bars of huggingface_hub, which ignore --quiet and --json.

    They are on again afterwards. ``HF_HUB_DISABLE_PROGRESS_BARS=0`` keeps the bars.
    """
    from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
