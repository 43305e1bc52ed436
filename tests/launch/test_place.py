"""What Slurm's and torchrun's variables say of a process, as real jobs have them (see also tests/slurm)."""

from __future__ import annotations

import pytest

from pipeline import config
from pipeline.errors import ConfigError
from pipeline.launch.place import Place, device_index, place_of

NOW = 1_800_000_000.0


def place(**env: str) -> Place:
    return place_of(env, NOW)


def array(task: int, ids: list[int], step: int = 1) -> dict[str, str]:
    """What sbatch sets in a task of an array."""
    return {
        "SLURM_JOB_ID": "77",
        "SLURM_ARRAY_JOB_ID": "70",
        "SLURM_ARRAY_TASK_ID": str(task),
        "SLURM_ARRAY_TASK_COUNT": str(len(ids)),
        "SLURM_ARRAY_TASK_MIN": str(min(ids)),
        "SLURM_ARRAY_TASK_MAX": str(max(ids)),
        "SLURM_ARRAY_TASK_STEP": str(step),
    }


def step(rank: int, tasks_per_node: list[int], text: str) -> dict[str, str]:
    """What srun sets in a task of a step."""
    node, local = 0, rank
    while local >= tasks_per_node[node]:
        local -= tasks_per_node[node]
        node += 1
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_NTASKS": str(sum(tasks_per_node)),
        "SLURM_LOCALID": str(local),
        "SLURM_NODEID": str(node),
        "SLURM_STEP_TASKS_PER_NODE": text,
    }


def test_alone_where_nothing_is_said() -> None:
    assert place() == Place()
    assert place(PATH="/bin", SLURM_CONF="/etc/slurm.conf") == Place()


@pytest.mark.parametrize(
    ("ids", "step_size"), [([0, 1, 2, 3], 1), ([5, 6, 7], 1), ([1, 4, 7, 10], 3), ([9], 1)], ids=str
)
def test_the_tasks_of_an_array_are_the_shards(ids: list[int], step_size: int) -> None:
    places = [place(**array(task, ids, step_size)) for task in ids]
    assert [p.shard_index for p in places] == list(range(len(ids)))
    assert {p.shard_count for p in places} == {len(ids)}
    assert [p.job for p in places] == [f"70_{task}" for task in ids]


def test_an_irregular_array_has_shards_too() -> None:
    places = [place(**array(task, [1, 5, 7])) for task in (1, 5, 7)]
    assert all(0 <= p.shard_index < p.shard_count == 3 for p in places)


@pytest.mark.parametrize(
    ("tasks", "text"), [([4], "4"), ([2, 2, 2, 1], "2(x3),1"), ([1, 3], "1,3"), ([1] * 12, "1(x12)")], ids=str
)
def test_the_tasks_of_a_step_are_shards_with_a_rank_on_their_node(tasks: list[int], text: str) -> None:
    places = [place(**step(rank, tasks, text)) for rank in range(sum(tasks))]
    assert [(p.shard_index, p.shard_count) for p in places] == [(rank, sum(tasks)) for rank in range(sum(tasks))]
    assert [p.local_rank for p in places] == [local for count in tasks for local in range(count)]
    assert [p.local_count for p in places] == [count for count in tasks for _ in range(count)]


def test_steps_in_an_array_are_counted_through() -> None:
    seen = [place(**array(task, [0, 1, 2]), **step(rank, [2], "2")) for task in range(3) for rank in range(2)]
    assert [p.shard_index for p in seen] == list(range(6))
    assert {p.shard_count for p in seen} == {6}


def test_torchrun_inside_a_step_has_the_last_word() -> None:
    env = step(0, [1], "1") | {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    found = place(**env)
    assert (found.shard_index, found.shard_count, found.local_rank, found.local_count) == (3, 4, 1, 2)


@pytest.mark.parametrize(
    "env",
    [
        {"SLURM_PROCID": "4", "SLURM_NTASKS": "4"},
        {"SLURM_PROCID": "1"},
        {"SLURM_PROCID": "-1", "SLURM_NTASKS": "x"},
        {"SLURM_ARRAY_TASK_ID": "3"},
        {"SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2"},
        {"SLURM_LOCALID": "1", "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "2(x"},
        {"RANK": "0"},
    ],
    ids=str,
)
def test_what_makes_no_sense_is_as_good_as_nothing(env: dict[str, str]) -> None:
    assert place(**env) == Place()


def test_the_end_of_the_job_and_its_restarts() -> None:
    found = place(SLURM_JOB_ID="12", SLURM_JOB_END_TIME="1800000060", SLURM_RESTART_COUNT="2")
    assert (found.job, found.ends_at, found.restarts) == ("12", NOW + 60, 2)
    assert place(SLURM_JOB_END_TIME="1799999999").ends_at is None, "left over from a job that has ended"


def test_processes_beside_each_other_take_turns_with_the_gpus() -> None:
    ranks = [Place(local_rank=rank, local_count=4) for rank in range(4)]
    assert [device_index(p, 4) for p in ranks] == [0, 1, 2, 3]
    assert [device_index(p, 2) for p in ranks] == [0, 1, 0, 1]
    assert [device_index(p, 1) for p in ranks] == [0, 0, 0, 0], "srun bound one to each"


def shard(place: Place, *overrides: str) -> tuple[int, int]:
    found = config.load_config(["data.path=rows.parquet", "output.dir=out", *overrides], place)
    return found.shard.index, found.shard.count


def test_the_place_is_the_shard_unless_the_command_line_says_otherwise() -> None:
    third = Place(shard_index=2, shard_count=4)
    assert shard(third) == (2, 4)
    assert shard(third, "shard.index=0") == (0, 4)
    assert shard(third, "shard.count=8") == (2, 8)
    assert shard(third, "shard.count=2") == (0, 2)
    assert shard(third, "shard.index=1", "shard.count=2") == (1, 2)
    with pytest.raises(ConfigError, match=r"shard\.index=5 shard\.count=4"):
        shard(third, "shard.index=5")


def test_the_shard_in_use_is_what_is_recorded() -> None:
    found = config.load_config(["data.path=rows.parquet", "output.dir=out"], Place(shard_index=2, shard_count=4))
    assert found.resolved["shard"] == {"index": 2, "count": 4, "wait_s": 0.0}
