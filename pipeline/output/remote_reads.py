"""Reading objects here and there, without a cache that could be stale or fetch more than is asked for."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.dataset as ds
from pyarrow.fs import FSSpecHandler, PyFileSystem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class RangeFile(io.RawIOBase):
    """A file of known size whose bytes are fetched when they are read."""

    def __init__(self, size: int, fetch: Callable[[int, int], bytes]) -> None:
        """`fetch` gives the bytes from a start to before an end."""
        self._size = size
        self._fetch = fetch
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
        """Go to a byte, counted as for any file; returns its position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with one request, as far as the file goes; returns the number of bytes."""
        end = min(self._size, self._position + len(buffer))
        if end <= self._position:
            return 0
        data = self._fetch(self._position, end)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def dataset_of(fs: Any, keys: Sequence[str], opened: Callable[[str], RangeFile]) -> ds.Dataset:
    """Parquet objects as one dataset, each opened by `opened`, which takes a key."""

    class Handler(FSSpecHandler):  # type: ignore[misc]  # pyarrow has no types
        def open_input_file(self, path: str) -> Any:
            return pa.PythonFile(opened(path), mode="r")

    return ds.dataset(list(keys), filesystem=PyFileSystem(Handler(fs)), format="parquet")
