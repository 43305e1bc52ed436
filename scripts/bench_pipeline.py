"""The pipeline without a model: rows per second to Parquet, tokenization included, and memory.

An engine that echoes takes the model's place behind the same interface, so that what is measured is
reading, prompts, tokenization, scheduling, detokenization and exactly-once writing, once from Parquet and
once from JSON lines. Beside it, in the same run, the tokenizer library alone on the same texts. Every
measurement is made in a process of its own. The last line is one JSON document.

    python scripts/bench_pipeline.py --rows 1000000
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import random
import re
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import fingerprint
from pipeline.config import load_config
from pipeline.console import Console
from pipeline.core import Completion, FinishReason, Request
from pipeline.engine.engine import EngineCounters, Output
from pipeline.engine.plan import EnginePlan, LengthClass
from pipeline.job import Job
from pipeline.models.tokenizer import Tokenizer
from pipeline.run import make_task
from pipeline.shift import Shift
from pipeline.stats import IntervalRecorder, RunStats

WORDS = re.findall(
    r"\w+",
    """the a my your order invoice parcel screen account password week month button device answer refund please cannot
    still since yesterday again really support team address number wrong slow late open close change cancel""",
)
PLAN = EnginePlan(
    length_classes=(LengthClass(slots=512, max_len=1024),), prefill_tokens=(1024,), logit_rows=256,
    vocab=2048, kv_bytes=0,
)  # fmt: skip
ANSWER_TOKENS = 8


class EchoEngine:
    """Answers every request at once with its first tokens."""

    plan = PLAN

    def __init__(self) -> None:
        self.counters = EngineCounters()
        self._queue: deque[Request] = deque()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    unfinished = waiting

    def submit(self, request: Request) -> None:
        self._queue.append(request)

    def poll(self) -> list[Output]:
        return [self._answer(self._queue.popleft()) for _ in range(min(512, len(self._queue)))]

    def _answer(self, request: Request) -> Output:
        ids = request.prompt_ids[1 : 1 + ANSWER_TOKENS]
        completion = Completion(
            request_id=request.id,
            prompt_tokens=len(request.prompt_ids),
            finish_reason=FinishReason.LENGTH,
            token_ids=ids,
            cumulative_logprob=0.0,
        )
        return Output(request.id, 0, ids, completion)


def write_input(folder: Path, rows: int, seed: int = 0) -> None:
    """Rows of about 60 tokens of the shipped tokenizer, as Parquet in row groups of 100,000 and as JSON lines."""
    rng = random.Random(seed)
    folder.mkdir()
    schema = pa.schema([("id", pa.int64()), ("text", pa.string())])
    with pq.ParquetWriter(folder / "rows.parquet", schema) as writer, (folder / "rows.jsonl").open("w") as lines:
        for first in range(0, rows, 100_000):
            ids = range(first, min(rows, first + 100_000))
            texts = [" ".join(rng.choices(WORDS, k=rng.randint(43, 63))) + f" {i}" for i in ids]
            writer.write_table(pa.table({"id": list(ids), "text": texts}))
            lines.writelines(json.dumps({"id": i, "text": text}) + "\n" for i, text in zip(ids, texts, strict=True))


def run_pipeline(folder: Path, kind: str) -> tuple[float, int, int]:
    """Seconds for the whole dataset, the largest resident memory in bytes while it ran, and its prompt tokens."""
    where = [f"data={kind}", f"data.path={folder}/rows.{kind}", f"output.dir={folder}/{kind}"]
    config = load_config([*where, "task.prompt='{{ text }}'", "task.chat=false"])
    job = Job(config)
    tokenizer = Tokenizer(str(job.tokenizer.folder))
    prompts, task = make_task(job, tokenizer)
    stats, process, peak = RunStats(), psutil.Process(), 0
    started = time.perf_counter()
    with job.output.claims() as claims, Console(is_terminal=False).rows(job.num_rows, 0) as progress:
        job.start(claims, {}, PLAN.as_dict(), {})
        sink = job.sink(claims.attempt)
        recorder = IntervalRecorder("bench", claims.attempt)

        def watch() -> bool:
            nonlocal peak
            peak = max(peak, process.memory_info().rss)
            return False

        engine = EchoEngine()
        journal = job.journal(claims.attempt)
        shift = Shift(job, claims, sink, journal, engine, task, prompts, stats, recorder, progress, watch)  # type: ignore[arg-type]
        shift.work(job.pending())
    return time.perf_counter() - started, peak, stats.prompt_tokens


def run_tokenizer(folder: Path) -> float:
    """Seconds that tokenizers' encode_batch_fast takes for the same texts, in batches of a chunk."""
    backend = Tokenizer("pipeline/assets/tiny")._backend
    seconds = 0.0
    for batch in pq.ParquetFile(folder / "rows.parquet").iter_batches(batch_size=4096, columns=["text"]):
        texts = batch.column(0).to_pylist()
        started = time.perf_counter()
        backend.encode_batch_fast(texts)
        seconds += time.perf_counter() - started
    return seconds


def apart(measure: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives in a process of its own, whose memory nothing else has been in."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def measure(small: Path, large: Path, rows: int, kind: str, tokenizer_s: float) -> dict[str, Any]:
    """One kind of input: rates, and memory beside that of a small run."""
    _, small_peak, _ = apart(run_pipeline, small, kind)
    pipeline_s, large_peak, tokens = apart(run_pipeline, large, kind)
    return {
        "tokens_per_row": round(tokens / rows, 1),
        "pipeline_rows_per_s": round(rows / pipeline_s),
        "ratio": round(tokenizer_s / pipeline_s, 3),
        "peak_rss_mib": round(large_peak / 2**20),
        "growth_mib_over_baseline": round((large_peak - small_peak) / 2**20),
    }


def main() -> None:
    """Measure the tokenizer alone, then each kind of input with few rows and with all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--baseline-rows", type=int, default=10_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder, "small"), Path(folder, "large")
        write_input(small, arguments.baseline_rows)
        write_input(large, arguments.rows)
        load = psutil.getloadavg()[0]
        tokenizer_s = apart(run_tokenizer, large)
        kinds = {kind: measure(small, large, arguments.rows, kind, tokenizer_s) for kind in ("parquet", "jsonl")}
    print(
        json.dumps(
            {
                "command": f"python scripts/bench_pipeline.py --rows {arguments.rows}",
                "date": time.strftime("%Y-%m-%d"),
                "rows": arguments.rows,
                "encode_batch_fast_rows_per_s": round(arguments.rows / tokenizer_s),
                **kinds,
                "baseline_rows": arguments.baseline_rows,
                "machine": f"{platform.machine()}, {psutil.cpu_count()} cores, load {load:.1f} before",
                "versions": fingerprint.versions(),
            }
        )
    )


if __name__ == "__main__":
    main()
