"""The loop of a process at work: chunks from the intake, through the engine, to the outlet."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.console import RowProgress
from pipeline.data.source import Chunk
from pipeline.errors import Interrupted
from pipeline.job import Job
from pipeline.launch.walltime import Walltime
from pipeline.output.claims import Claims
from pipeline.output.durable import failing_run
from pipeline.output.sink import part_path
from pipeline.process import Stopping
from pipeline.stats import IntervalRecorder, RunStats

if TYPE_CHECKING:
    from pipeline.engine.dedup import RequestEngine
    from pipeline.intake import Intake, Preparation
    from pipeline.outlet import Counts, Outlet
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

        outlet = Outlet(self.sink, self.task, self.job.schema, self._committed)
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
            self.progress.advance(len(prepared.failed), 0)
            self.walltime.answer(len(prepared.failed))
            for request in prepared.requests:
                self.engine.submit(request)
        return chunks

    def _poll(self, outlet: Outlet) -> int:
        completions = [o.completion for o in self.engine.poll() if o.completion is not None]
        for completion in completions:
            outlet.add(completion)
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

    def _claim(self, chunk: Chunk) -> bool:
        """Take a chunk unless somebody has it or, since the listing, has committed it, or time is too short."""
        if self.walltime.short or not self.claims.try_claim(chunk.id):
            return False
        name = part_path(chunk.id)
        with failing_run(self.job.output.shown(name)):
            done = self.job.output.exists(name)
        if done or not self.walltime.take(chunk.num_rows):
            self.claims.release(chunk.id)
            return False
        return True

    def _committed(self, chunk: Chunk, counts: Counts) -> None:
        """Called in the writing thread once a chunk has its Part."""
        self.claims.release(chunk.id)
        self.stats.rows += counts.rows
        self.stats.error_rows += counts.error_rows
        self.stats.prompt_tokens += counts.prompt_tokens
        self.stats.completion_tokens += counts.completion_tokens
        self.stats.target_tokens += counts.target_tokens


def check_time(stopping: Stopping, walltime: Walltime) -> None:
    """Raise Interrupted when a signal asks for it, or when the end of the Slurm job is near."""
    if stopping():
        raise Interrupted("stopped by a signal")
    if walltime.over:
        raise Interrupted("stopped before the end of the Slurm job")
