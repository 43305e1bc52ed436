"""An output held against its input: the files by size and hash, the columns that the Parts keep row by row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.data.open import open_source
from pipeline.data.source import Chunk, SourceFile
from pipeline.errors import ConfigError, RunFailed
from pipeline.findings import Report
from pipeline.output.registration import refused_since
from pipeline.output.sink import part_path
from pipeline.settings import RunConfig

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.data.source import FoundFile, Source
    from pipeline.output.manifest import RunManifest
    from pipeline.output.store import Store


def compare_input(
    output: Store, manifest: RunManifest, settings: RunConfig, chunks: Sequence[Chunk], report: Report
) -> None:
    """Hold the input columns that are in the Parts against the input, file by file."""
    source = open_source(settings.data)
    source.fix_schema(manifest.input_schema)
    try:
        found = {file.name: file for file in source.find()}
    except ConfigError as error:
        report.notes.append(f"the input was not compared: {error}")
        return
    known = {file.name for file in manifest.files}
    report.notes += [*_came_since(manifest, found, source), *source.left]
    report.notes += [refused_since(str(error)) for name, error in source.refused.items() if name not in known]
    for file in manifest.files:
        now = found.get(file.name)
        if file.name in source.refused:
            report.problems.append(f"{file.path} is not the file that was registered: {source.refused[file.name]}")
        elif now is None:
            report.notes.append(f"{file.path} is gone, its rows were not compared with it")
        else:
            mine = [chunk for chunk in chunks if chunk.file_ordinal == file.ordinal and chunk.num_rows]
            try:
                report.problems += _compare_file(output, manifest, source, file, now, mine, report.notes)
            except (ConfigError, RunFailed) as error:
                report.problems.append(f"not all rows could be compared: {error}")


def _compare_file(
    output: Store,
    manifest: RunManifest,
    source: Source,
    file: SourceFile,
    now: FoundFile,
    chunks: Sequence[Chunk],
    notes: list[str],
) -> Iterator[str]:
    """Where a file, or a Part's rows of it, are not what they were; what was appended to it is noted."""
    file = replace(file, path=now.path)
    if (now.size, now.digest) != (file.size, file.digest):
        counted = source.grown(file, now)
        if isinstance(counted, str):
            sizes = f"{now.size} bytes, then {file.size}"
            yield f"{now.path} is not the file that was registered ({sizes}): {counted}"
            return
        notes.append(
            f"{now.path} has {counted.rows - file.rows:,} more rows than are registered; the next run takes them"
        )
    yield from _compare_rows(output, manifest, source, file, chunks)


def _came_since(manifest: RunManifest, found: Mapping[str, FoundFile], source: Source) -> Iterator[str]:
    """New files, which are nothing wrong; those beyond `data.limit` are not wanted."""
    known = {file.name for file in manifest.files}
    new = [file for name, file in found.items() if name not in known]
    limit = manifest.fingerprint.get("data.limit")
    if not new or (limit is not None and sum(file.rows for file in manifest.files) >= limit):
        return
    shown = f"{new[0].path} and {len(new) - 1:,} more files" if len(new) > 1 else new[0].path
    try:
        rows = sum(source.count(file).rows for file in new)
    except ConfigError as error:
        yield f"{shown} came since, and cannot be read yet ({error})"
    else:
        yield f"{shown} came since, with {rows:,} rows; the next run takes them"


def _compare_rows(
    output: Store, manifest: RunManifest, source: Source, file: SourceFile, chunks: Sequence[Chunk]
) -> Iterator[str]:
    kept = manifest.schema.names[: manifest.schema.get_field_index("row_id")]
    if not kept:
        return
    for chunk, rows in zip(chunks, source.read(file, chunks), strict=True):
        part = _kept_columns(output, chunk, kept)
        if part is not None and not _same(part, rows.table.select(kept)):
            yield f"{output.shown(part_path(chunk.id))} holds other rows than {file.path} has there"


def _kept_columns(output: Store, chunk: Chunk, kept: Sequence[str]) -> pa.Table | None:
    """None for a Part that cannot be read, which has been told."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with output.open(part_path(chunk.id)) as source, pq.ParquetFile(source) as file:
            return file.read(list(kept), use_threads=False)
    except (pa.ArrowException, OSError, ValueError):
        return None


def _same(one: pa.Table, other: pa.Table) -> bool:
    """Whether two tables have the same values; NaN is the same as NaN."""
    one = one.replace_schema_metadata(None)
    if one.schema.names != other.schema.names or one.num_rows != other.num_rows:
        return False
    return bool(one.equals(other)) or repr(one.to_pylist()) == repr(other.to_pylist())
