"""`launcher=local` with several processes of this machine over one output: one progress, one report, one exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pipeline.command import until_loaded
from pipeline.console import Console, RowProgress
from pipeline.errors import ConfigError
from pipeline.launch.crew import Crew, run_crew
from pipeline.process import Stopping
from pipeline.run import show_plan
from pipeline.settings import LocalSettings, RunConfig
from pipeline.versions import with_job


def run_processes(config: RunConfig, arguments: Sequence[str], console: Console, stopping: Stopping) -> int:
    """Answer every row that has no answer yet in several processes, and say what came out.

    `arguments` are the command line that `config` was made of. Raises what `run` raises.
    """
    with until_loaded(console, stopping) as loading:
        if config.dry_run:
            return with_job(config, lambda job: show_plan(job, console))
        return run_crew(config, lambda: LocalCrew(_workers(config, arguments), console), console, stopping, loading)


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


class LocalCrew(Crew[tuple[_Worker, str | None]]):
    """Processes that are children of this one; what they say is lines of JSON, and None at their end."""

    def __init__(self, starts: Sequence[WorkerStart], console: Console) -> None:
        super().__init__(console)
        self._starts = starts
        self._workers: list[_Worker] = []

    def _begin(self) -> None:
        for start in self._starts:
            self._start(start)

    def _is_over(self) -> bool:
        return all(worker.code is not None for worker in self._workers)

    def _codes(self) -> list[int]:
        return [worker.code for worker in self._workers if worker.code is not None]

    def _stop(self) -> None:
        self._tell("stop")

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

    def _take_in(self, said: tuple[_Worker, str | None], progress: Callable[[], RowProgress]) -> None:
        worker, line = said
        if line is None:
            self._ended(worker)
            return
        told: dict[str, Any] = json.loads(line)
        if "idle" in told:
            worker.idle = told["idle"]
            self._tell_busy()
        self._show(told, progress)

    def _ended(self, worker: _Worker) -> None:
        worker.code = worker.process.returncode
        self._note_failure(worker.code, f"process {self._workers.index(worker)} (pid {worker.process.pid})")
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
