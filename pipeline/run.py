"""The spine: Source -> Chunk -> prompts -> Request -> Engine -> Completion -> Sink -> Part."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from pipeline import fingerprint
from pipeline.console import Console, RowProgress
from pipeline.data.source import Chunk
from pipeline.engine.plan import EnginePlan
from pipeline.errors import Interrupted
from pipeline.job import Job
from pipeline.launch.patience import Patience, wait_for_chunks
from pipeline.launch.walltime import Walltime
from pipeline.output.claims import SCHEDULE_CLAIM, Claims
from pipeline.output.durable import failing_run
from pipeline.output.sink import part_path
from pipeline.output.store import PLAN_JSON, RESULTS
from pipeline.settings import LocalSettings, RunConfig
from pipeline.stats import IntervalRecorder, RunStats, last_stats, stats_since, together, with_identity, write_stats

if TYPE_CHECKING:
    from pipeline.engine.dedup import RequestEngine
    from pipeline.intake import Intake, Preparation
    from pipeline.models.runtime import Runtime
    from pipeline.models.tokenizer import Tokenizer
    from pipeline.outlet import Counts, Outlet
    from pipeline.output.sink import Sink
    from pipeline.prompts import PromptBuilder
    from pipeline.tasks.task import Task

LOOKAHEAD = 2
"""Requests that wait for a slot, in multiples of all slots: enough to fill any that falls free."""
IDLE_WAIT_S = 0.2


class ExitCode(IntEnum):
    """What the process ends with; see docs/architecture.md."""

    DONE = 0
    FAILED = 1
    BAD_CONFIG = 2
    TOO_MANY_ERRORS = 3
    NOT_DONE = 75


Stopping = Callable[[], bool]
"""Whether a signal has asked the run to stop."""


def run(config: RunConfig, console: Console, stopping: Stopping) -> ExitCode:
    """Answer every row that has no answer yet, and say what came out.

    Raises ConfigError, RunFailed or Interrupted; what is committed stays.
    """
    started = time.perf_counter()
    job = Job(config)
    if config.dry_run:
        return show_plan(job, console)
    with job.output.claims() as claims:
        if not may_begin(job, claims, console):
            return ExitCode.NOT_DONE
        if not job.is_answered():
            job.output.prepare()
            answer_rows(job, claims, console, stopping, started, Patience(config.shard.wait_s))
        return finish(job, claims, console)


def work(config: RunConfig, console: Console, stopping: Stopping, patience: Patience) -> ExitCode:
    """What one of several processes does: answer rows, and leave what is to be said of the whole to its parent.

    Raises ConfigError, RunFailed or Interrupted; what is committed stays.
    """
    started = time.perf_counter()
    job = Job(config)
    with job.output.claims() as claims:
        if not job.is_answered():
            job.output.prepare()
            answer_rows(job, claims, console, stopping, started, patience)
    return ExitCode.DONE if job.is_answered() else ExitCode.NOT_DONE


def may_begin(job: Job, claims: Claims, console: Console) -> bool:
    """With launcher.lock, whether no other such run is at work on this output; then it is kept out from now on."""
    if not (isinstance(job.config.launcher, LocalSettings) and job.config.launcher.lock):
        return True
    if claims.try_claim(SCHEDULE_CLAIM):
        return True
    console.note(f"{job.output.shown()}: another run with launcher.lock is at work on it; this one leaves it alone")
    return False


def answer_rows(
    job: Job, claims: Claims, console: Console, stopping: Stopping, started: float, patience: Patience
) -> None:
    """Take the device and answer all rows that can be claimed, also after waiting for what others give up."""
    from pipeline.models.runtime import resolve_runtime
    from pipeline.models.tokenizer import Tokenizer

    config = job.config
    runtime = resolve_runtime(config, job.checkpoint, job.manifest.engine if job.manifest else None, job.adapter)
    tokenizer = Tokenizer(str(job.tokenizer.folder), config.model.trust_remote_code)
    prompts, task = make_task(job, tokenizer)
    job.check_resolved(runtime.resolved())
    noted = {"batch_invariant": runtime.spec.batch_invariant}
    job.start(claims, runtime.resolved(), runtime.shapes.as_dict(), noted)
    assert job.manifest is not None
    if prompts.is_dated:  # with the date of the run, which another process may have begun
        prompts, task = make_task(job, tokenizer)
    if EnginePlan.from_dict(job.manifest.engine) != runtime.shapes:  # another process was first, with other memory free
        runtime = resolve_runtime(config, job.checkpoint, job.manifest.engine, job.adapter)
    sink = job.sink(claims.attempt)
    if not job.chunks:
        sink.commit_empty()
    pending = job.pending()
    walltime = _walltime(config)

    def more() -> bool:
        return wait_for_chunks(patience, lambda: len(job.pending()), claims.others, lambda: _check(stopping, walltime))

    if not pending or not more():
        return
    write_plan(job, runtime)
    for line in (runtime.describe(), *job.notes()):
        console.note(line)
    if not runtime.spec.batch_invariant:
        console.note(
            "a row's result can depend on the rows computed with it, because outliers are found over the whole batch; "
            "quant.int8_threshold=0 makes rows independent"
        )
    stats = with_identity(
        RunStats(job=config.place.job or "", restarts=config.place.restarts),
        run_id=job.manifest.run_id,
        attempt=claims.attempt,
        resolved=runtime.resolved(),
        config=config.resolved,
        versions=fingerprint.versions(),
    )
    recorder = IntervalRecorder(stats.run_id, stats.attempt)
    engine = load_engine(job, runtime, tokenizer, prompts, console, lambda: stopping() or walltime.over, stats)
    try:
        done_before = job.num_rows - sum(chunk.num_rows for chunk in pending)
        with console.rows(job.num_rows, done_before) as progress:
            shift = Shift(job, claims, sink, engine, task, prompts, stats, recorder, progress, stopping, walltime)
            while shift.work(job.pending()) or more():
                pass
    finally:
        stats.finish(time.perf_counter() - started)
        _count_engine(stats, engine, runtime)
        recorder.tick(engine.counters, stats.rows, 0, 0, last=True)
        write_stats(job.output, stats, recorder.intervals)


def make_task(job: Job, tokenizer: Tokenizer) -> tuple[PromptBuilder, Task]:
    """The prompts and the task of the configuration; raises ConfigError if they do not fit data or tokenizer."""
    from pipeline.prompts import PromptBuilder
    from pipeline.tasks.generate import GenerateTask
    from pipeline.tasks.label import LabelTask
    from pipeline.tasks.sampling import sampling_params
    from pipeline.tasks.score import ScoreTask

    config = job.config
    begun = None if job.manifest is None else datetime.fromisoformat(job.manifest.created)
    prompts = PromptBuilder(tokenizer, config.task, job.input_schema.names, begun)
    end = (tokenizer.end_token_id,) if job.tokenizer_is_adapters and tokenizer.end_token_id is not None else ()
    if config.task.kind == "label":
        stop = (*end, *job.checkpoint.stop_token_ids)
        return prompts, LabelTask(config.task, prompts.continuation, is_chat=prompts.is_chat, stop_token_ids=stop)
    if config.task.kind == "score":
        return prompts, ScoreTask(
            config.task.target,
            prompts.continuations,
            logprobs=config.sampling.logprobs,
            sampling_columns=config.sampling.columns,
            on_request=config.on_request,
        )
    return prompts, GenerateTask(
        sampling_params(config.sampling, job.checkpoint, end),
        tokenizer.decode,
        config.sampling.columns,
        config.on_request,
    )


def load_engine(
    job: Job,
    runtime: Runtime,
    tokenizer: Tokenizer,
    prompts: PromptBuilder,
    console: Console,
    stopping: Stopping,
    stats: RunStats,
) -> RequestEngine:
    """Weights to the device; a signal ends the loading at once."""
    loading_started = time.perf_counter()

    def watched(items: Sequence[Any]) -> Iterator[Any]:
        yield from _until(stopping, console.loading(items))

    def compiled(items: Sequence[Any]) -> Iterator[Any]:
        console.note(f"kernel {runtime.kernel_name}: {len(items)} operators to compile, kept for the next run")
        yield from _until(stopping, console.loading(items, what="compiling", unit="operators"))

    runtime.prepare(compiled)
    model, engine = runtime.load(
        job.config.model.trust_remote_code,
        watched,
        lambda ids: tokenizer.decode([ids])[0],
        job.config.engine,
        prompts.constant_head(),
    )
    stats.load_s = time.perf_counter() - loading_started
    linears = [linear for _, linear in model.quant_linears()]
    if model.unused_tensors:
        console.note(
            f"{job.checkpoint.name}: {len(model.unused_tensors)} tensors have no place in the model and are not used "
            f"({model.unused_tensors[0]}, ...)"
        )
    stats.weight_bytes = model.weight_bytes()
    stats.quantized_bytes = sum(linear.stored_bytes for linear in linears)
    stats.dequantized_bytes = sum(linear.cached_bytes for linear in linears)
    stats.kv_cache_bytes = runtime.shapes.kv_bytes
    return engine


def _until(stopping: Stopping, items: Iterator[Any]) -> Iterator[Any]:
    """The items, until a signal asks to stop."""
    for item in items:
        if stopping():
            raise Interrupted("stopped while loading")
        yield item


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
            _check(self.stopping, self.walltime)
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


def _walltime(config: RunConfig) -> Walltime:
    launcher = config.launcher
    return Walltime(config.place.ends_at, launcher.margin_s if isinstance(launcher, LocalSettings) else 0.0)


def _check(stopping: Stopping, walltime: Walltime) -> None:
    """Raise Interrupted when a signal asks for it, or when the end of the Slurm job is near."""
    if stopping():
        raise Interrupted("stopped by a signal")
    if walltime.over:
        raise Interrupted("stopped before the end of the Slurm job")


def finish(job: Job, claims: Claims, console: Console, since: datetime | None = None) -> ExitCode:
    """Say what came out; the one who finds all rows done writes the summary.

    The speed is that of the last process, or of all that began after `since`.
    """
    left = job.pending()
    if left:
        console.note(
            f"{job.output.shown()}: {len(left)} of {len(job.chunks)} chunks are not done; {claims.others()} are in the "
            "hands of other processes; run the same command again"
        )
        return ExitCode.NOT_DONE
    assert job.manifest is not None
    summary = job.manifest.summary
    truth = (summary or {}).get("accuracy", {}).get("column")
    if summary is None or summary.get("chunks", 0) < len(job.chunks) or truth != job.config.task.truth:
        summary = summarize(job, claims)
    for line in summary_lines(job, summary, since):
        console.result(line)
    if summary["error_rows"] > job.config.max_error_rate * max(1, summary["rows"]):
        console.note(
            f"{summary['error_rows']:,} of {summary['rows']:,} rows are errors, more than "
            f"max_error_rate={job.config.max_error_rate}; the column `error` says why"
        )
        return ExitCode.TOO_MANY_ERRORS
    return ExitCode.DONE


def summarize(job: Job, claims: Claims) -> dict[str, Any]:
    """Totals over all Parts, of whichever process wrote them."""
    totals = job.sink(claims.attempt).totals(chunk.id for chunk in job.chunks)
    counted = ("rows", "error_rows", "prompt_tokens", "completion_tokens", "target_tokens")
    summary: dict[str, Any] = {"chunks": len(job.chunks), **{key: totals.get(key, 0) for key in counted}}
    if summary["error_rows"]:
        from pipeline.evaluate.errors import commonest_error

        summary["commonest_error"] = commonest_error(job.output.dataset(RESULTS))
    truth = job.config.task.truth
    if truth is not None:
        from pipeline.evaluate.truth import accuracy

        judged = accuracy(job.output.dataset(RESULTS), truth)
        summary["accuracy"] = {"column": truth, "rows": judged.judged, "correct": judged.correct, "value": judged.value}
    job.summarize(claims, summary)
    return summary


def summary_lines(job: Job, summary: Mapping[str, Any], since: datetime | None) -> list[str]:
    """What the end of a run prints."""
    lines = [
        f"results    {job.output.shown(RESULTS)} ({summary['rows']:,} rows, {summary['error_rows']:,} of them errors, "
        f"in {_count(max(1, summary['chunks']), 'part')})"
    ]
    if summary.get("commonest_error"):
        worst = summary["commonest_error"]
        lines.append(f"errors     most often, in {_count(worst['rows'], 'row')}: {worst['error']}")
    lines += [f"{name:<10} {value}" for name, value in _speed(job, since)]
    judged = summary.get("accuracy")
    if judged and judged["value"] is not None:
        lines.append(f"accuracy   {100 * judged['value']:.1f} % of {judged['rows']:,} rows (column {judged['column']})")
    return lines


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _speed(job: Job, since: datetime | None) -> Iterator[tuple[str, str]]:
    """Rates of the last process that has left its stats, or of all since a time, which worked at once."""
    found = last_stats(job.output)
    if found is None:
        return
    name, last, processes = found
    whose = f", the last of {processes} processes" if processes > 1 else ""
    beside = [] if since is None else stats_since(job.output, since)
    if len(beside) > 1:
        last, whose = together(beside), f", {len(beside)} processes together"
    kinds = {kind: last[f"{kind}_tokens"] for kind in ("prompt", "completion", "target")}
    tokens = " + ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count or kind != "target")
    yield (
        "speed",
        f"{last['rows_per_s']:,.1f} rows/s, {last['tokens_per_s']:,.0f} tokens/s "
        f"({tokens} tokens in {last['generate_s']:.1f} s, after {last['load_s']:.1f} s of loading{whose})",
    )
    yield "stats", job.output.shown(name)


def show_plan(job: Job, console: Console) -> ExitCode:
    """dry_run: everything a run would settle, without reading weights or writing anything."""
    from pipeline.models.runtime import resolve_runtime
    from pipeline.models.tokenizer import Tokenizer

    runtime = resolve_runtime(job.config, job.checkpoint, job.manifest.engine if job.manifest else None, job.adapter)
    make_task(job, Tokenizer(str(job.tokenizer.folder), job.config.model.trust_remote_code))
    job.check_resolved(runtime.resolved())
    console.result(json.dumps(plan_of(job, runtime), indent=2, default=str))
    return ExitCode.DONE


def plan_of(job: Job, runtime: Runtime) -> dict[str, Any]:
    """The plan: configuration, files, rows, chunks left, shapes and memory."""
    return {
        "config": job.config.resolved,
        "runs": runtime.resolved() | {"resolved.kernel_reason": runtime.kernel_reason},
        "files": [{"path": f.path, "rows": f.rows, "bytes": f.size} for f in job.files],
        "rows": job.num_rows,
        "chunks": len(job.chunks),
        "chunks_left": len(job.pending()),
        "shapes": runtime.shapes.as_dict(),
        "memory_bytes": runtime.memory.as_dict(),
    }


def write_plan(job: Job, runtime: Runtime) -> None:
    """Leave the plan beside the results, to look at; raises RunFailed if it cannot be written."""
    with failing_run(job.output.shown(PLAN_JSON)):
        job.output.replace(PLAN_JSON, (json.dumps(plan_of(job, runtime), indent=2, default=str) + "\n").encode())


def _count_engine(stats: RunStats, engine: RequestEngine, runtime: Runtime) -> None:
    from pipeline.models.memory import peak_bytes

    counters = engine.counters
    stats.padded_tokens = counters.padded_tokens
    stats.prefix_tokens = counters.prefix_tokens
    stats.prefilled_tokens = counters.prompt_tokens
    stats.prefill_passes = counters.prefill_passes
    stats.decode_steps = counters.decode_steps
    stats.prefill_s = counters.prefill_s
    stats.decode_s = counters.decode_s
    stats.peak_memory_bytes = peak_bytes(runtime.device)
