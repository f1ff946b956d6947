"""Clean saves from the Transformers Trainer: every so many steps, and when training ends.

Owns the directories that it wrote, and which of them are kept. A ledger beside them lists every file with its
size and time, so that a resumed run recognises them. A directory in which a file was added or changed
later is neither replaced nor removed. :mod:`ckpt_tools.training.saving` makes each save.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ckpt_tools.errors import OutputFailed, UsageError
from ckpt_tools.storage.addresses import PathLike
from ckpt_tools.training.saving import save

LEDGER = ".clean-checkpoints.json"

# Size and time of each file of a directory, by its path.
Files = dict[str, list[int]]


class CleanCheckpointCallback(TrainerCallback):
    """Saves the model with :func:`ckpt_tools.training.save` while the Trainer trains it.

    Args:
        output_dir: where the directories are made, called ``step-500`` and so on.
        every: optimizer steps between two saves.
        keep_last: how many are kept; by default all.
        at_end: save when training ends too.
        options: of :func:`ckpt_tools.training.save`; the tokenizer is the Trainer's by default.

    Raises:
        UsageError: ``every`` or ``keep_last`` is less than 1.
    """

    def __init__(
        self,
        output_dir: PathLike,
        *,
        every: int,
        keep_last: int | None = None,
        at_end: bool = True,
        **options: Any,
    ) -> None:
        if every < 1 or (keep_last is not None and keep_last < 1):
            raise UsageError(f"{every=}, {keep_last=}: both must be 1 or more")
        self.directory = Path(output_dir)
        self.every, self.keep_last, self.at_end = every, keep_last, at_end
        self.options = options
        self._last: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Save if it is time to."""
        if state.global_step % self.every == 0:
            self._save(state, parts)

    def on_train_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Save, unless the last step was just saved."""
        if self.at_end and state.global_step != self._last:
            self._save(state, parts)

    def _save(self, state: Any, parts: dict[str, Any]) -> None:
        target = self.directory / f"step-{state.global_step}"
        ledger = self._ledger()
        options = {"tokenizer": parts.get("processing_class"), "step": state.global_step}
        # A resumed run reaches the same step again.
        own = target.name in ledger and _files(target) == ledger[target.name]
        save(parts["model"], target, **{**options, "overwrite": own, **self.options})
        self._last = state.global_step
        if state.is_world_process_zero:
            ledger.pop(target.name, None)
            ledger[target.name] = _files(target)
            self._note(ledger)
            self._keep_some(ledger)

    def _ledger(self) -> dict[str, Files]:
        """The files of each directory that was written, the oldest first."""
        try:
            noted = json.loads((self.directory / LEDGER).read_bytes())
        except (OSError, ValueError):
            return {}
        return noted if isinstance(noted, dict) else {}

    def _note(self, ledger: dict[str, Files]) -> None:
        path = self.directory / LEDGER
        fresh = path.with_name(f"{LEDGER}.new")
        try:
            fresh.write_text(json.dumps(ledger) + "\n", encoding="utf-8")
            os.replace(fresh, path)
        except OSError as error:
            raise OutputFailed(f"cannot be written ({error.strerror})", path=path) from error

    def _keep_some(self, ledger: dict[str, Files]) -> None:
        """Remove the oldest directories that are too many."""
        if self.keep_last is None:
            return
        for name in list(ledger)[: -self.keep_last]:
            directory = self.directory / name
            if _files(directory) == ledger.pop(name):
                # Under another name first: half a directory is not taken for a model.
                going = directory.with_name(f".{name}.removed")
                os.rename(directory, going)
                shutil.rmtree(going, ignore_errors=True)
        self._note(ledger)


def _files(directory: Path) -> Files:
    found: Files = {}
    for path in sorted(directory.rglob("*")):
        if not path.is_dir():
            facts = path.lstat()
            found[path.relative_to(directory).as_posix()] = [facts.st_size, facts.st_mtime_ns]
    return found
