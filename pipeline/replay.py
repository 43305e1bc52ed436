"""Some rows of an output answered again, and compared bit for bit with what is in their Parts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import run
from pipeline.claimed import ClaimedChunk
from pipeline.console import Console
from pipeline.data.source import Chunk
from pipeline.errors import Interrupted
from pipeline.findings import Report
from pipeline.job import Job
from pipeline.output.journal import ChunkJournal
from pipeline.output.manifest import diff
from pipeline.output.sink import Sink, part_path
from pipeline.process import Stopping
from pipeline.settings import RunConfig
from pipeline.stats import RunStats

if TYPE_CHECKING:
    from pipeline.core import Completion
    from pipeline.engine.dedup import RequestEngine
    from pipeline.output.store import Store

SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class Sampled:
    """A row that was drawn, as a chunk of its own, and where it is: its chunk and the row in it."""

    row: Chunk
    part: Chunk
    index: int


class Kept(Sink):
    """Keeps what would be committed."""

    def __init__(self) -> None:
        self.tables: dict[str, pa.Table] = {}

    def commit(self, chunk: Chunk, table: pa.Table, counts: Mapping[str, int]) -> bool:
        """Nothing is written."""
        self.tables[chunk.id] = table
        return True


class NoJournal(ChunkJournal):
    """Knows nothing and keeps nothing: every row is answered."""

    def __init__(self) -> None:
        self.found: Mapping[int, Completion] = {}

    def write(self, completions: Mapping[int, Completion]) -> None:
        """Nothing is written."""

    def remove(self) -> None:
        """Nothing is there."""


def replay(
    settings: RunConfig,
    output: Store,
    chunks: Sequence[Chunk],
    count: int,
    seed: int,
    report: Report,
    stopping: Stopping,
) -> None:
    """Answer `count` rows again, with the stored settings on this machine; each difference is a problem of the report.

    Raises ConfigError where model or data are not what they were, or the machine cannot run them.
    """
    job = Job(settings, output, looks_only=True)
    job.keep_to_registered()
    names = {file.name for file in job.input.found}
    here = {file.ordinal for file in job.files if file.name in names}
    sampled = draw([chunk for chunk in chunks if chunk.file_ordinal in here], count, seed)
    again = answer(job, [one.row for one in sampled], report, stopping)
    for one in sampled:
        report.problems += _differences(job, one, again[one.row.id])
    report.notes.append(f"{len(sampled):,} rows were answered again")


def draw(chunks: Sequence[Chunk], count: int, seed: int) -> list[Sampled]:
    """Rows of the chunks, each as likely as any other, in their order."""
    total = sum(chunk.num_rows for chunk in chunks)
    wanted = sorted(random.Random(seed).sample(range(total), min(count, total)))
    sampled: list[Sampled] = []
    before = 0
    rest = iter(wanted)
    position = next(rest, None)
    for chunk in chunks:
        while position is not None and position < before + chunk.num_rows:
            index = position - before
            row = Chunk(file_ordinal=chunk.file_ordinal, first_row=chunk.first_row + index, num_rows=1)
            sampled.append(Sampled(row, chunk, index))
            position = next(rest, None)
        before += chunk.num_rows
    return sampled


def answer(job: Job, rows: Sequence[Chunk], report: Report, stopping: Stopping) -> dict[str, pa.Table]:
    """The rows' results as this machine has them, by the id of their one-row chunk."""
    from pipeline.engine.engine import unfit
    from pipeline.intake import Intake, Preparation
    from pipeline.models.failures import failing_device
    from pipeline.models.runtime import resolve_runtime
    from pipeline.models.tokenizer import Tokenizer
    from pipeline.outlet import Outlet

    assert job.manifest is not None
    config = job.config
    runtime = resolve_runtime(config, job.checkpoint, job.manifest.engine, job.adapter)
    then = {key: value for key, value in job.manifest.fingerprint.items() if key.startswith("resolved.")}
    for line in diff(then, runtime.resolved()):
        report.notes.append(f"answered again with other bits in sight: {line}")
    if not runtime.spec.batch_invariant:
        report.notes.append("rows of this run depend on those computed with them; differences are to be expected")
    tokenizer = Tokenizer(str(job.tokenizer.folder), config.model.trust_remote_code)
    prompts, task = run.make_task(job, tokenizer)
    silent = Console(is_terminal=False)
    kept = Kept()
    with failing_device(runtime):
        engine = run.load_engine(job, runtime, tokenizer, prompts, silent, stopping, RunStats())
        outlet = Outlet(kept, task, job.schema, lambda chunk, counts, journaled: None)
        ready = Preparation(prompts, task, lambda request: unfit(request, engine.plan), engine.plan.max_len)
        with Intake(job.source, job.files, rows, _taken, ready) as intake:
            _pump(engine, intake, outlet, stopping)
        outlet.close()
    return kept.tables


def _taken(chunk: Chunk) -> ClaimedChunk:
    return ClaimedChunk(chunk, NoJournal(), lambda: True)


def _pump(engine: RequestEngine, intake: Any, outlet: Any, stopping: Stopping) -> None:
    while not intake.exhausted or engine.unfinished:
        if stopping():
            raise Interrupted("stopped while rows were answered again")
        prepared = intake.take(0 if engine.unfinished else 0.2)
        if prepared is not None:
            outlet.expect(prepared)
            for request in prepared.requests:
                engine.submit(request)
        outlet.add([polled.completion for polled in engine.poll() if polled.completion is not None])


def _differences(job: Job, one: Sampled, again: pa.Table) -> Iterator[str]:
    """A sentence for each column that came out differently; `repr` tells any two bits of a double apart."""
    names = again.schema.names[again.schema.get_field_index("row_id") :]  # the input's are compared with the input
    then, now = _part_row(job, one, names), again.select(names).to_pylist()[0]
    for name in names:
        if repr(then[name]) != repr(now[name]):
            yield f"row {now['row_id']}: {name} was {_shown(then[name])}, and is {_shown(now[name])} answered again"


def _part_row(job: Job, one: Sampled, names: Sequence[str]) -> dict[str, Any]:
    with job.output.open(part_path(one.part.id)) as source, pq.ParquetFile(source) as file:
        first = 0
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first <= one.index < first + rows:
                row: dict[str, Any] = (
                    file.read_row_group(group, names, use_threads=False).slice(one.index - first, 1).to_pylist()[0]
                )
                return row
            first += rows
    raise AssertionError(f"{one} is in no row group")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
