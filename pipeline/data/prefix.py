"""The first bytes of a file, so that what is appended to it while it is read is not there."""

from __future__ import annotations

import hashlib
import io
from typing import Any, BinaryIO

from pipeline.data.files import UnreadableFile

_BLOCK_BYTES = 2**20


class Prefix(io.RawIOBase):
    """A file that ends after `size` bytes; closes the file below."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """The byte that is read next."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte, counted from the beginning."""
        assert whence == io.SEEK_SET
        self._position = self._file.seek(offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as the file, and these bytes of it, go."""
        room = min(len(buffer), self._size - self._position)
        if room <= 0:
            return 0
        data = self._file.read(room)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        """Close the file below, too."""
        self._file.close()
        super().close()


class HashedFile(Prefix):
    """The same, read once and in order: hashes what is read, and what is read of it before a mark."""

    def __init__(self, file: BinaryIO, size: int, mark: int = 0) -> None:
        super().__init__(file, size)
        self._mark = mark
        self._hash = hashlib.sha256()
        self._before = self._hash.copy()

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer and hash what came."""
        known = max(0, self._mark - self._position)
        count = super().readinto(buffer)
        data = memoryview(buffer)[:count]
        self._hash.update(data[:known])
        if known:
            self._before = self._hash.copy()
        self._hash.update(data[known:])
        return count

    def digests(self) -> tuple[str, str]:
        """The hashes of all bytes and of those before the mark; UnreadableFile if there are fewer bytes."""
        while self.read(_BLOCK_BYTES):
            pass
        if self._position < self._size:
            raise UnreadableFile(f"it ends after {self._position} of {self._size} bytes")
        return self._hash.hexdigest(), self._before.hexdigest()
