"""The pipeline without a model: rows per second Parquet to Parquet, tokenization included, and memory.

An engine that echoes takes the model's place behind the same interface, so that what is measured is
reading, prompts, tokenization, scheduling, detokenization and exactly-once writing. Beside it, in the
same run, the tokenizer library alone on the same texts. The last line is one JSON document.

    python scripts/bench_pipeline.py --rows 1000000
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import tempfile
import time
from collections import deque
from pathlib import Path

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
from pipeline.run import Shift, make_task
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


def write_input(path: Path, rows: int, seed: int = 0) -> None:
    """Rows of about 60 tokens of the shipped tokenizer, in row groups of 100,000."""
    rng = random.Random(seed)
    with pq.ParquetWriter(path, pa.schema([("id", pa.int64()), ("text", pa.string())])) as writer:
        for first in range(0, rows, 100_000):
            ids = range(first, min(rows, first + 100_000))
            texts = [" ".join(rng.choices(WORDS, k=rng.randint(30, 50))) + f" {i}" for i in ids]
            writer.write_table(pa.table({"id": list(ids), "text": texts}))


def run_pipeline(path: Path, output: Path) -> tuple[float, int]:
    """Seconds for the whole dataset and the largest resident memory in bytes while it ran."""
    config = load_config([f"data.path={path}", f"output.dir={output}", "task.prompt='{{ text }}'", "task.chat=false"])
    job = Job(config)
    tokenizer = Tokenizer(str(job.tokenizer.folder))
    prompts, task = make_task(job, tokenizer)
    process, peak = psutil.Process(), 0
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
        shift = Shift(job, claims, sink, engine, task, prompts, RunStats(), recorder, progress, watch)  # type: ignore[arg-type]
        shift.work(job.pending())
    return time.perf_counter() - started, peak


def run_tokenizer(path: Path) -> float:
    """Seconds that tokenizers' encode_batch_fast takes for the same texts, in batches of a chunk."""
    backend = Tokenizer("pipeline/assets/tiny")._backend
    seconds = 0.0
    for batch in pq.ParquetFile(path).iter_batches(batch_size=4096, columns=["text"]):
        texts = batch.column(0).to_pylist()
        started = time.perf_counter()
        backend.encode_batch_fast(texts)
        seconds += time.perf_counter() - started
    return seconds


def main() -> None:
    """Measure a small run for the memory's baseline, then the tokenizer alone, then the whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--baseline-rows", type=int, default=10_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder, "small.parquet"), Path(folder, "large.parquet")
        write_input(small, arguments.baseline_rows)
        write_input(large, arguments.rows)
        _, small_peak = run_pipeline(small, Path(folder, "small"))
        tokenizer_s = run_tokenizer(large)
        pipeline_s, large_peak = run_pipeline(large, Path(folder, "large"))
        tokens = sum(pq.read_table(Path(folder, "large", "results"), columns=["prompt_tokens"])[0].to_pylist())
    print(
        json.dumps(
            {
                "command": f"python scripts/bench_pipeline.py --rows {arguments.rows}",
                "date": time.strftime("%Y-%m-%d"),
                "rows": arguments.rows,
                "tokens_per_row": round(tokens / arguments.rows, 1),
                "pipeline_rows_per_s": round(arguments.rows / pipeline_s),
                "encode_batch_fast_rows_per_s": round(arguments.rows / tokenizer_s),
                "ratio": round(tokenizer_s / pipeline_s, 3),
                "peak_rss_mib": round(large_peak / 2**20),
                "growth_mib_over_baseline": round((large_peak - small_peak) / 2**20),
                "baseline_rows": arguments.baseline_rows,
                "machine": f"{platform.machine()}, {psutil.cpu_count()} cores",
                "versions": fingerprint.versions(),
            }
        )
    )


if __name__ == "__main__":
    main()
