"""JSON lines as a Source: one object a line, plain or compressed; a line that is no row becomes an error row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.data.files import FileKind, Located, edge_digests, locate, reaching
from pipeline.data.json_rows import RowParser
from pipeline.data.json_values import MAX_KEYS, SeenTypes, Unfit, parse_object, shown
from pipeline.data.lines import Line, LineIndex, LineReader, LongLine, compression_of
from pipeline.data.prefix import HashedFile, Prefix
from pipeline.data.schemas import checked_columns, listed
from pipeline.data.source import Chunk, Counted, FoundFile, Rows, SourceFile
from pipeline.errors import ConfigError, RunFailed

JSONL = FileKind("JSON lines", tuple(s + c for s in (".jsonl", ".ndjson", ".json") for c in ("", ".gz", ".zst")))
SAMPLE_ROWS = 10_000
"""Rows that the schema is made from, shared evenly among the files, at least one of each."""
_SAMPLE_BYTES = 64 * 2**20


class JsonlSource:
    """The rows of a file, a folder, a glob, or a list of these; see docs/data.md for what a row is.

    The schema is made from the first rows of every file at the run's first start and then fixed. With
    `columns` only these keys are looked at; without, a key that the schema lacks makes an error row.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        columns: Sequence[str] | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep the settings; nothing is read."""
        self._path = path
        self._columns = checked_columns(columns)
        self._storage_options = storage_options or {}
        self._schema: pa.Schema | None = None
        self.left: Sequence[str] = ()
        self.refused: Mapping[str, ConfigError] = {}
        self._files: dict[str, Located] = {}
        self._indexes: dict[str, LineIndex] = {}

    def find(self) -> list[FoundFile]:
        """All files sorted by name, from their sizes, first and last 64 KiB; rows are not counted."""
        located = locate(self._path, JSONL, self._storage_options)
        sizes = {path: file.size for path, file in self._files.items()}
        self._indexes = {file.path: self._indexes[file.path] for file in located if file.path in self._indexes
                         and sizes.get(file.path) == file.size}  # fmt: skip
        self._files = {file.path: file for file in located}
        return [
            FoundFile(name=file.name, path=file.path, size=file.size, rows=None, digest=digest)
            for file, digest in zip(located, edge_digests(located), strict=True)
        ]

    def count(self, found: FoundFile) -> Counted:
        """Lines that are not blank; reads the file once, and remembers where its lines are."""
        with reaching(found.path):
            return self._count(found)[0]

    def grown(self, file: SourceFile, found: FoundFile) -> Counted | str:
        """The rows of a file to which whole lines were appended; reads it once, also what was known of it."""
        if found.size <= file.size:
            return "it is not longer than it was"
        with reaching(found.path):
            if not self._begins_as(file, self._files[found.path]):
                return "what is at its beginning, or was at its end, is there no more"
            counted, before = self._count(found, mark=file.size)
            if file.content and before != file.content:
                return f"its first {file.size:,} bytes are others than they were"
            if counted.rows >= file.rows and (file.unfinished or self._last_row_stays(file, found.size)):
                return counted
        return "its last line had no end and has been continued; append whole lines"

    def fix_schema(self, schema: pa.Schema) -> None:
        """Take the schema of the run's first start in place of looking at rows."""
        self._schema = schema

    def schema(self) -> pa.Schema:
        """The columns: those asked for, else the keys in the order they are first seen.

        Raises ConfigError where rows are there but none of the sample is an object, and for `columns`
        that no row of the sample has.
        """
        if self._schema is None:
            self._schema = self._infer()
        return self._schema

    def read(self, file: SourceFile, chunks: Iterable[Chunk]) -> Iterator[Rows]:
        """Each chunk's rows, in the order of `chunks`; going on is cheap, going back costs a seek or a restart.

        Raises ConfigError when the file is not the registered one, RunFailed when it cannot be read.
        """
        located = self._registered(file)
        parser = RowParser(self.schema(), file.name, ignore_others=self._columns is not None)
        with reaching(file.path, RunFailed):
            reader = self._reader(file.path, file.size)
        with reader:
            for chunk in chunks:
                assert chunk.file_ordinal == file.ordinal
                with reaching(file.path, RunFailed):
                    rows = parser.rows(reader.take(chunk.first_row, chunk.num_rows))
                    located = self._still(file, located)
                yield rows

    def _reader(self, path: str, size: int) -> LineReader:
        """The lines of a file's first bytes, whatever is behind them."""
        file = self._files[path]
        index = self._indexes.setdefault(path, LineIndex())
        return LineReader(lambda: Prefix(file.open(in_order=True), size), compression_of(file.inner), index)

    def _count(self, found: FoundFile, mark: int = 0) -> tuple[Counted, str]:
        """Rows and hash of a file's bytes, and the hash of those before `mark`; UnreadableFile if it is shorter now."""
        located = self._files[found.path]
        index = self._indexes[found.path] = LineIndex()
        hashed = HashedFile(located.open(in_order=True), found.size, mark)
        with LineReader(lambda: hashed, compression_of(located.inner), index) as reader:
            rows = reader.count()
            content, before = hashed.digests()
            return Counted(rows=rows, content=content, unfinished=_is_unfinished(reader.unended)), before

    def _last_row_stays(self, file: SourceFile, size: int) -> bool:
        """Whether the last registered row is the same in so many bytes of the file."""
        return not file.rows or self._last_row(file, file.size) == self._last_row(file, size)

    def _last_row(self, file: SourceFile, size: int) -> tuple[int, bytes]:
        """The last registered row as it is in so many bytes of the file: the length of its line, and the line."""
        with self._reader(file.path, size) as reader:
            ((_, line),) = reader.take(file.rows - 1, 1)
        line_bytes = line.length if isinstance(line, LongLine) else len(line.strip())
        return line_bytes, bytes(line.strip())

    def _begins_as(self, file: SourceFile, located: Located) -> bool:
        """Whether a file that is at least as long as it was registered still has both ends where they were."""
        return located.size >= file.size and edge_digests([replace(located, size=file.size)]) == [file.digest]

    def _still(self, file: SourceFile, located: Located) -> Located:
        """The local file as it is after a chunk was read; RunFailed if more was done to it than appending."""
        if located.fs is not None or not Path(located.key).exists():
            return located
        now = located.renewed()
        if now.size <= located.size or not self._begins_as(file, now):
            located.require_unchanged()
        return now

    def _infer(self) -> pa.Schema:
        if not self._files:
            self.find()
        seen, refused = SeenTypes(self._columns), None
        for number, line in self._sample():
            try:
                seen.add(parse_object(line))
            except Unfit as reason:
                refused = refused or f"line {number}: {reason}"
        if refused is not None and not seen.rows:
            raise ConfigError(
                f"data.path {self._first_path} has no JSON object that can be a row in its first lines ({refused}); "
                "one object a line is wanted"
            )
        if seen.fullest is not None:
            raise ConfigError(
                f"data.path {self._first_path} has more than {MAX_KEYS:,} different keys in the first rows, most of "
                f"them in {shown(seen.fullest)}; name the ones to read in data.columns"
            )
        return seen.schema() if self._columns is None else self._projected(seen)

    def _projected(self, seen: SeenTypes) -> pa.Schema:
        assert self._columns is not None
        types = {field.name: field.type for field in seen.schema()}
        unknown = [name for name in self._columns if name not in types]
        if unknown and seen.names:
            raise ConfigError(
                f"data.columns names {listed(unknown)}, which no row has at the start of data.path "
                f"{self._first_path}; the keys there are {listed(seen.names)}"
            )
        return pa.schema([pa.field(name, types.get(name, pa.string())) for name in self._columns])

    def _sample(self) -> Iterator[Line]:
        """The first rows of every file."""
        share = max(1, SAMPLE_ROWS // len(self._files))
        for file in self._files.values():
            with reaching(file.path), self._reader(file.path, file.size) as reader:
                lines = reader.head(share, max(1, _SAMPLE_BYTES // len(self._files)))
            yield from lines

    @property
    def _first_path(self) -> str:
        return next(iter(self._files))

    def _registered(self, file: SourceFile) -> Located:
        """The file as it was found, which is the registered one."""
        if not self._files:
            self.find()
        located = self._files[file.path]
        with reaching(file.path):
            now = located.renewed()
            same = self._begins_as(file, now)
        if not same:
            raise ConfigError(
                f"data.path {file.path} is not the registered file any more ({now.size} bytes, registered with "
                f"{file.size}); restore it, or start another output.dir"
            )
        return now


def _is_unfinished(line: bytes) -> bool:
    """Whether a line without end is more than white space and no object yet; a whole object cannot be continued."""
    if not line.strip():
        return isinstance(line, LongLine) and bool(line)
    try:
        parse_object(line)
    except Unfit:
        return True
    return False
