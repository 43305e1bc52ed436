"""Several processes that share a run, wherever they are: one progress, one report, one exit code."""

from __future__ import annotations

import queue
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from datetime import UTC, datetime
from functools import cache
from typing import Any, Generic, TypeVar

from pipeline.console import Console, RowProgress
from pipeline.errors import Interrupted, RunFailed
from pipeline.job import Job
from pipeline.output.claims import Claims
from pipeline.process import ExitCode, Loading, Stopping
from pipeline.retry import look_for_errors
from pipeline.run import finish, may_begin
from pipeline.settings import RunConfig
from pipeline.versions import open_job

LOOK_EVERY_S = 0.1

Said = TypeVar("Said")


class Crew(ABC, Generic[Said]):
    """The workers of one run, from their start to the end of the last one.

    `Said` is what `_said` holds: what is heard of them, which threads put there.
    """

    def __init__(self, console: Console) -> None:
        """Nothing is started yet."""
        self._console = console
        self._said: queue.Queue[Said] = queue.Queue()
        self._noted: set[str] = set()
        self._stopped = False

    def work(self, job: Job, stopping: Stopping) -> list[int]:
        """Start the workers and hear them to their end; returns their exit codes. A signal is passed on."""
        done_before = job.num_rows - sum(chunk.num_rows for chunk in job.pending())
        with ExitStack() as stack:
            stack.callback(self._end)
            self._begin()

            @cache
            def progress() -> RowProgress:  # from the first rows on, when the models are loaded
                return stack.enter_context(self._console.rows(job.num_rows, done_before))

            while not self._is_over():
                if stopping() and not self._stopped:
                    self._stopped = True
                    self._stop()
                self._hear(progress)
        return self._codes()

    def _hear(self, progress: Callable[[], RowProgress]) -> None:
        """Take in one thing that is said, if anything is."""
        try:
            said = self._said.get(timeout=LOOK_EVERY_S)
        except queue.Empty:
            return
        self._take_in(said, progress)

    def _show(self, told: Mapping[str, Any], progress: Callable[[], RowProgress]) -> None:
        """What a worker says of its work (`pipeline.launch.worker`), as a person sees it."""
        if "rows" in told:
            progress().advance(told["rows"], told["tokens"])
        elif "note" in told:
            self._note(told["note"])

    def _note(self, text: str) -> None:
        """What several workers say is said once."""
        if text not in self._noted and not self._stopped:
            self._noted.add(text)
            self._console.note(text)

    def _note_failure(self, code: int, who: str) -> None:
        """A line for a worker that has ended otherwise than it should."""
        if code not in (ExitCode.DONE, ExitCode.NOT_DONE) and not self._stopped:
            self._console.note(f"{who} {_how_ended(code)}; what it had begun is left to the others")

    @abstractmethod
    def _begin(self) -> None:
        """Start them."""

    @abstractmethod
    def _stop(self) -> None:
        """Ask all of them to save and end."""

    @abstractmethod
    def _take_in(self, said: Said, progress: Callable[[], RowProgress]) -> None:
        """Take in one thing that was said."""

    @abstractmethod
    def _is_over(self) -> bool:
        """Whether nobody is at work any more."""

    @abstractmethod
    def _codes(self) -> list[int]:
        """The exit codes of those that have ended."""

    @abstractmethod
    def _end(self) -> None:
        """Leave nobody behind, also when this process fails."""


def run_crew(
    config: RunConfig, crew: Callable[[], Crew[Any]], console: Console, stopping: Stopping, loading: Loading
) -> int:
    """Answer every row that has no answer yet by a crew, which is made if there is any, and say what came out.

    `loading` is over when the crew begins. Raises what `run` raises.
    """
    since = datetime.now(UTC)
    job = open_job(config)
    look_for_errors(job)
    with job.output.claims() as claims:
        if not may_begin(job, claims, console):
            return ExitCode.NOT_DONE
        if job.is_answered():
            return finish(job, claims, console)
        loading.over()
        codes = crew().work(job, stopping)
        after = open_job(config, looks_only=True)  # by now there is a run.json
        after.keep_to_registered()
        if ExitCode.DONE not in codes:  # else somebody has seen all of them done again; errors may have come again
            look_for_errors(after)
        same = after.version == job.version  # or the workers' device asked for another one
        with nullcontext(claims) if same else after.output.claims() as own:
            return _conclude(after, own, codes, console, stopping, since)


def _conclude(
    job: Job, claims: Claims, codes: Sequence[int], console: Console, stopping: Stopping, since: datetime
) -> ExitCode:
    """What came out, by the rows that are there, and else by the workers' exit codes."""
    if job.is_answered():
        return finish(job, claims, console, since)
    if ExitCode.BAD_CONFIG in codes:
        return ExitCode.BAD_CONFIG
    failed = sum(code not in (ExitCode.DONE, ExitCode.NOT_DONE) for code in codes)
    if failed:
        raise RunFailed(
            f"{failed} of {len(codes)} processes failed and not all rows are done; run the same command again"
        )
    if stopping():
        raise Interrupted("stopped by a signal")
    return finish(job, claims, console)


def _how_ended(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
