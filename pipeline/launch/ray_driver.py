"""`python -m pipeline.launch.ray_driver ADDRESS`: the process that speaks with Ray. `ray.py` starts it and hears it.

It is apart because Ray takes over a process: signal handlers, standard output, and its end when the node's raylet dies.

To its parent, on standard output, a JSON object a line: `nodes` (of the cluster; null where there is none), then what
workers say, with the number of the `worker`, and at last `over`; or `refused` or `failed` with a sentence. From its
parent, on standard input: what to start (JSON), then `stop`. The end of standard input is the end of the parent.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import secrets
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from pipeline.launch import ray_shard
from pipeline.launch.ray_shard import Desk, ShardActor

LOOK_EVERY_S = 0.25
STORE_BYTES = 100_000_000
"""Of a Ray that is started here: no rows pass through its object store."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def main(arguments: list[str]) -> int:
    """Connect to Ray, and have the shards worked on; 0 unless something is broken."""
    wire = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what Ray prints is for the log
    try:
        import ray
        import ray.data
    except ImportError as error:
        return _tell(wire, refused=f"the ray package is not complete ({error})")
    address, may_start = arguments[0] or None, arguments[1] == "start"
    try:
        found = _connect(address, may_start)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        return _tell(wire, refused=_refusal(error))
    for number in STOP_SIGNALS:  # the parent has them too, and says what is to be done
        signal.signal(number, signal.SIG_IGN)
    _tell(wire, nodes=_nodes() if found else None)
    asked = sys.stdin.readline()
    if asked:
        try:
            _work(json.loads(asked), wire)
        except (ray.exceptions.RayError, RuntimeError) as error:
            return _tell(wire, failed=_sentence(error))
    if found:
        ray.shutdown()
    return 0


def _tell(wire: TextIO, **values: Any) -> int:
    try:
        wire.write(json.dumps(values) + "\n")
        wire.flush()
    except BrokenPipeError:
        return 1
    return 0


def _connect(address: str | None, may_start: bool) -> bool:
    """Connect to the cluster asked for, else to the one that is there, else start one if that is wanted."""
    import ray

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address not in (None, "local"):
        ray.init(address=address, **quiet)
        return True
    try:
        if address is None:
            ray.init(address="auto", **quiet)
            return True
    except ConnectionError:
        if os.environ.get("RAY_ADDRESS"):
            raise
    if may_start:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray leaves one in the user's home
        ray.init(address="local", include_dashboard=False, object_store_memory=STORE_BYTES, **quiet)
    return may_start


def _refusal(error: BaseException) -> str:
    """Ray's sentence, and what it hides: that the cluster wants a token."""
    text, cause = " ".join(str(error).split()), error.__cause__ or error.__context__
    while cause is not None:
        if "authenticat" in str(cause).lower():
            return (
                f"{text}: the cluster asks for its token, so set RAY_AUTH_MODE=token (and RAY_AUTH_TOKEN or its file)"
            )
        cause = cause.__cause__ or cause.__context__
    return text


def _nodes() -> list[Mapping[str, Any]]:
    import ray

    return [
        {"host": node["NodeManagerHostname"], "address": node["NodeManagerAddress"],
         "cpus": node["Resources"].get("CPU", 0), "gpus": node["Resources"].get("GPU", 0)}
        for node in ray.nodes() if node["Alive"]
    ]  # fmt: skip


def _work(asked: Mapping[str, Any], wire: TextIO) -> None:
    """Have all shards worked on; raises RayError or RuntimeError."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(ray_shard)  # else the nodes' Ray would have to find it, and says it badly
    desk = _open_desk(asked["start"])
    stop, rows = threading.Event(), queue.SimpleQueue[Any]()
    threading.Thread(target=_listen, args=(stop,), daemon=True).start()
    data = threading.Thread(target=_iterate, args=(asked, desk, rows), daemon=True)
    data.start()
    codes: dict[int, int] = {}
    for lines, living in _heard(desk, stop):
        over, at_work = False, data.is_alive()
        for row in _taken(rows):
            if isinstance(row, Exception):
                raise row
            over = over or row is None
            codes |= {} if row is None else {row["shard"]: row["code"]}
        if not over and not at_work:
            raise RuntimeError("Ray Data has ended with an error that is none of Ray's; standard error has it")
        done = 0 in codes.values()  # then all rows are; who waits for room or for its node has nothing to do
        if over or ((done or stop.is_set()) and not living):
            lines += _take(desk, True)[0]
            over = True
        for told in lines:
            _tell(wire, **told)
        if over:
            _tell(wire, over=True, codes=list(codes.items()))
            return


def _heard(desk: Any, stop: threading.Event) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """What the desk has, again and again."""
    pause = threading.Event()
    while True:
        yield _take(desk, stop.is_set())
        pause.wait(LOOK_EVERY_S)


def _take(desk: Any, stop: bool) -> tuple[list[dict[str, Any]], int]:
    import ray

    lines, living = ray.get(desk.take.remote(stop))
    return lines, living


def _open_desk(start: Mapping[str, Any]) -> Any:
    """The desk as an actor on this node, which comes back when Ray's memory monitor has ended it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    return ray.remote(Desk).options(**options).remote(start)


def _iterate(asked: Mapping[str, Any], desk: Any, rows: queue.SimpleQueue[Any]) -> None:
    """Ray Data over the shards; puts their rows, then None, or the error that ended it."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    settings = DataContext.get_current()
    settings.enable_progress_bars = False
    settings.print_on_execution_start = False
    settings.execution_no_progress_timeout_s = -1  # a shard may take days, and Ray Data sees none of its rows
    settings.issue_detectors_config.detectors = []
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    count = asked["workers"]
    try:
        shards = ray.data.from_items([{"shard": index} for index in range(count)], override_num_blocks=count)
        answers = shards.map(
            ShardActor,
            fn_constructor_args=(desk,),
            compute=ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=1),
            num_cpus=asked["cpus"],
            num_gpus=asked["gpus"] or None,
        )
        for row in answers.iter_rows():
            rows.put(row)
        rows.put(None)
    except ray.exceptions.RayError as error:
        rows.put(error)


def _taken(rows: queue.SimpleQueue[Any]) -> Iterator[Any]:
    while not rows.empty():
        yield rows.get()


def _listen(stop: threading.Event) -> None:
    sys.stdin.readline()  # `stop`, or the end of the parent
    stop.set()


def _sentence(error: Exception) -> str:
    """The last line of a Ray error, which holds tracebacks of several processes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
