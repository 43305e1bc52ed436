"""The hashes that a Part holds of its own bytes: of all before the footer, and of the footer that says so.

Parquet's checksums are of single pages. They say nothing of a file written anew, and nothing of the footer, where one
wrong bit in a statistic has readers leave rows out. The hash of the footer stands in the footer, and is made with zeros
in its own place: so a Part is still one file, whole and judged by itself from its publication on.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import BinaryIO

PAGES_KEY = "pipeline.pages"
FOOTER_KEY = "pipeline.footer"
_DIGEST_BYTES = 32
_DIGITS = 2 * _DIGEST_BYTES
_BLANK = b"0" * _DIGITS
_MARK = FOOTER_KEY.encode() + bytes([0x18, _DIGITS])
"""What stands before the digits of the footer's hash: its key, and a value of so many bytes, as Thrift's compact
protocol writes it (parquet.thrift: FileMetaData.key_value_metadata)."""
MAGIC = b"PAR1"
_END_BYTES = 8  # the footer's length (4 bytes, little endian) and the magic
_TAIL_BYTES = 64 * 2**10  # read at once; a longer footer takes a second look
_BLOCK_BYTES = 2**20


class SealedFile:
    """A Part to write from the beginning to the end; its footer is held back until its hash is in it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._pages = _new_hash()
        self._footer: bytearray | None = None

    def write(self, data: bytes) -> int:
        """Behind all that was written before."""
        if self._footer is None:
            self._pages.update(data)
            return self._file.write(data)
        self._footer += data
        return len(data)

    def tell(self) -> int:
        """How much was written."""
        return self._file.tell() + len(self._footer or b"")

    def flush(self) -> None:
        """Nothing is kept here that could be written yet."""
        self._file.flush()

    @property
    def closed(self) -> bool:
        """Whether the file is."""
        return self._file.closed

    def end_pages(self) -> Mapping[str, str]:
        """What the footer has to hold of hashes; whatever is written from here on is the footer."""
        self._footer = bytearray()
        return {PAGES_KEY: self._pages.hexdigest(), FOOTER_KEY: _BLANK.decode()}

    def end_footer(self) -> None:
        """Write the footer, which is all there, with its hash."""
        assert self._footer is not None
        at = _place_of_digits(self._footer)
        assert at is not None and self._footer[at : at + _DIGITS] == _BLANK
        self._footer[at : at + _DIGITS] = _digest_of(self._footer).encode()
        self._file.write(self._footer)


def footer_of(file: BinaryIO) -> bytes:
    """The end of a Part from its footer on, with length and magic; ValueError where there is none."""
    size = file.seek(0, 2)
    tail = _read(file, max(0, size - _TAIL_BYTES), size)
    length = int.from_bytes(tail[-_END_BYTES : -len(MAGIC)], "little") + _END_BYTES
    if tail[-len(MAGIC) :] != MAGIC or length > size:
        raise ValueError("it has no footer")
    return tail[-length:] if length <= len(tail) else _read(file, size - length, size)


def is_as_sealed(footer: bytes) -> bool | None:
    """Whether a footer is what was written; None for one without hash, as older versions wrote it."""
    at = _place_of_digits(footer)
    return None if at is None else footer[at : at + _DIGITS] == _digest_of(footer).encode()


def pages_digest(file: BinaryIO, footer: bytes) -> str:
    """The hash of all that is before the footer of a Part."""
    left = file.seek(0, 2) - len(footer)
    digest = _new_hash()
    file.seek(0)
    while left:
        block = file.read(min(left, _BLOCK_BYTES))
        if not block:
            raise ValueError("it ends before its footer")
        digest.update(block)
        left -= len(block)
    return digest.hexdigest()


def _place_of_digits(footer: bytes | bytearray) -> int | None:
    """Where a footer's own hash begins: the last such place, since statistics of columns come before it."""
    at = footer.rfind(_MARK)
    return None if at < 0 else at + len(_MARK)


def _digest_of(footer: bytes | bytearray) -> str:
    """Of the footer with zeros in the place of its hash."""
    at = _place_of_digits(footer)
    assert at is not None
    digest = _new_hash()
    for piece in (footer[:at], _BLANK, footer[at + _DIGITS :]):
        digest.update(piece)
    return digest.hexdigest()


def _read(file: BinaryIO, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)


def _new_hash() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=_DIGEST_BYTES)
