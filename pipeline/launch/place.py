"""Where a process stands among its like: what Slurm, torchrun or our own launcher says in the environment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A process among those that share its work, and among those on its machine.

    `ends_at` is when its Slurm job ends, in seconds since 1970, None without an end; `job` is that job
    as Slurm's commands name it (array tasks as 12_3), and `restarts` how often it was requeued.
    """

    shard_index: int = 0
    shard_count: int = 1
    local_rank: int = 0
    local_count: int = 1
    ends_at: float | None = None
    job: str | None = None
    restarts: int = 0


ALONE = Place()
"""Where a process stands of which nobody says anything."""


def place_of(env: Mapping[str, str], now: float) -> Place:
    """The place that the environment tells of at the time `now`; alone where it tells nothing.

    Variables: sbatch(1) and srun(1), "OUTPUT ENVIRONMENT VARIABLES"; torchrun sets RANK and LOCAL_RANK. An
    array's tasks and the processes of one task are counted through.
    """
    array_index, array_count = _array(env)
    rank, count = _ranked(env, ("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
    local_rank, local_count = _ranked(env, ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), otherwise=_on_node(env))
    return Place(
        shard_index=array_index * count + rank,
        shard_count=array_count * count,
        local_rank=local_rank,
        local_count=local_count,
        ends_at=_end(env, now),
        job=_job(env),
        restarts=_number(env, "SLURM_RESTART_COUNT") or 0,
    )


def device_index(place: Place, devices: int) -> int:
    """Which of the GPUs that a process sees is its own: processes beside each other take turns."""
    return place.local_rank % max(1, devices)


def _array(env: Mapping[str, str]) -> tuple[int, int]:
    """A task's place in its array; an irregular list of ids (`--array=1,5,7`) has no steps to count by."""
    index, count = _number(env, "SLURM_ARRAY_TASK_ID"), _number(env, "SLURM_ARRAY_TASK_COUNT")
    if index is None or not count:
        return 0, 1
    first = _number(env, "SLURM_ARRAY_TASK_MIN") or 0
    step = _number(env, "SLURM_ARRAY_TASK_STEP") or 1
    return (index - first) // step % count, count


def _ranked(env: Mapping[str, str], *names: tuple[str, str], otherwise: tuple[int, int] = (0, 1)) -> tuple[int, int]:
    """Rank and size of the first pair of variables that is there and makes sense."""
    for rank_name, size_name in names:
        rank, size = _number(env, rank_name), _number(env, size_name)
        if rank is not None and size is not None and rank < size:
            return rank, size
    return otherwise


def _on_node(env: Mapping[str, str]) -> tuple[int, int]:
    """Rank and number of the step's tasks on this node, from lists such as `2(x3),1`."""
    rank, node = _number(env, "SLURM_LOCALID"), _number(env, "SLURM_NODEID")
    text = env.get("SLURM_STEP_TASKS_PER_NODE", "")
    if rank is None or node is None or not re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", text):
        return 0, 1
    tasks = [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))]
    return (rank, tasks[node]) if node < len(tasks) and rank < tasks[node] else (0, 1)


def _end(env: Mapping[str, str], now: float) -> float | None:
    """The job's end; one that has passed was another job's, whose environment is still about."""
    end = _number(env, "SLURM_JOB_END_TIME")
    return None if end is None or end <= now else float(end)


def _job(env: Mapping[str, str]) -> str | None:
    if "SLURM_ARRAY_JOB_ID" in env and "SLURM_ARRAY_TASK_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID")


def _number(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name, "")
    return int(text) if text.isdecimal() else None
