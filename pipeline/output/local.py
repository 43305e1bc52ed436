"""An output in a local folder: hard links that do not replace, renames, and everything synced to the disk."""

from __future__ import annotations

import os
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from pipeline.output.durable import discard, make_folder, publish, sync_folder, write_file
from pipeline.output.local_claims import LocalClaims
from pipeline.output.store import CLAIMS, JOURNAL

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pyarrow.dataset as ds


class LocalDraft:
    """A file in journal/ that is linked to its final name once it is on the disk."""

    def __init__(self, file: BinaryIO, temporary: Path, final: Path) -> None:
        self.file = file
        self._temporary = temporary
        self._final = final

    def finish(self) -> None:
        """Wait until the content is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def publish(self) -> bool:
        """Link the file to its name, and wait until the name is on the disk; False where it was taken."""
        published = publish(self._temporary, self._final)
        sync_folder(self._final.parent)
        return published

    def replace(self) -> None:
        """Rename the file over the one that has its name, and wait until that is on the disk."""
        self._temporary.replace(self._final)
        sync_folder(self._final.parent)


class LocalStore:
    """The Store of a local path; network file systems count as local."""

    reads_at_once = 1

    def __init__(self, root: Path) -> None:
        """Nothing is touched yet."""
        self.root = root

    def shown(self, name: str = "") -> str:
        """The path."""
        return str(self.root / name)

    def prepare(self) -> None:
        """Nothing: folders are made where they are needed, and say then what is wrong."""

    def make_folder(self, name: str) -> None:
        """Make it and its parents; ConfigError where that is impossible."""
        make_folder(self.root / name)

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name now."""
        return (self.root / name).exists()

    def names(self, folder: str) -> list[str]:
        """The names in a folder; none if it is not there."""
        path = self.root / folder
        if not path.is_dir():
            return []
        with os.scandir(path) as entries:
            return [entry.name for entry in entries]

    def read(self, name: str) -> bytes:
        """A file's content."""
        return (self.root / name).read_bytes()

    def open(self, name: str) -> BinaryIO:
        """A file to read here and there."""
        return (self.root / name).open("rb")

    def dataset(self, folder: str) -> ds.Dataset:
        """The Parquet files of a folder as one dataset."""
        import pyarrow.dataset as ds

        return ds.dataset(self.root / folder, format="parquet")

    def create(self, name: str, data: bytes) -> bool:
        """Make a file unless there is one; True when this call did."""
        path = self.root / name
        with _written_beside(path, data) as temporary:
            created = publish(temporary, path)
            sync_folder(path.parent)
        return created

    def replace(self, name: str, data: bytes) -> None:
        """Write a file; a reader finds the old one or the new one."""
        path = self.root / name
        with _written_beside(path, data) as temporary:
            temporary.replace(path)
            sync_folder(path.parent)

    @contextmanager
    def draft(self, name: str, attempt: str) -> Iterator[LocalDraft]:
        """A file that is written in journal/ under a name of this attempt."""
        final = self.root / name
        temporary = self.root / JOURNAL / f"{final.stem}.{attempt}.tmp"
        try:
            # A Python file, not a path for Arrow: its OSError keeps the errno, and what is synced is what was written.
            with temporary.open("wb") as file:
                yield LocalDraft(file, temporary, final)
        finally:
            discard(temporary)

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        (self.root / name).unlink(missing_ok=True)

    def claims(self, lease_s: float = 60.0) -> LocalClaims:
        """A process's claims in this output."""
        return LocalClaims(self.root / CLAIMS, lease_s)

    def sweep(self) -> None:
        """Remove what killed attempts left half-written in journal/, and killed writers of run.json beside it."""
        for pattern in (f"{JOURNAL}/part-*.tmp", f"{JOURNAL}/.rows-*.tmp", ".run.json.*.tmp"):
            for leftover in self.root.glob(pattern):
                discard(leftover)


@contextmanager
def _written_beside(path: Path, data: bytes) -> Iterator[Path]:
    """The content on the disk, under a temporary name beside the final one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        write_file(temporary, data)
        yield temporary
    finally:
        discard(temporary)
