"""The loop of a process at work: chunks from the intake, through the engine, to the outlet."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.claimed import ClaimedChunk
from pipeline.console import RowProgress
from pipeline.data.source import Chunk
from pipeline.errors import Interrupted
from pipeline.job import Job
from pipeline.launch.walltime import Walltime
from pipeline.output.claims import Claims
from pipeline.output.durable import failing_run
from pipeline.output.sink import part_path
from pipeline.process import Stopping
from pipeline.stats import IntervalRecorder, RunStats, process_age_s

if TYPE_CHECKING:
    from pipeline.engine.dedup import RequestEngine
    from pipeline.intake import Intake, Preparation
    from pipeline.outlet import Counts, Outlet
    from pipeline.output.journal import Journal
    from pipeline.output.sink import Sink
    from pipeline.prompts import PromptBuilder
    from pipeline.tasks.task import Task

LOOKAHEAD = 2
"""Requests that wait for a slot, in multiples of all slots: enough to fill any that falls free."""
IDLE_WAIT_S = 0.2


@dataclass(slots=True)
class Shift:
    """The loop between intake, engine and outlet."""

    job: Job
    claims: Claims
    sink: Sink
    journal: Journal
    engine: RequestEngine
    task: Task
    prompts: PromptBuilder
    stats: RunStats
    recorder: IntervalRecorder
    progress: RowProgress
    stopping: Stopping
    walltime: Walltime = field(default_factory=Walltime)

    def work(self, chunks: list[Chunk]) -> int:
        """Answer all of the chunks that can be claimed; returns how many.

        Raises Interrupted on a signal, or when the time that is left is too short for another chunk.
        """
        from pipeline.intake import Intake
        from pipeline.outlet import Outlet

        outlet = Outlet(self.sink, self.task, self.job.schema, self._ended, self.job.config.output.journal_s)
        intake = Intake(self.job.source, self.job.files, chunks, self._claim, self._preparation())
        gc.freeze()  # what is loaded stays; collecting garbage need not look through all of it again and again
        try:
            with intake:
                done = self._pump(intake, outlet)
        finally:
            gc.unfreeze()
            outlet.close()
            self.walltime.pause()
        if self.walltime.short and self.job.pending():
            raise Interrupted("stopped because the Slurm job has too little time left for another chunk")
        return done

    def _pump(self, intake: Intake, outlet: Outlet) -> int:
        """Keep the engine fed until nothing is left of it and of the intake."""
        chunks = 0
        first_ready = None
        while not intake.exhausted or self.engine.unfinished:
            check_time(self.stopping, self.walltime)
            chunks += self._feed(intake, outlet)
            if chunks and first_ready is None:
                first_ready = time.perf_counter()
            answered = self._poll(outlet)
            if answered and not self.stats.first_answer_s:
                self.stats.first_answer_s = process_age_s()
            if answered and first_ready is not None:
                now = time.perf_counter()
                self.stats.generate_s += now - first_ready
                first_ready = now
            self.recorder.tick(
                self.engine.counters, self.stats.rows, self.engine.unfinished - self.engine.waiting, self.engine.waiting
            )
        return chunks

    def _feed(self, intake: Intake, outlet: Outlet) -> int:
        """Submit prepared chunks while the engine has less waiting than its slots could take."""
        chunks = 0
        wanted = LOOKAHEAD * sum(c.slots for c in self.engine.plan.length_classes)
        while self.engine.waiting < wanted:
            prepared = intake.take(0 if self.engine.unfinished else IDLE_WAIT_S)
            if prepared is None:
                break
            chunks += 1
            outlet.expect(prepared)
            self.progress.advance(prepared.claimed.chunk.num_rows - len(prepared.requests), 0)
            self.walltime.answer(len(prepared.failed))
            for request in prepared.requests:
                self.engine.submit(request)
        return chunks

    def _poll(self, outlet: Outlet) -> int:
        completions = [o.completion for o in self.engine.poll() if o.completion is not None]
        outlet.add(completions)
        answered = (sum(len(x.token_ids) for x in c.choices or (c,)) + c.target_tokens for c in completions)
        tokens = sum(c.prompt_tokens for c in completions) + sum(answered)
        self.progress.advance(len(completions), tokens)
        self.walltime.answer(len(completions))
        return len(completions)

    def _preparation(self) -> Preparation:
        from pipeline.engine.engine import unfit
        from pipeline.intake import Preparation

        plan = self.engine.plan
        return Preparation(self.prompts, self.task, lambda request: unfit(request, plan), plan.max_len)

    def _claim(self, chunk: Chunk) -> ClaimedChunk | None:
        """Take a chunk unless somebody has it or, since the listing, has done it, or time is too short."""
        if self.walltime.short or not self.claims.try_claim(chunk.id):
            return None
        claimed = self._look(chunk)
        if claimed is None or not self.walltime.take(len(claimed.left)):
            self.claims.release(chunk.id)
            return None
        return claimed

    def _look(self, chunk: Chunk) -> ClaimedChunk | None:
        """What is there of a chunk that nobody else has; None if there is nothing to do."""
        name = part_path(chunk.id)
        with failing_run(self.job.output.shown(name)):
            done = self.job.output.exists(name)
        part = self.sink.read_failed(chunk.id, self.job.failed.get(chunk.id)) if done else None
        if done and part is None:
            self.job.failed.pop(chunk.id, None)
            return None
        if not self.job.is_as_registered(chunk):
            return None
        journal = self.journal.open(chunk, self.job.content_of(chunk), part.attempt if part else "")
        return ClaimedChunk(chunk, journal, lambda: self.claims.confirm(chunk.id), part)

    def _ended(self, claimed: ClaimedChunk, counts: Counts, journaled: Counts) -> None:
        """Called in the writing thread once a chunk has its Part."""
        if counts.rows:
            self.job.failed.pop(claimed.chunk.id, None)
        self.claims.release(claimed.chunk.id)
        self.stats.rows += counts.rows
        self.stats.error_rows += counts.error_rows
        self.stats.prompt_tokens += counts.prompt_tokens
        self.stats.completion_tokens += counts.completion_tokens
        self.stats.target_tokens += counts.target_tokens
        self.stats.journaled_rows += journaled.rows
        self.stats.journaled_tokens += journaled.tokens


def check_time(stopping: Stopping, walltime: Walltime) -> None:
    """Raise Interrupted when a signal asks for it, or when the end of the Slurm job is near."""
    if stopping():
        raise Interrupted("stopped by a signal")
    if walltime.over:
        raise Interrupted("stopped before the end of the Slurm job")
