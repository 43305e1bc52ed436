"""`python -m pipeline.merge [overrides] --rows N [--to FOLDER]`: the Parts of a finished run as fewer, larger files.

Takes the command line of the run. The files hold the same rows in the same order, N in each; they go to merged/ in
the output folder, beside the Parts, which stay what the run knows itself by. A merge made before is replaced. With new
input there are rows to do, and nothing is merged, unless `--registered` leaves that aside.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import config
from pipeline.command import guarded
from pipeline.console import Console
from pipeline.data.files import is_url, local_path
from pipeline.errors import ConfigError
from pipeline.job import Job
from pipeline.output.durable import failing_run
from pipeline.output.sink import part_path
from pipeline.process import ExitCode
from pipeline.settings import RunConfig
from pipeline.versions import open_job

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 16384


def main(arguments: Sequence[str] | None = None) -> int:
    """Merge the run of the given command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, required=True, help="rows in a file")
    parser.add_argument("--to", type=Path, help="folder of the files")
    parser.add_argument("--registered", action="store_true", help="leave aside what came since the run looked")
    parser.add_argument("overrides", nargs="*", help="as for python -m pipeline")
    asked = parser.parse_args(arguments)
    return guarded(
        lambda console, _: merge(config.load_config(asked.overrides), asked.rows, asked.to, console, asked.registered)
    )


def merge(settings: RunConfig, file_rows: int, to: Path | None, console: Console, registered: bool = False) -> ExitCode:
    """Write the files; ConfigError where they cannot go, RunFailed when writing fails, 75 when rows are missing."""
    if file_rows < 1:
        raise ConfigError(f"--rows must be at least 1, got {file_rows}")
    job = open_job(settings, looks_only=registered)
    target = _target(job, to)
    if target.exists() and any(not path.name.startswith("merged-") for path in target.iterdir()):
        raise ConfigError(f"--to {target} holds other files than an earlier merge; name another folder")
    if registered:
        job.keep_to_registered()
    if not job.is_answered():
        console.note(f"{job.output.shown()}: not all rows are done, nothing was merged")
        return ExitCode.NOT_DONE
    made = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    with failing_run(target):
        try:
            made.mkdir(parents=True)
            files = write_merged(_batches(job), made, file_rows)
            _replace(target, made)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    console.result(f"merged     {target} ({job.num_rows:,} rows in {files:,} files)")
    return ExitCode.DONE


def _target(job: Job, to: Path | None) -> Path:
    if to is not None:
        return to.expanduser()
    if is_url(job.config.output.dir):
        raise ConfigError(f"output.dir={job.output.shown()} is no folder here; name one with --to")
    return local_path(job.output.shown()) / "merged"


def write_merged(batches: Iterable[pa.RecordBatch], folder: Path, file_rows: int) -> int:
    """Write batches of one schema to files of so many rows; returns how many files."""
    import pyarrow.parquet as pq

    files, room, writer = 0, 0, None
    for batch in batches:
        first = 0
        while first < batch.num_rows or writer is None:
            if not room or writer is None:
                if writer is not None:
                    writer.close()
                writer = pq.ParquetWriter(folder / f"merged-{files:06d}.parquet", batch.schema, compression="zstd")
                files, room = files + 1, file_rows
            piece = batch.slice(first, room)
            writer.write_batch(piece)
            first, room = first + piece.num_rows, room - piece.num_rows
    if writer is not None:
        writer.close()
    return files


def _batches(job: Job) -> Iterator[pa.RecordBatch]:
    """The rows of all Parts in order, a bounded number at a time; of a run without rows, an empty batch."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for chunk_id in [chunk.id for chunk in job.chunks] or sorted(job.committed()):
        with job.output.open(part_path(chunk_id)) as source, pq.ParquetFile(source) as file:
            for batch in file.iter_batches(BATCH_ROWS):  # whose metadata is the Part's: its counts, its hashes
                yield batch.replace_schema_metadata(file.schema_arrow.metadata)
            if not file.metadata.num_rows:
                yield pa.RecordBatch.from_pylist([], file.schema_arrow)


def _replace(target: Path, made: Path) -> None:
    """Put the new files where the old ones were."""
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex}.old")
    with suppress(FileNotFoundError):
        target.rename(old)
    made.rename(target)
    shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
