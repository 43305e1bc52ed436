"""`launcher=local` with several processes of this machine over one output: one progress, one report, one exit code."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any

from pipeline.command import until_loaded
from pipeline.console import Console, RowProgress
from pipeline.errors import ConfigError, Interrupted, RunFailed
from pipeline.job import Job
from pipeline.output.claims import Claims
from pipeline.process import ExitCode, Loading, Stopping
from pipeline.retry import look_for_errors
from pipeline.run import finish, may_begin, show_plan
from pipeline.settings import LocalSettings, RunConfig
from pipeline.versions import open_job, with_job

LOOK_EVERY_S = 0.1


def run_processes(config: RunConfig, arguments: Sequence[str], console: Console, stopping: Stopping) -> int:
    """Answer every row that has no answer yet in several processes, and say what came out.

    `arguments` are the command line that `config` was made of. Raises what `run` raises.
    """
    since = datetime.now(UTC)
    with until_loaded(console, stopping) as loading:
        if config.dry_run:
            return with_job(config, lambda job: show_plan(job, console))
        return _run_processes(config, arguments, console, stopping, loading, since)


def _run_processes(
    config: RunConfig,
    arguments: Sequence[str],
    console: Console,
    stopping: Stopping,
    loading: Loading,
    since: datetime,
) -> int:
    job = open_job(config)
    look_for_errors(job)
    with job.output.claims() as claims:
        if not may_begin(job, claims, console):
            return ExitCode.NOT_DONE
        if job.is_answered():
            return finish(job, claims, console)
        crew = Crew(_workers(config, arguments), console)
        loading.over()
        codes = crew.work(job, stopping)
        after = open_job(config)  # by now there is a run.json
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


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStart:
    """What a worker is started with."""

    command: tuple[str, ...]
    env: Mapping[str, str]


def _workers(config: RunConfig, arguments: Sequence[str]) -> list[WorkerStart]:
    """Each with its part of the shard, its GPU or its share of the cores."""
    launcher = config.launcher
    assert isinstance(launcher, LocalSettings)
    gpus = None if launcher.gpus is None else _visible_gpus(config, launcher.gpus)
    count = len(gpus) if gpus is not None else launcher.processes or 1
    shared = {"LOCAL_WORLD_SIZE": str(count)}
    if "OMP_NUM_THREADS" not in os.environ:
        shared["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // count))
    starts = []
    for rank in range(count):
        own = {"LOCAL_RANK": str(rank)} | ({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus[rank]})
        shard = [f"shard.index={config.shard.index * count + rank}", f"shard.count={config.shard.count * count}"]
        alone = ["launcher.processes=null", "launcher.gpus=null", "launcher.lock=false"]
        command = (sys.executable, "-m", "pipeline.launch.worker", *arguments, *shard, *alone)
        starts.append(WorkerStart(command=command, env=os.environ | shared | own))
    return starts


def _visible_gpus(config: RunConfig, wanted: int | str) -> list[str]:
    """The GPUs to use, as CUDA_VISIBLE_DEVICES names them; raises ConfigError if there are not so many."""
    import torch

    if config.model.device != "auto":
        raise ConfigError(
            f"launcher.gpus={wanted} gives each process a GPU, but model.device={config.model.device}; leave "
            "model.device=auto, or use launcher.processes"
        )
    count = torch.cuda.device_count()
    if not count or (isinstance(wanted, int) and wanted > count):
        raise ConfigError(
            f"launcher.gpus={wanted}, but this machine shows {count} CUDA devices; ask for fewer, or use "
            "launcher.processes"
        )
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = (named or [str(index) for index in range(count)])[:count]
    return names if wanted == "all" else names[: int(wanted)]


@dataclass(slots=True)
class _Worker:
    """A worker's process, and what is known of it."""

    process: subprocess.Popen[str]
    idle: bool = False
    code: int | None = None

    def tell(self, order: str) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(f"{order}\n")
            self.process.stdin.flush()


class Crew:
    """The workers of one run, from their start to the end of the last one."""

    def __init__(self, starts: Sequence[WorkerStart], console: Console) -> None:
        """Nothing is started yet."""
        self._starts = starts
        self._console = console
        self._workers: list[_Worker] = []
        self._said: queue.Queue[tuple[_Worker, str | None]] = queue.Queue()
        self._noted: set[str] = set()
        self._stopped = False

    def work(self, job: Job, stopping: Stopping) -> list[int]:
        """Start the workers and hear them to their end; returns their exit codes. A signal is passed on."""
        done_before = job.num_rows - sum(chunk.num_rows for chunk in job.pending())
        with ExitStack() as stack:
            stack.callback(self._end)
            for start in self._starts:
                self._start(start)

            @cache
            def progress() -> RowProgress:  # from the first rows on, when the models are loaded
                return stack.enter_context(self._console.rows(job.num_rows, done_before))

            while any(worker.code is None for worker in self._workers):
                if stopping() and not self._stopped:
                    self._stopped = True
                    self._tell("stop")
                self._hear(progress)
        return [worker.code for worker in self._workers if worker.code is not None]

    def _start(self, start: WorkerStart) -> None:
        process = subprocess.Popen(  # noqa: S603  # this Python and this package
            start.command, env=start.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        worker = _Worker(process)
        self._workers.append(worker)
        threading.Thread(target=self._listen, args=(worker,), name=f"worker-{process.pid}", daemon=True).start()

    def _listen(self, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        for line in worker.process.stdout:
            self._said.put((worker, line))
        worker.process.wait()  # first really ended, so that its claims are seen to be free
        self._said.put((worker, None))

    def _hear(self, progress: Callable[[], RowProgress]) -> None:
        """Take in one thing that a worker says, if any does."""
        try:
            worker, line = self._said.get(timeout=LOOK_EVERY_S)
        except queue.Empty:
            return
        if line is None:
            self._ended(worker)
            return
        told: dict[str, Any] = json.loads(line)
        if "rows" in told:
            progress().advance(told["rows"], told["tokens"])
        elif "note" in told:
            self._note(told["note"])
        else:
            worker.idle = told["idle"]
            self._tell_busy()

    def _note(self, text: str) -> None:
        """What several workers say is said once."""
        if text not in self._noted and not self._stopped:
            self._noted.add(text)
            self._console.note(text)

    def _ended(self, worker: _Worker) -> None:
        worker.code = worker.process.returncode
        if worker.code not in (ExitCode.DONE, ExitCode.NOT_DONE) and not self._stopped:
            number, how = self._workers.index(worker), _how_ended(worker.code)
            self._console.note(
                f"process {number} (pid {worker.process.pid}) {how}; what it had begun is left to the others"
            )
        self._tell_busy()

    def _tell_busy(self) -> None:
        self._tell(f"busy {sum(worker.code is None and not worker.idle for worker in self._workers)}")

    def _tell(self, order: str) -> None:
        for worker in self._workers:
            if worker.code is None:
                worker.tell(order)

    def _end(self) -> None:
        """Leave nobody behind, also when this process fails."""
        for worker in self._workers:
            if worker.process.poll() is None:
                worker.process.kill()
            worker.process.wait()
            for stream in (worker.process.stdin, worker.process.stdout):
                if stream is not None:
                    with suppress(BrokenPipeError):
                        stream.close()


def _how_ended(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
