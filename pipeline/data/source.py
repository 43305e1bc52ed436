"""What every data source offers: registered files, and chunks of their rows, read again at will."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import pyarrow as pa


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFile:
    """A file as it is now: its name in the dataset, where it is, and what identifies its content.

    `name` is stable when the dataset is moved or mounted elsewhere (relative to the folder or glob
    root); `size` is in bytes; `digest` changes when the content does.
    """

    name: str
    path: str
    size: int
    rows: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A registered file: a FoundFile with its ordinal, the position of its registration in run.json."""

    ordinal: int
    name: str
    path: str
    size: int
    rows: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Chunk:
    """A contiguous range of rows of one file: the unit of work, of commit and of resume."""

    file_ordinal: int
    first_row: int
    num_rows: int

    @property
    def id(self) -> str:
        """File ordinal and first row, zero-padded so that names sort in row order."""
        return f"{self.file_ordinal:06d}-{self.first_row:012d}"

    def row_id(self, index: int) -> str:
        """The `row_id` of row `index` of this chunk: the same form, with the row's own position."""
        return f"{self.file_ordinal:06d}-{self.first_row + index:012d}"


class Source(Protocol):
    """An ordered, re-readable dataset.

    `find` looks at the files without reading rows; `schema` is the one schema of all of them;
    `read` yields, for each chunk asked for, in that order, its rows as one table whose column
    order is the schema's.
    """

    def find(self) -> Sequence[FoundFile]: ...

    def schema(self) -> pa.Schema: ...

    def read(self, file: SourceFile, chunks: Iterable[Chunk]) -> Iterator[pa.Table]: ...


def chunks_of(file: SourceFile, chunk_rows: int) -> list[Chunk]:
    """The chunks of a registered file, in row order; `chunk_rows` is fixed at the first run."""
    starts = range(0, file.rows, chunk_rows)
    return [
        Chunk(file_ordinal=file.ordinal, first_row=first, num_rows=min(chunk_rows, file.rows - first))
        for first in starts
    ]
