"""RunStats: what a process did and how fast, in Parquet; one row per process and one per engine interval."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from io import BytesIO
from typing import TYPE_CHECKING, Any

from pipeline.output.durable import failing_run
from pipeline.output.store import STATS

if TYPE_CHECKING:
    from pipeline.engine.engine import EngineCounters
    from pipeline.output.store import Store

INTERVAL_S = 1.0
MOST_INTERVALS = 7200
"""Of a process that works longer, two intervals each become one, and those that come are twice as long."""
_NAME_TIME = "%Y%m%dT%H%M%S%f"


@dataclass(slots=True, kw_only=True)
class RunStats:
    """One process's work. Seconds are wall-clock; tokens are counted where the work was done.

    `job` and `restarts` are Slurm's, where there is one.

    From the creation of the process it takes `start_s` until its command line is understood and `first_answer_s` to
    the first rows that the engine answers; `load_s` of that are the weights.
    `generate_s` is from the first request ready to the last completion; `prefill_s` and `decode_s`
    are the parts of it spent in passes; `padded_tokens` are positions of static shapes that held no
    row's token. `prefilled_tokens` are prompt tokens that were run for a row, `prefix_tokens` those of
    shared beginnings, each run once: fewer than `prompt_tokens` together where rows share. `shapes` are the static
    shapes there are, `graphs` the decode shapes that were captured, `eager` why others were not. Rates are
    per second of `generate_s`, over prompt and completion tokens and those of
    targets behind a prompt.

    Rows and tokens are those of the chunks that the process committed, so that processes add up to the
    whole. Of these an earlier process had computed `journaled_rows`, with `journaled_tokens` of all kinds,
    and left them in the journal; rates are without them.
    """

    run_id: str = ""
    attempt: str = ""
    job: str = ""
    restarts: int = 0
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    rows: int = 0
    error_rows: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    target_tokens: int = 0
    journaled_rows: int = 0
    journaled_tokens: int = 0
    prefilled_tokens: int = 0
    prefix_tokens: int = 0
    padded_tokens: int = 0
    prefill_passes: int = 0
    decode_steps: int = 0
    shapes: int = 0
    graphs: int = 0
    eager: str = ""
    start_s: float = 0.0
    load_s: float = 0.0
    first_answer_s: float = 0.0
    generate_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    wall_s: float = 0.0
    rows_per_s: float = 0.0
    tokens_per_s: float = 0.0
    weight_bytes: int = 0
    quantized_bytes: int = 0
    dequantized_bytes: int = 0
    kv_cache_bytes: int = 0
    peak_memory_bytes: int = 0
    kernel: str = ""
    attention: str = ""
    dtype: str = ""
    device: str = ""
    quantization: str = ""
    adapter: str = ""
    versions: str = ""
    config: str = ""

    def finish(self, wall_s: float) -> None:
        """Set the rates."""
        self.wall_s = wall_s
        if self.generate_s > 0:
            self.rows_per_s = (self.rows - self.journaled_rows) / self.generate_s
            tokens = self.prompt_tokens + self.completion_tokens + self.target_tokens
            self.tokens_per_s = (tokens - self.journaled_tokens) / self.generate_s


def process_age_s() -> float:
    """Seconds since this process was created."""
    import psutil

    return time.time() - float(psutil.Process().create_time())


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """The engine's work between two moments at least a second apart."""

    run_id: str
    attempt: str
    ended_at: datetime
    seconds: float
    rows: int
    running: int
    waiting: int
    prompt_tokens: int
    prefix_tokens: int
    completion_tokens: int
    padded_tokens: int
    prefill_passes: int
    decode_steps: int
    graphs: int
    prefill_s: float
    decode_s: float


class IntervalRecorder:
    """Cuts the engine's counters into intervals."""

    def __init__(self, run_id: str, attempt: str) -> None:
        self.intervals: list[Interval] = []
        self._run_id, self._attempt = run_id, attempt
        self._interval_s = INTERVAL_S
        self._since = time.perf_counter()
        self._before: dict[str, Any] = {}
        self._rows = 0

    def tick(self, counters: EngineCounters, rows: int, running: int, waiting: int, *, last: bool = False) -> None:
        """Note the counters; a row is added when an interval has passed, or at the end."""
        now = time.perf_counter()
        if now - self._since < self._interval_s and not last:
            return
        current = asdict(counters)
        done = {key: value - self._before.get(key, 0) for key, value in current.items()}
        self.intervals.append(
            Interval(
                run_id=self._run_id,
                attempt=self._attempt,
                ended_at=datetime.now(UTC),
                seconds=now - self._since,
                rows=rows - self._rows,
                running=running,
                waiting=waiting,
                **done,
            )
        )
        self._since, self._before, self._rows = now, current, rows
        if len(self.intervals) >= MOST_INTERVALS:
            pairs = zip(self.intervals[::2], self.intervals[1::2], strict=True)
            self.intervals = [_joined(first, second) for first, second in pairs]
            self._interval_s *= 2


def _joined(first: Interval, second: Interval) -> Interval:
    """Two intervals as one, which ends as the second does."""
    state = ("run_id", "attempt", "ended_at", "running", "waiting")
    sums = {f.name: getattr(first, f.name) + getattr(second, f.name) for f in fields(first) if f.name not in state}
    return replace(second, **sums)


def write_stats(store: Store, stats: RunStats, intervals: list[Interval]) -> None:
    """Write run-<id>.parquet and intervals-<id>.parquet for this process; RunFailed when that fails."""
    name = f"{stats.started_at:{_NAME_TIME}}-{stats.attempt[:8] or uuid.uuid4().hex[:8]}"
    _write(store, f"{STATS}/run-{name}.parquet", [asdict(stats)], [asdict(stats)])
    empty = Interval(
        run_id="", attempt="", ended_at=stats.started_at, seconds=0.0, rows=0, running=0, waiting=0, prompt_tokens=0,
        prefix_tokens=0, completion_tokens=0, padded_tokens=0, prefill_passes=0, decode_steps=0, graphs=0,
        prefill_s=0.0, decode_s=0.0,
    )  # fmt: skip
    _write(store, f"{STATS}/intervals-{name}.parquet", [asdict(i) for i in intervals], [asdict(empty)])


def last_stats(store: Store) -> tuple[str, dict[str, Any], int] | None:
    """The file of the last process that has left its stats, what it says, and of how many processes there are stats."""
    names = _run_files(store)
    return (names[-1], _read(store, names[-1]), len(names)) if names else None


def stats_since(store: Store, since: datetime) -> list[dict[str, Any]]:
    """What the processes that began at or after a time have left, the first one first."""
    first = f"{STATS}/run-{since:{_NAME_TIME}}"
    return [_read(store, name) for name in _run_files(store) if name >= first]


def all_stats(store: Store, most: int) -> tuple[list[dict[str, Any]], int]:
    """What the latest processes have left, the first one first, and of how many more there are stats."""
    names = _run_files(store)
    with ThreadPoolExecutor(store.reads_at_once) as pool:
        return list(pool.map(lambda name: _read(store, name), names[-most:])), max(0, len(names) - most)


def _run_files(store: Store) -> list[str]:
    names = [name for name in store.names(STATS) if name.startswith("run-") and name.endswith(".parquet")]
    return [f"{STATS}/{name}" for name in sorted(names)]


def _read(store: Store, name: str) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # From a buffer, without threads: an Arrow thread that lets go of a Python file while the interpreter is ending
    # ends the process with SIGABRT, and these are often the last files that are read.
    with pq.ParquetFile(pa.BufferReader(store.read(name))) as file:
        values: dict[str, Any] = file.read(use_threads=False).to_pylist()[0]
    return values


def together(processes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows, tokens and rates of processes that worked at the same time, by the seconds of the longest."""
    kinds = ("prompt_tokens", "completion_tokens", "target_tokens")
    counted = ("rows", *kinds, "journaled_rows", "journaled_tokens")
    total: dict[str, Any] = {key: sum(one.get(key, 0) for one in processes) for key in counted}
    total |= {key: max(one[key] for one in processes) for key in ("generate_s", "load_s")}
    seconds = max(total["generate_s"], 1e-9)
    rows = total["rows"] - total["journaled_rows"]
    tokens = sum(total[key] for key in kinds) - total["journaled_tokens"]
    return total | {"rows_per_s": rows / seconds, "tokens_per_s": tokens / seconds}


def _write(store: Store, name: str, rows: list[dict[str, Any]], like: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.Table.from_pylist(like).schema), file)
    with failing_run(store.shown(name)):
        store.replace(name, file.getvalue())


def with_identity(
    stats: RunStats, *, run_id: str, attempt: str, resolved: Mapping[str, Any], config: Mapping[str, Any],
    versions: Mapping[str, str],
) -> RunStats:  # fmt: skip
    """The stats with what ran: kernel, dtype, device, versions and configuration."""
    return replace(
        stats,
        run_id=run_id,
        attempt=attempt,
        kernel=resolved["resolved.kernel"],
        attention=resolved["resolved.attention"],
        dtype=resolved["resolved.dtype"],
        device=resolved["resolved.device"],
        quantization=resolved["resolved.quantization"],
        adapter=resolved.get("resolved.adapter", ""),
        versions=json.dumps(dict(versions), sort_keys=True),
        config=json.dumps(config, sort_keys=True, default=str),
    )
