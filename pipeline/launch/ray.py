"""`launcher=ray`: Ray Data over shard descriptors; an actor for each shard, whose worker is one of `local.py`'s kind.

No rows pass through Ray: the workers share the output folder by claims and commit their own Parts, as they do anywhere.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from pipeline.command import until_loaded
from pipeline.console import Console, RowProgress
from pipeline.errors import ConfigError, RunFailed
from pipeline.launch.crew import Crew, run_crew
from pipeline.launch.ray_link import RayLink, Told
from pipeline.launch.ray_plan import plan_workers, refuse_elsewhere, start_of
from pipeline.process import Stopping
from pipeline.run import show_plan
from pipeline.settings import RaySettings, RunConfig
from pipeline.versions import with_job

EXTRA = "quantized-batch-pipeline[ray]"


def run_on_ray(config: RunConfig, arguments: Sequence[str], console: Console, stopping: Stopping) -> int:
    """Answer every row that has no answer yet on a Ray cluster, and say what came out.

    `arguments` are the command line that `config` was made of. Raises what `run` raises.
    """
    settings = config.launcher
    assert isinstance(settings, RaySettings)
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(f"launcher=ray needs the ray package, which is not installed; pip install '{EXTRA}'")
    with until_loaded(console, stopping) as loading:
        if config.dry_run:
            code = with_job(config, lambda job: show_plan(job, console))
            loading.over()
            console.note(_preview(config, settings, stopping))
            return code
        return run_crew(
            config, lambda: RayCrew(config, settings, arguments, console, stopping), console, stopping, loading
        )


class RayCrew(Crew[Told | None]):
    """Workers that Ray starts; heard of through a process that speaks with Ray (`ray_driver.py`), None at its end."""

    def __init__(
        self, config: RunConfig, settings: RaySettings, arguments: Sequence[str], console: Console, stopping: Stopping
    ) -> None:
        super().__init__(console)
        self._config = config
        self._arguments = arguments
        self._link = RayLink(settings, may_start=True)
        self._stopping = stopping
        self._ended: dict[int, int] = {}
        self._over = False

    def _begin(self) -> None:
        self._link.start(self._said.put)
        nodes = self._link.nodes(self._said.get, self._stopping)
        assert nodes is not None
        refuse_elsewhere(self._config, nodes)
        assert isinstance(self._config.launcher, RaySettings)
        plan = plan_workers(nodes, self._config.launcher, self._config.model.device)
        self._console.note(plan.describe(nodes))
        start = start_of(self._config, self._arguments, plan)
        self._link.tell(json.dumps({"workers": plan.workers, "cpus": plan.cpus, "gpus": plan.gpus, "start": start}))

    def _is_over(self) -> bool:
        return self._over

    def _codes(self) -> list[int]:
        return list(self._ended.values())

    def _stop(self) -> None:
        self._link.tell("stop")

    def _take_in(self, said: Told | None, progress: Callable[[], RowProgress]) -> None:
        if said is None:
            self._over = True
            if not self._stopped:
                raise RunFailed(f"Ray has ended before its workers ({self._link.last_words()}); they save what they "
                                "have; run the same command again")  # fmt: skip
            return
        if "failed" in said:
            for line in self._link.words:
                self._console.note(line)
            raise RunFailed(f"Ray has failed: {said['failed']}; run the same command again")
        if "over" in said:
            self._over = True
            self._ended = dict(said["codes"]) | self._ended
            return
        self._hear_worker(said["worker"], said, progress)

    def _hear_worker(self, worker: int, told: Told, progress: Callable[[], RowProgress]) -> None:
        if told.get("lost"):
            self._note(f"worker {worker} on {told['lost'][0]} is lost; Ray begins it again on {told['begun']}")
        if "log" in told and told["log"] not in self._noted:  # libraries warn in every process
            self._noted.add(told["log"])
            self._console.note(f"worker {worker}: {told['log']}")
        if "ended" in told:
            self._ended[worker] = told["ended"]
            self._note_failure(told["ended"], f"worker {worker}")
        self._show(told, progress)

    def _end(self) -> None:
        self._link.end()


def _preview(config: RunConfig, settings: RaySettings, stopping: Stopping) -> str:
    """dry_run: which workers would be started where, by the cluster as it is; none is started for it."""
    said: SimpleQueue[Told | None] = SimpleQueue()
    link = RayLink(settings, may_start=False)
    try:
        link.start(said.put)
        nodes = link.nodes(said.get, stopping)
    finally:
        link.end()
    if nodes is None:
        return "ray: no cluster runs here; a Ray of this machine alone would be started"
    refuse_elsewhere(config, nodes)
    return f"{plan_workers(nodes, settings, config.model.device).describe(nodes)} would be started"
