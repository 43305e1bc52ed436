"""The lines of a text file that are rows: in order, from any row on, in bounded memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import RawIOBase
from typing import Any, BinaryIO

import pyarrow as pa

from pipeline.data.files import UnreadableFile

MAX_LINE_BYTES = 32 * 2**20
"""A longer line is no row; it comes as LongLine."""
LONG_LINE_BYTES = 256 * 2**10
"""What is kept of the beginning of a longer line."""
_BLOCK_BYTES = 2**20
_STRIDE_BYTES = 4 * 2**20  # how far apart the places are that an index remembers
_BOM = b"\xef\xbb\xbf"
_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}

Stream = BinaryIO | RawIOBase
"""A file open for reading bytes."""
Line = tuple[int, bytes]
"""A line's number, from 1, and its bytes without line end."""


class LongLine(bytes):
    """The beginning of a line that is too long to be read, with the bytes it has in all."""

    length: int


@dataclass(frozen=True, slots=True)
class Mark:
    """A place between two lines: the next row, the next line's number, the next byte."""

    row: int
    line: int
    offset: int


class LineIndex:
    """Marks a few MiB apart, of the part of a file that has been passed in this process."""

    def __init__(self) -> None:
        self._marks = [Mark(0, 1, 0)]

    def add(self, mark: Mark) -> None:
        """Remember a place if it is far enough behind the last one."""
        if mark.offset >= self._marks[-1].offset + _STRIDE_BYTES:
            self._marks.append(mark)

    def before(self, row: int) -> Mark:
        """The last place known that is not behind a row."""
        return self._marks[bisect_right(self._marks, row, key=lambda mark: mark.row) - 1]


def compression_of(path: str) -> str | None:
    """What a file name says that its bytes are compressed with."""
    return next((codec for suffix, codec in _COMPRESSION.items() if path.endswith(suffix)), None)


class LineReader:
    """The rows of one file: its lines but for those of white space only, whatever the line end.

    Plain files are entered at any place that the index knows; compressed ones only at the start.
    A context manager around the open file.
    """

    def __init__(self, open_file: Callable[[], Stream], compression: str | None, index: LineIndex) -> None:
        self._open_file = open_file
        self._compression = compression
        self._index = index
        self._file: Stream | None = None
        self.unended = b""
        """The line at the end of the file that has no line end, once it has been read."""
        self._enter(index.before(0))

    def __enter__(self) -> LineReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def take(self, first: int, count: int) -> Iterator[Line]:
        """Rows first .. first + count - 1, a block at a time; raises UnreadableFile where the file has fewer."""
        while count:
            self._seek(first)
            start = first - self._first
            part = self._lines[start : start + count]
            first += len(part)
            count -= len(part)
            yield from part

    def head(self, count: int, max_bytes: int) -> list[Line]:
        """The first rows, at most `count`, of about the first `max_bytes` of the text."""
        taken: list[Line] = []
        while len(taken) < count and self._next.offset < max_bytes and self._advance():
            taken += self._lines
        return taken[:count]

    def count(self) -> int:
        """All rows of the file; reads it to the end."""
        while self._advance():
            pass
        return self._next.row

    def _seek(self, row: int) -> None:
        """Make the block that has a row the current one, by the shortest way."""
        mark = self._index.before(row)
        if row < self._first or (mark.offset > self._next.offset):
            self._enter(mark)
        while self._next.row <= row:
            if not self._advance():
                raise UnreadableFile(f"it ends after {self._next.row} rows")

    def _enter(self, mark: Mark) -> None:
        self._close()
        self._next = mark
        self._first = mark.row
        self._lines: list[Line] = []
        self._rest = _Rest()
        self._file = self._open_file()
        self._stream: Any = self._file
        if self._compression is not None:
            self._stream = pa.input_stream(pa.PythonFile(self._file, mode="r"), compression=self._compression)
        elif mark.offset:
            self._file.seek(mark.offset)

    def _close(self) -> None:
        if self._file is not None:
            if self._stream is not self._file:
                self._stream.close()
            self._file.close()
            self._file = None

    def _advance(self) -> bool:
        """Read a block; its whole lines become the current ones. False at the end of the file."""
        begins = self._next
        lines = self._split()
        if lines is None:
            return False
        rows = [line for line in enumerate(lines, begins.line) if line[1] and not _is_blank(line[1])]
        self._first = begins.row
        self._lines = rows
        self._next = Mark(begins.row + len(rows), begins.line + len(lines), self._offset)
        if self._compression is None:
            self._index.add(self._next)
        return True

    def _split(self) -> list[bytes] | None:
        """The lines that end in the next block; what is behind the last line end is kept for the next call."""
        block = self._read()
        if not block:
            if not self._rest.length:
                return None
            self._offset = self._next.offset + self._rest.length
            self.unended = self._without_bom(self._rest.take())
            return [self.unended]
        lines = block.split(b"\n")
        if len(lines) == 1:
            self._rest.add(block)
            self._offset = self._next.offset
            return []
        length = self._rest.length + len(block) - len(lines[-1])
        self._rest.add(lines[0])
        lines[0] = self._without_bom(self._rest.take())
        self._rest.add(lines.pop())
        self._offset = self._next.offset + length
        return lines

    def _without_bom(self, line: bytes) -> bytes:
        return line if self._next.offset or isinstance(line, LongLine) else line.removeprefix(_BOM)

    def _read(self) -> bytes:
        try:
            block: bytes = self._stream.read(_BLOCK_BYTES)
        except (OSError, pa.ArrowException) as error:
            raise UnreadableFile(str(error).partition("\n")[0]) from error
        return block


class _Rest:
    """The beginning of a line whose end is not read yet, kept whole up to the longest line that counts."""

    def __init__(self) -> None:
        self.length = 0
        self._is_blank = True
        self._pieces: list[bytes] = []

    def add(self, piece: bytes) -> None:
        self.length += len(piece)
        self._is_blank = self._is_blank and (not piece or piece.isspace())
        if self.length <= MAX_LINE_BYTES:
            self._pieces.append(piece)
        else:
            self._pieces = [b"".join([*self._pieces, piece[:LONG_LINE_BYTES]])[:LONG_LINE_BYTES]]

    def take(self) -> bytes:
        line = b"".join(self._pieces)
        if self.length > MAX_LINE_BYTES:
            line = LongLine(b"" if self._is_blank else line)
            line.length = self.length
        self.length = 0
        self._is_blank = True
        self._pieces = []
        return line


def _is_blank(line: bytes) -> bool:
    return line.isspace() and not isinstance(line, LongLine)
