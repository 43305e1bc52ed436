"""What a cluster's nodes have room for, and what its workers are started with."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.launch.shared_paths import refuse_unshared
from pipeline.settings import RaySettings, RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RayNode:
    """A machine of the cluster, and what Ray may give away of it."""

    host: str
    address: str
    cpus: float
    gpus: float

    def room(self, cpus: int, gpus: int) -> int:
        """How many workers that reserve so much fit on it."""
        fit = self.cpus // cpus
        return int(min(fit, self.gpus // gpus) if gpus else fit)


@dataclass(frozen=True, slots=True, kw_only=True)
class RayPlan:
    """So many workers, what each of them reserves, and how many fit: on the whole cluster, and on one node at most."""

    workers: int
    cpus: int
    gpus: int
    room: int
    beside: int

    def describe(self, nodes: Sequence[RayNode]) -> str:
        """A line for the log."""
        whose = f"{self.workers} workers with" if self.workers > 1 else "1 worker with"
        gpu = f"{self.gpus} GPU" if self.gpus else "no GPU"
        more = f"; {self.room} of them fit now, the others begin when there is room" if self.room < self.workers else ""
        where = f"{len(nodes)} node{'s' if len(nodes) > 1 else ''} ({', '.join(sorted({n.host for n in nodes}))})"
        return f"ray: {whose} {gpu} and {self.cpus} CPU on {where}{more}"


def plan_workers(nodes: Sequence[RayNode], settings: RaySettings, device: str) -> RayPlan:
    """One worker for each GPU, else one, and the cores shared evenly; all of it unless the settings say otherwise."""
    all_gpus = sum(int(node.gpus) for node in nodes)
    gpus = settings.gpus if settings.gpus is not None else int(all_gpus > 0 and device != "cpu")
    workers = settings.processes or (max(1, all_gpus) if gpus else 1)

    def room(cpus: int) -> int:
        return sum(node.room(cpus, gpus) for node in nodes)

    most = max((int(node.cpus) for node in nodes), default=1)
    shares = [cpus for cpus in range(1, most + 1) if room(cpus) >= workers]
    cpus = settings.cpus or max(shares, default=1)
    beside = max((node.room(cpus, gpus) for node in nodes), default=1)
    return RayPlan(workers=workers, cpus=cpus, gpus=gpus, room=room(cpus), beside=max(1, min(workers, beside)))


def refuse_elsewhere(config: RunConfig, nodes: Sequence[RayNode]) -> None:
    """Raise ConfigError for a path that other machines of the cluster do not see."""
    assert isinstance(config.launcher, RaySettings)
    elsewhere = sorted({node.host for node in nodes} - {socket.gethostname()})
    if elsewhere and not config.launcher.shared:
        folder = Path(config.model.path).expanduser()
        refuse_unshared(config, folder if folder.exists() else None, elsewhere, "Ray runs workers on")


def start_of(config: RunConfig, arguments: Sequence[str], plan: RayPlan) -> Mapping[str, Any]:
    """What a worker is started with, wherever it is: everything but its Python."""
    assert isinstance(config.launcher, RaySettings)
    shard, count = config.shard, plan.workers
    referred = [name for argument in arguments for name in re.findall(r"\$\{oc\.env:(\w+)", argument)]
    env = {name: os.environ[name] for name in (*config.launcher.env, *referred) if name in os.environ}
    return {
        "command": ["-m", "pipeline.launch.worker", *arguments],
        "shards": [
            [f"shard.index={shard.index * count + rank}", f"shard.count={shard.count * count}"] for rank in range(count)
        ],
        "env": env | {"LOCAL_WORLD_SIZE": str(plan.beside)},
        "cwd": str(Path.cwd()),
    }
