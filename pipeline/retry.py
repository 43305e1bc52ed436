"""retry=failed: the chunks whose Part has error rows, to be answered again under the run's own settings."""

from __future__ import annotations

from pipeline.errors import ConfigError
from pipeline.job import Job


def look_for_errors(job: Job) -> None:
    """With retry=failed, find the chunks whose Part has errors; until they are done again, they are pending.

    Raises RunFailed on a Part that cannot be read, ConfigError if the file of such a chunk is gone.
    """
    if job.config.retry is None or job.manifest is None:
        return
    committed = job.committed()
    chunks = [chunk for chunk in job.chunks if chunk.id in committed]
    footers = job.sink("").footers(chunk.id for chunk in chunks)
    failed = {chunk: part.attempt for chunk, part in zip(chunks, footers, strict=True) if part.counts.get("error_rows")}
    there = {file.name for file in job.input.found}
    for file in job.files:
        if file.name not in there and any(chunk.file_ordinal == file.ordinal for chunk in failed):
            raise ConfigError(
                f"retry={job.config.retry} needs {file.path} for its error rows, and data.path does not have it any "
                "more; restore the file, or run without retry"
            )
    job.failed |= {chunk.id: attempt for chunk, attempt in failed.items()}
