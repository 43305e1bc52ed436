"""A Part read to its end and held against what it must be: whole, of the run's schema, with its chunk's rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core import FinishReason
from pipeline.errors import RunFailed
from pipeline.output.part import ATTEMPT_KEY, COUNTS_KEY
from pipeline.output.seal import PAGES_KEY, footer_of, is_as_sealed, pages_digest
from pipeline.output.sink import part_path
from pipeline.output.store import StoreError

if TYPE_CHECKING:
    from typing import BinaryIO

    from pipeline.data.source import Chunk
    from pipeline.output.store import Store

BATCH_ROWS = 8192
_ARROW_KEY = "ARROW:schema"
"""Where pyarrow keeps the schema in its own words."""


@dataclass(slots=True)
class Inspected:
    """What a Part's rows come to, as counted now, and what is wrong with it, a sentence each.

    `is_read` says that its rows could be read, and are as many as its chunk has.
    """

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    is_read: bool = False


def inspect_part(store: Store, schema: pa.Schema, chunk: Chunk) -> Inspected:
    """Read the Part of a chunk in bounded memory, page checksums included.

    `schema` is that of the run's Parts, with the metadata that names the run. Raises RunFailed only where the store
    cannot be reached.
    """
    found, shown = Inspected(), store.shown(part_path(chunk.id))
    try:
        with store.open(part_path(chunk.id)) as source:
            _inspect(source, schema, chunk, found)
    except StoreError as error:
        raise RunFailed(f"{shown} could not be read ({error}); run the same command again") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        found.problems.append(f"cannot be read ({str(error).partition(chr(10))[0] or type(error).__name__})")
    found.problems = [f"{shown}: {problem}" for problem in found.problems]
    return found


def _inspect(source: BinaryIO, schema: pa.Schema, chunk: Chunk, found: Inspected) -> None:
    """The same of an open Part; by a damaged footer nothing is read, since nobody knows what would come of it."""
    footer = footer_of(source)
    sealed = is_as_sealed(footer)
    if sealed is False:
        found.problems.append(
            "has another footer than was committed (by the hash in it), so that its rows are not read"
        )
        return
    with pq.ParquetFile(source, page_checksum_verification=True) as file:
        found.problems += _described(file, schema, chunk)
        if sealed is None:
            found.problems += _named(schema, file.metadata.metadata)
        found.problems += _hashed(source, footer, file.metadata.metadata)
        if file.schema_arrow.equals(schema):
            found.problems += _rows(file, chunk, found.counts)
            found.problems += _counted(file.schema_arrow.metadata or {}, file.metadata.metadata, found.counts)
            found.is_read = found.counts["rows"] == chunk.num_rows


def _described(file: pq.ParquetFile, schema: pa.Schema, chunk: Chunk) -> Iterator[str]:
    """What the footer says that it should not say."""
    metadata = file.metadata
    groups = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    if metadata.num_rows != chunk.num_rows or sum(groups) != metadata.num_rows:
        yield f"holds {metadata.num_rows} rows in row groups of {groups}, and its chunk has {chunk.num_rows}"
    if any(not rows for rows in groups) and chunk.num_rows:
        yield f"has an empty row group (of {groups} rows)"
    if not file.schema_arrow.equals(schema):
        yield f"has the columns {_listed(file.schema_arrow)}, and those of run.json are {_listed(schema)}"
    said = file.schema_arrow.metadata or {}
    for key, value in (schema.metadata or {}).items():
        if said.get(key) != value:
            yield f"says {key.decode()}={_text(said.get(key))}, and run.json has {value.decode()}"


def _named(schema: pa.Schema, said: Mapping[bytes, bytes] | None) -> Iterator[str]:
    """What a footer without hash, as older versions wrote it, says more than they did: a key that was damaged."""
    known = {key.encode() for key in (_ARROW_KEY, COUNTS_KEY, ATTEMPT_KEY, PAGES_KEY)} | (schema.metadata or {}).keys()
    for key in sorted((said or {}).keys() - known):
        yield f"has {_text(key)} in its footer, which is nothing that a Part says"


def _hashed(source: BinaryIO, footer: bytes, said: Mapping[bytes, bytes] | None) -> Iterator[str]:
    """Where the bytes of the pages are not those that were committed; Parts of older versions do not say."""
    digest = (said or {}).get(PAGES_KEY.encode())
    if digest is not None and digest.decode("utf-8", "replace") != pages_digest(source, footer):
        yield "has other bytes than were committed (by their hash in its footer)"


def _rows(file: pq.ParquetFile, chunk: Chunk, counts: Counter[str]) -> Iterator[str]:
    """What is wrong with the rows, the first of each kind; adds to `counts`."""
    first, wrong = 0, dict[str, str]()
    for batch in file.iter_batches(BATCH_ROWS, use_threads=False):
        batch.validate(full=True)
        counts.update(_sums(batch))
        ids = batch.column("row_id").to_pylist()
        expected = [chunk.row_id(index) for index in range(first, first + batch.num_rows)]
        if ids != expected:
            at = next(i for i, pair in enumerate(zip(ids, expected, strict=True)) if pair[0] != pair[1])
            wrong.setdefault("id", f"row {first + at} is {ids[at]}, and should be {expected[at]}")
        wrong = dict(_ended(batch, first)) | wrong
        first += batch.num_rows
    yield from wrong.values()


def _ended(batch: pa.RecordBatch, first: int) -> Iterator[tuple[str, str]]:
    """Rows whose finish_reason is none, or does not go with their error."""
    reasons = batch.column("finish_reason").to_pylist()
    errors = batch.column("error").is_valid().to_pylist()
    for index, (reason, is_error) in enumerate(zip(reasons, errors, strict=True), first):
        if reason not in tuple(FinishReason):
            yield "reason", f"row {index} has the finish_reason {reason}"
        elif (reason == FinishReason.ERROR) != is_error:
            yield "error", f"row {index} has the finish_reason {reason} {'with' if is_error else 'without'} an error"


def _sums(batch: pa.RecordBatch) -> dict[str, int]:
    """The counts that a Part is committed with, from its rows."""
    counts = {
        "rows": batch.num_rows,
        "error_rows": batch.num_rows - batch.column("error").null_count,
        "prompt_tokens": _sum(batch.column("prompt_tokens")),
        "completion_tokens": _sum(batch.column("completion_tokens")),
        "target_tokens": _sum(batch.column("target_tokens")) if "target_tokens" in batch.schema.names else 0,
    }
    if "choices" in batch.schema.names:  # all answers, of which the column before has the first one's
        choices = batch.column("choices")
        counts["completion_tokens"] += _sum(pc.list_flatten(choices).field("completion_tokens"))
        counts["completion_tokens"] -= _sum(batch.column("completion_tokens").filter(choices.is_valid()))
    return counts


def _counted(said: Mapping[bytes, bytes], more: Mapping[bytes, bytes] | None, counts: Counter[str]) -> Iterator[str]:
    """Where the counts in the footer are not those of the rows."""
    text = {**said, **(more or {})}.get(COUNTS_KEY.encode())
    if text is None:
        yield "does not say what was counted when it was committed"
        return
    committed: dict[str, Any] = json.loads(text)
    for key, value in committed.items():
        if key in counts and value != counts[key]:
            yield f"was committed with {key}={value}, and has {counts[key]} now"


def _sum(column: pa.Array) -> int:
    return int(pc.sum(column).as_py() or 0)


def _listed(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def _text(value: bytes | None) -> str:
    return "nothing" if value is None else value.decode("utf-8", "replace")
