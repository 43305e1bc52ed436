"""The spine: Source -> Chunk -> prompts -> Request -> Engine -> Completion -> Sink -> Part."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

from pipeline import fingerprint
from pipeline.command import until_loaded
from pipeline.console import Console, RowProgress
from pipeline.engine.plan import EnginePlan
from pipeline.errors import Interrupted, RunFailed
from pipeline.job import Job
from pipeline.launch.patience import Patience, wait_for_chunks
from pipeline.launch.walltime import Walltime
from pipeline.output.claims import SCHEDULE_CLAIM, Claims
from pipeline.output.manifest import other_hardware
from pipeline.planning import plan_of, write_plan
from pipeline.process import ExitCode, Loading, Stopping
from pipeline.report.page import write_report
from pipeline.retry import look_for_errors
from pipeline.settings import RunConfig, SlurmSettings
from pipeline.shift import Shift, check_time
from pipeline.stats import IntervalRecorder, RunStats, process_age_s, with_identity, write_stats
from pipeline.summary import clear_away, summarize, summary_lines
from pipeline.versions import show_latest, with_job

if TYPE_CHECKING:
    from pipeline.engine.dedup import RequestEngine
    from pipeline.models.runtime import Runtime
    from pipeline.models.tokenizer import Tokenizer
    from pipeline.prompts import PromptBuilder
    from pipeline.tasks.task import Task


def run(config: RunConfig, console: Console, stopping: Stopping) -> ExitCode:
    """Answer every row that has no answer yet, and say what came out.

    Raises ConfigError, RunFailed or Interrupted; what is committed stays.
    """
    started = time.perf_counter()
    with until_loaded(console, stopping) as loading:
        return with_job(config, lambda job: _run(job, console, stopping, loading, started))


def _run(job: Job, console: Console, stopping: Stopping, loading: Loading, started: float) -> ExitCode:
    if job.config.dry_run:
        return show_plan(job, console)
    tell_left(job, console)
    look_for_errors(job)
    with job.output.claims() as claims:
        if not may_begin(job, claims, console):
            return ExitCode.NOT_DONE
        if not job.is_answered():
            job.output.prepare()
            answer_rows(job, claims, console, stopping, loading, started, Patience(job.config.shard.wait_s))
        return finish(job, claims, console)


def tell_left(job: Job, console: Console) -> None:
    """Say which input files are left for a later run."""
    for sentence in job.source.left:
        console.note(f"note: {sentence}")


def work(config: RunConfig, console: Console, stopping: Stopping, patience: Patience) -> ExitCode:
    """What one of several processes does: answer rows, and leave what is to be said of the whole to its parent.

    Raises ConfigError, RunFailed or Interrupted; what is committed stays.
    """
    started = time.perf_counter()
    with until_loaded(console, stopping) as loading:
        return with_job(config, lambda job: _work(job, console, stopping, loading, started, patience))


def _work(
    job: Job, console: Console, stopping: Stopping, loading: Loading, started: float, patience: Patience
) -> ExitCode:
    tell_left(job, console)
    look_for_errors(job)
    with job.output.claims() as claims:
        if not job.is_answered():
            job.output.prepare()
            answer_rows(job, claims, console, stopping, loading, started, patience)
    job.take_over()
    return ExitCode.DONE if job.is_answered() else ExitCode.NOT_DONE


def may_begin(job: Job, claims: Claims, console: Console) -> bool:
    """With launcher.lock, whether no other such run is at work on this output; then it is kept out from now on."""
    launcher = job.config.launcher
    if isinstance(launcher, SlurmSettings) or not launcher.lock:  # `submit` asks the queue
        return True
    if claims.try_claim(SCHEDULE_CLAIM):
        return True
    console.note(f"{job.output.shown()}: another run with launcher.lock is at work on it; this one leaves it alone")
    return False


def answer_rows(
    job: Job,
    claims: Claims,
    console: Console,
    stopping: Stopping,
    loading: Loading,
    started: float,
    patience: Patience,
) -> None:
    """Take the device and answer all rows that can be claimed, also after waiting for what others give up.

    `loading` is over once the model is loaded.
    """
    from pipeline.models.failures import failing_device
    from pipeline.models.runtime import resolve_runtime
    from pipeline.models.tokenizer import Tokenizer

    config = job.config
    runtime = resolve_runtime(config, job.checkpoint, job.manifest.engine if job.manifest else None, job.adapter)
    tokenizer = Tokenizer(str(job.tokenizer.folder), config.model.trust_remote_code)
    prompts, task = make_task(job, tokenizer)
    job.check_resolved(runtime.resolved())
    noted = {"batch_invariant": runtime.spec.batch_invariant, **runtime.computes_on()}
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
        return wait_for_chunks(
            patience, lambda: len(job.pending()), claims.others, lambda: check_time(stopping, walltime)
        )

    if not pending or not more():
        return
    write_plan(job, runtime)
    for line in (
        runtime.describe(),
        runtime.shapes.describe(),
        *job.notes(),
        *other_hardware(job.manifest.informational, noted),
    ):
        console.note(line)
    if not runtime.spec.batch_invariant:
        console.note(
            "a row's result can depend on the rows computed with it, because outliers are found over the whole batch; "
            "quant.int8_threshold=0 makes rows independent"
        )
    stats = with_identity(
        RunStats(
            job=config.place.job or "",
            restarts=config.place.restarts,
            start_s=process_age_s() - (time.perf_counter() - started),
        ),
        run_id=job.manifest.run_id,
        attempt=claims.attempt,
        resolved=runtime.resolved(),
        config=config.resolved,
        versions=fingerprint.versions(),
    )
    recorder = IntervalRecorder(stats.run_id, stats.attempt)
    with failing_device(runtime):
        engine = load_engine(job, runtime, tokenizer, prompts, console, lambda: stopping() or walltime.over, stats)
    loading.over()
    with (
        _leaving(lambda: _leave_stats(job, stats, recorder, engine, runtime, started, console)),
        failing_device(runtime),
    ):
        done_before = job.num_rows - sum(chunk.num_rows for chunk in pending)
        with console.rows(job.num_rows, done_before) as progress:
            journal = job.journal(claims.attempt)
            shift = Shift(
                job, claims, sink, journal, engine, task, prompts, stats, recorder, progress, stopping, walltime
            )
            while shift.work(job.pending()) or _take_over(job, progress) or more() or _take_over(job, progress):
                pass


def _take_over(job: Job, progress: RowProgress) -> bool:
    """Whether other processes have registered more input by now, which this one then works on as well."""
    taken = job.take_over()
    if taken:
        progress.extend(job.num_rows)
    return taken


@contextmanager
def _leaving(leave: Callable[[], None]) -> Iterator[None]:
    """Leave something behind at any end; if that fails too, the first failure is the one that is told."""
    try:
        yield
    except RunFailed:
        with suppress(RunFailed):
            leave()
        raise
    except BaseException:
        leave()
        raise
    leave()


def _leave_stats(
    job: Job,
    stats: RunStats,
    recorder: IntervalRecorder,
    engine: RequestEngine,
    runtime: Runtime,
    started: float,
    console: Console,
) -> None:
    stats.finish(time.perf_counter() - started)
    _count_engine(stats, engine, runtime)
    if runtime.device.type == "cuda" and stats.eager and stats.decode_steps:
        console.note(f"decode steps ran without CUDA graphs: {stats.eager}")
    recorder.tick(engine.counters, stats.rows, 0, 0, last=True)
    write_stats(job.output, stats, recorder.intervals)
    job.has_worked = True


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
    brought = tokenizer.end_token_id if job.model_files.tokenizer_is_adapters else None
    end = () if brought is None else (brought,)
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
    stats.shapes = engine.plan.num_shapes
    if engine.plan.smaller:
        console.note(engine.plan.describe_smaller())
    return engine


def _until(stopping: Stopping, items: Iterator[Any]) -> Iterator[Any]:
    """The items, until a signal asks to stop."""
    for item in items:
        if stopping():
            raise Interrupted("stopped while loading")
        yield item


def _walltime(config: RunConfig) -> Walltime:
    launcher = config.launcher
    return Walltime(config.place.ends_at, 0.0 if isinstance(launcher, SlurmSettings) else launcher.margin_s)


def finish(job: Job, claims: Claims, console: Console, since: datetime | None = None) -> ExitCode:
    """Say what came out; the one who finds all rows done writes the summary.

    The speed is that of the last process, or of all that began after `since`.
    """
    job.take_over()
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
    fresh = summary is None or summary.get("chunks", 0) < len(job.chunks) or truth != job.config.task.truth
    if summary is None or fresh:
        summary = summarize(job, claims)
    else:
        clear_away(job, claims)
    if fresh or job.has_worked or since is not None:
        write_report(job.output, job.manifest, summary)
    show_latest(job)
    for line in summary_lines(job, summary, since):
        console.result(line)
    if summary["error_rows"] > job.config.max_error_rate * max(1, summary["rows"]):
        console.note(
            f"{summary['error_rows']:,} of {summary['rows']:,} rows are errors, more than "
            f"max_error_rate={job.config.max_error_rate}; the column `error` says why"
        )
        return ExitCode.TOO_MANY_ERRORS
    return ExitCode.DONE


def show_plan(job: Job, console: Console) -> ExitCode:
    """dry_run: everything a run would settle, without reading weights or writing anything."""
    from pipeline.models.runtime import resolve_runtime
    from pipeline.models.tokenizer import Tokenizer

    look_for_errors(job)
    runtime = resolve_runtime(job.config, job.checkpoint, job.manifest.engine if job.manifest else None, job.adapter)
    make_task(job, Tokenizer(str(job.tokenizer.folder), job.config.model.trust_remote_code))
    job.check_resolved(runtime.resolved())
    console.result(json.dumps(plan_of(job, runtime), indent=2, default=str))
    return ExitCode.DONE


def _count_engine(stats: RunStats, engine: RequestEngine, runtime: Runtime) -> None:
    from pipeline.models.memory import peak_bytes

    counters = engine.counters
    stats.padded_tokens = counters.padded_tokens
    stats.prefix_tokens = counters.prefix_tokens
    stats.prefilled_tokens = counters.prompt_tokens
    stats.prefill_passes = counters.prefill_passes
    stats.decode_steps = counters.decode_steps
    stats.graphs = counters.graphs
    stats.eager = engine.eager_reason or ""
    stats.prefill_s = counters.prefill_s
    stats.decode_s = counters.decode_s
    stats.peak_memory_bytes = peak_bytes(runtime.device)
