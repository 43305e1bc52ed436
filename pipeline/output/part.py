"""A committed Part as it is read again: what its footer says, and its rows, for those that are to be done again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import RunFailed
from pipeline.output.durable import failing_run
from pipeline.output.seal import MAGIC, footer_of, is_as_sealed
from pipeline.output.store import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pipeline.output.store import Store

COUNTS_KEY = "pipeline.counts"
ATTEMPT_KEY = "pipeline.attempt"


@dataclass(frozen=True, slots=True)
class Footer:
    """What a Part says of itself: the counts of its rows, and the attempt that wrote it."""

    counts: Mapping[str, int]
    attempt: str


def read_footer(store: Store, expected: Mapping[bytes, bytes], name: str) -> Footer:
    """The footer of a Part; RunFailed if it is unreadable, damaged, or not `expected` by the schema's metadata."""
    shown = store.shown(name)
    try:
        with store.open(name) as file:
            said = footer_of(file)
        if is_as_sealed(said) is False:
            raise ValueError("its footer is damaged")
        metadata = pq.read_metadata(pa.BufferReader(MAGIC + said)).metadata or {}
        footer = Footer(json.loads(metadata[COUNTS_KEY.encode()]), metadata[ATTEMPT_KEY.encode()].decode())
    except StoreError as error:
        raise RunFailed(f"{shown} could not be read ({error}); run the same command again") from error
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise RunFailed(
            f"{shown} is not a Part that this pipeline committed ({error!r}); remove it to have its rows done again"
        ) from error
    if any(metadata.get(key) != value for key, value in expected.items()):
        raise RunFailed(
            f"{shown} was made by another run than run.json tells of (its metadata names another run or other "
            "settings); remove it to have its rows done again"
        )
    return footer


def rows_of(table: pa.Table, rows: Sequence[int]) -> pa.Table:
    """Some rows of a table; of any size, which `take` is not."""
    return pa.concat_tables([table.slice(0, 0), *(table.slice(row, 1) for row in rows)])


@dataclass(frozen=True)
class CommittedPart:
    """A Part whose error rows are to be done again."""

    table: pa.Table
    counts: Mapping[str, int]
    attempt: str

    @cached_property
    def failed(self) -> Sequence[int]:
        """The error rows, by their index in the chunk."""
        is_error = pc.equal(self.table["finish_reason"], "error")
        indices: list[int] = pc.indices_nonzero(is_error).to_pylist()
        return indices

    @cached_property
    def failed_rows(self) -> pa.Table:
        """The error rows as they are."""
        return rows_of(self.table, self.failed)

    def with_rows(self, rows: pa.Table) -> pa.Table:
        """The Part's rows in their order, with `rows` in the place of the error rows; all others as they were."""
        return pa.concat_tables(self._pieces(rows))

    def _pieces(self, rows: pa.Table) -> Iterator[pa.Table]:
        after = 0
        for position, row in enumerate(self.failed):
            yield self.table.slice(after, row - after)
            yield rows.slice(position, 1)
            after = row + 1
        yield self.table.slice(after)


def read_part(store: Store, footer: Footer, schema: pa.Schema, name: str) -> CommittedPart:
    """A Part whose footer has just been read; RunFailed if its rows cannot be."""
    with failing_run(store.shown(name)):
        try:
            with store.open(name) as file:
                table = pq.read_table(file)
        except pa.ArrowException as error:
            raise RunFailed(
                f"{store.shown(name)} is damaged ({error}); remove it to have its rows done again"
            ) from error
    return CommittedPart(table.select(schema.names).cast(schema), footer.counts, footer.attempt)
