"""What every data source offers: registered files, and chunks of their rows, read again at will."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import pyarrow as pa

    from pipeline.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFile:
    """A file as it is now: its name in the dataset, where it is, and what identifies its content.

    `name` is stable when the dataset is moved or mounted elsewhere (relative to the folder or glob
    root); `path` is a local path or a URL without credentials; `size` is in bytes; `rows` is None
    where counting them needs the whole file; `digest` changes when the content does.
    """

    name: str
    path: str
    size: int
    rows: int | None
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """The rows of a file, and, where rows can be appended to it, a hash of all its bytes (else empty).

    `unfinished` says that the last row has no end and cannot be read, as where a line is half-written.
    """

    rows: int
    content: str = ""
    unfinished: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A registered file: a FoundFile with its rows counted and its ordinal, the position of its registration.

    `content` and `unfinished` are those of Counted. `ends` are the numbers of rows that it had before it was appended
    to, each time: chunks begin there anew, so that those before stay what they were. An unfinished row is a chunk of
    its own, which alone is done again when the row has been continued: `redo` are first row and attempt of Parts that
    were made of half of it.
    """

    ordinal: int
    name: str
    path: str
    size: int
    rows: int
    digest: str
    content: str = ""
    ends: tuple[int, ...] = ()
    unfinished: bool = False
    redo: tuple[tuple[int, str], ...] = ()


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


@dataclass(frozen=True, slots=True)
class Rows:
    """A chunk's rows; what cannot be read of a row is null, and the row has its reason in `errors`.

    A reason names the file, and the line or the column, and holds the text that is there.
    """

    table: pa.Table
    errors: Mapping[int, str] = field(default_factory=dict)


class Source(Protocol):
    """An ordered, re-readable dataset."""

    left: Sequence[str]
    """A sentence for each file that `find` has left for a later run, because it is still being written."""

    refused: Mapping[str, ConfigError]
    """Files, by name, that `find` has come upon once there was a run's first start, and that are none of the run."""

    def find(self) -> Sequence[FoundFile]:
        """The files as they are now, without reading their rows; ConfigError where there are none.

        It is ConfigError too where files do not go together; once the schema is fixed, those that do not fit it are
        `refused` instead, where they can be told from the others.
        """
        ...

    def count(self, found: FoundFile) -> Counted:
        """The rows of a file that has just been found; may read it whole, so asked once, at its registration."""
        ...

    def grown(self, file: SourceFile, found: FoundFile) -> Counted | str:
        """The rows of a registered file that is found otherwise, if it was appended to and all before is as it was.

        An unfinished row may have been continued. The reason where that is not so. May read the file whole.
        """
        ...

    def fix_schema(self, schema: pa.Schema) -> None:
        """Hold to the schema of the run's first start from here on; called before anything is read."""
        ...

    def schema(self) -> pa.Schema:
        """The one schema of all files."""
        ...

    def read(self, file: SourceFile, chunks: Iterable[Chunk]) -> Iterator[Rows]:
        """For each chunk, in that order, its rows; the table's columns are the schema's."""
        ...


def registered(ordinal: int, found: FoundFile, count: Callable[[FoundFile], Counted]) -> SourceFile:
    """A file as it is registered; its rows are counted where finding it did not tell them."""
    counted = Counted(rows=found.rows) if found.rows is not None else count(found)
    return SourceFile(
        ordinal=ordinal,
        name=found.name,
        path=found.path,
        size=found.size,
        digest=found.digest,
        ends=(counted.rows - 1,) if counted.unfinished and counted.rows > 1 else (),
        **asdict(counted),
    )


def unfinished_chunk(file: SourceFile) -> Chunk | None:
    """The chunk of a file's last row, if that has to be done again when it is continued."""
    return Chunk(file_ordinal=file.ordinal, first_row=file.rows - 1, num_rows=1) if file.unfinished else None


def chunks_of(file: SourceFile, chunk_rows: int) -> list[Chunk]:
    """The chunks of a registered file, in row order; `chunk_rows` is fixed at the first run."""
    return [
        Chunk(file_ordinal=file.ordinal, first_row=first, num_rows=min(chunk_rows, end - first))
        for begin, end in pairwise((0, *file.ends, file.rows))
        for first in range(begin, end, chunk_rows)
    ]


def chunks_within(files: Sequence[SourceFile], chunk_rows: int, limit: int | None) -> list[Chunk]:
    """The chunks of all files in row order, up to `data.limit` rows."""
    chunks: list[Chunk] = []
    for chunk in (c for file in files for c in chunks_of(file, chunk_rows)):
        if limit is not None:
            chunk = replace(chunk, num_rows=min(chunk.num_rows, limit))
            limit -= chunk.num_rows
        if chunk.num_rows:
            chunks.append(chunk)
    return chunks
