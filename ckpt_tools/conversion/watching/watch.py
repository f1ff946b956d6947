"""Owns the order of things while a run is watched: look, judge, convert, run the command, remove.

A pass looks at the run once and does all that can be done. Everything that was done is in OUT, so a watch
that was stopped in any moment goes on where it was: a conversion by its journal, a command by the record that
is missing. Damage concerns one save; any other error ends the watch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ckpt_tools.conversion.report import Report
from ckpt_tools.conversion.watching.command import environment, run_command
from ckpt_tools.conversion.watching.events import Event, Happening, Tell
from ckpt_tools.conversion.watching.finished import State, Stillness, judge
from ckpt_tools.conversion.watching.pruning import protected, refusal
from ckpt_tools.conversion.watching.records import Record, Records, remove_whole
from ckpt_tools.conversion.watching.saves import Look, Save, look_at
from ckpt_tools.errors import CkptError, DamagedCheckpoint, NotACheckpoint, UsageError
from ckpt_tools.writing.publish import leftovers


class Convert(Protocol):
    """Converts one save."""

    def __call__(self, save: Path, output: Path, *, overwrite: bool, resume: bool) -> Report:
        """Write ``output``; raises CkptError."""


@dataclass(frozen=True)
class Asked:
    """What is asked of a watch.

    Attributes:
        run: the directory of the run.
        out: the directory of the outputs.
        keep: of how many saves outputs are kept; None for all.
        every: saves are converted whose number is a multiple of it; None for all.
        command: what is run after each conversion.
        prune: whether proven saves are removed.
        overwrite: whether the output of a save that was written again is replaced.
    """

    run: Path
    out: Path
    keep: int | None = None
    every: int | None = None
    command: str | None = None
    prune: bool = False
    overwrite: bool = False


class Watch:
    """A run that is watched.

    Args:
        asked: what is asked.
        convert: converts one save.
        tell: told of each thing that happens.
        settle: seconds for which files must stand still, where nothing else says that a save is finished.
        now: a clock that never jumps.
    """

    def __init__(
        self,
        asked: Asked,
        convert: Convert,
        tell: Tell,
        settle: float,
        now: Callable[[], float],
    ) -> None:
        self.asked, self.reports = asked, list[Report]()
        self.errors: list[CkptError] = []
        self.records = Records(asked.out)
        self._convert, self._tell, self._now = convert, tell, now
        self._stillness = Stillness(settle)
        self._told: dict[str, str] = {}
        self._failed: dict[str, str] = {}
        self._unprovable: dict[str, str] = {}

    def once(self) -> bool:
        """One pass.

        Returns:
            Whether a save may be finished once its files have stood still for long enough.

        Raises:
            CkptError: nothing can be converted, as the error says.
        """
        look = look_at(self.asked.run, self.asked.out)
        now = self._now()
        self._stillness.see(look.saves, now)
        finished, waiting = [], False
        for save in filter(self._is_wanted, look.saves):
            judgement = judge(save, look)
            if judgement.state is State.UNFINISHED:
                self._say("waiting", save, f"it is not finished: {judgement.why}")
                continue
            is_proven = judgement.state is State.FINISHED
            if not is_proven and not self._stillness.stands(save, now) and not self._is_done(save):
                self._say("waiting", save, f"{judgement.why}: its files must stand still first")
                # Later saves wait as well, because outputs appear in order.
                waiting = True
                break
            finished.append(save)
            self._take(save, is_proven)
        self._prune(finished)
        self._remove_surplus(look)
        return waiting

    def _say(
        self,
        happening: Happening,
        save: Save,
        fact: str,
        hint: str | None = None,
        *,
        once: bool = True,
    ) -> None:
        """Report something, unless the last report about it says the same."""
        text = f"{happening} {fact}"
        if once and self._told.get(save.name) == text:
            return
        self._told[save.name] = text
        self._tell(Event(happening, save.name, fact, hint))

    def _is_wanted(self, save: Save) -> bool:
        every = self.asked.every
        return every is None or save.number is None or save.number % every == 0

    def _is_done(self, save: Save) -> bool:
        """Whether a save was converted as it is now; without a record it was, and the command was not run."""
        record = self.records.of(save)
        if record is None:
            return self.records.is_written(save)
        return record.saved == save.signature

    def _take(self, save: Save, is_proven: bool) -> None:
        """Convert a finished save, unless that was done."""
        record = self.records.of(save)
        if self._is_done(save):
            if record is None:
                self._end(save, None)
            return
        if record is not None and not self.asked.overwrite:
            self._say(
                "passed over",
                save,
                "it was saved again after it was converted",
                "Pass --overwrite to convert it again, in the place of its output.",
            )
            return
        if self._failed.get(save.name) == save.signature:
            return
        try:
            report = self._convert_or_go_on(save)
        except (DamagedCheckpoint, NotACheckpoint) as error:
            self._judge_damage(save, error, is_proven)
            return
        self.reports.append(report)
        self._tell(Event("converted", save.name, f"written to {report.output}", report=report))
        self._end(save, report)

    def _judge_damage(self, save: Save, error: CkptError, is_proven: bool) -> None:
        """Tell why a save could not be read: it is gone, it was not finished, or it is damaged."""
        now = {s.name: s for s in look_at(self.asked.run, self.asked.out).saves}.get(save.name)
        where = "" if error.path is None else f"{error.path}: "
        if now is None:
            self.records.forget_parts(save)
            self._say("passed over", save, "it was deleted while it was converted")
            return
        if not now.files.keys() >= save.files.keys():
            self._say("waiting", save, "files of it were deleted while it was converted")
            return
        if now.signature != save.signature:
            self._say("waiting", save, "its files changed while it was converted")
            return
        self._failed[save.name] = save.signature
        is_cut = isinstance(error, DamagedCheckpoint) and error.missing
        if not is_proven or is_cut:
            fact = f"it is not whole: {where}{error.fact}"
            self._say("passed over", save, fact, "It is read again when its files change.")
            return
        self.errors.append(error)
        self._say("failed", save, f"{where}{error.fact}", error.hint)

    def _convert_or_go_on(self, save: Save) -> Report:
        """Convert, and go on with what an earlier conversion of the same save has left."""
        target, overwrite = self.records.target(save), self.asked.overwrite
        try:
            return self._convert(save.path, target, overwrite=overwrite, resume=True)
        except UsageError as error:
            if error.path not in leftovers(target):
                raise
            # It was of other options, or of the save before it was written again.
            self.records.forget_parts(save)
            return self._convert(save.path, target, overwrite=overwrite, resume=False)

    def _end(self, save: Save, report: Report | None) -> None:
        """Run the command, and note that the save is done."""
        asked, output = self.asked, self.records.target(save)
        step = report.step if report is not None else save.number
        status = None
        if asked.command is not None:
            status = run_command(asked.command, environment(save.path, output, step))
            if status:
                fact = f"the command of --exec ended with status {status}"
                self.errors.append(CkptError(fact, path=output, hint="See what it printed."))
                self._say("command failed", save, fact)
        self.records.write(Record(save.name, output.name, step, save.signature, status))

    def _prune(self, finished: Sequence[Save]) -> None:
        """Remove the saves that are proven and that training does not need."""
        if not self.asked.prune:
            return
        for save in finished:
            record = self.records.of(save)
            if record is None or record.saved != save.signature or self._is_needed(save, finished):
                continue
            if self._unprovable.get(save.name) == save.signature:
                continue
            why = refusal(save, self.records.target(save))
            # The comparison takes its time: what training needs may have changed.
            if self._is_needed(save, finished):
                continue
            if why is None:
                remove_whole(save.path)
                self._say("pruned", save, "it was removed; its output is equal to it bit for bit")
            else:
                self._unprovable[save.name] = save.signature
                self._say("kept", save, why)

    def _is_needed(self, save: Save, finished: Sequence[Save]) -> bool:
        look = look_at(self.asked.run, self.asked.out)
        return save not in look.saves or save.name in protected(look, finished)

    def _remove_surplus(self, look: Look) -> None:
        """Remove outputs beyond those that are kept."""
        if self.asked.keep is None:
            return
        for save in self.records.surplus(self._converted_saves(look), self.asked.keep):
            remove_whole(self.records.target(save))
            self._say("removed", save, f"--keep {self.asked.keep}: newer outputs are there")

    def _converted_saves(self, look: Look) -> list[Save]:
        """The saves of all outputs in their order, also of saves that are gone."""
        gone = [
            Save(self.asked.run / name)
            for name in self.records.names()
            if name not in {save.name for save in look.saves}
        ]
        return sorted([*look.saves, *gone], key=lambda save: save.order)
