"""Where a run's output is kept: whole files under names relative to `output.dir`, in a folder or an object store."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    import pyarrow.dataset as ds

    from pipeline.output.claims import Claims

RESULTS = "results"
STATS = "stats"
JOURNAL = "journal"
CLAIMS = "claims"
RUN_JSON = "run.json"
PLAN_JSON = "plan.json"
REPORT_HTML = "report.html"

STORES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs",
          "memory": "fsspec"}  # fmt: skip
"""URL schemes whose uploads appear whole and can be refused where the name is taken, and the package of each."""


class StoreError(OSError):
    """An object store could not be reached, or refused; the message is one line without credentials."""


class Draft(Protocol):
    """A file that is being written and has no final name yet."""

    file: BinaryIO

    def finish(self) -> None:
        """Nothing more will be written; what was is kept safe."""
        ...

    def publish(self) -> bool:
        """Let the finished file appear, whole, under its final name; False where that was taken already."""
        ...

    def replace(self) -> None:
        """Let it take the place of what has its final name; a reader finds the old one or the new one."""
        ...


class Store(Protocol):
    """The files of one output; a name is relative to `output.dir` and has at most one folder.

    Nothing is remembered between calls: what another process has done is seen. A file appears whole.
    All methods but the two that say otherwise raise OSError, of which StoreError is an object store's.
    """

    reads_at_once: int
    """How many files are worth reading at the same time."""

    def shown(self, name: str = "") -> str:
        """Path or URL of a file, or of the output, without credentials: for messages."""
        ...

    def prepare(self) -> None:
        """Make sure, before the first write of a run, that it will be possible; ConfigError if not."""
        ...

    def make_folder(self, name: str) -> None:
        """Make a folder where the store has any; ConfigError where that is impossible."""
        ...

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name now."""
        ...

    def names(self, folder: str) -> Sequence[str]:
        """The names of the files in a folder, without the folder, in no order; none if it is not there."""
        ...

    def read(self, name: str) -> bytes:
        """A file's content; FileNotFoundError if there is none."""
        ...

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A file to read here and there, such as a Parquet footer; FileNotFoundError if there is none."""
        ...

    def dataset(self, folder: str) -> ds.Dataset:
        """The Parquet files of a folder as one dataset."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Make a file unless there is one; of several callers, with different content, exactly one hears True."""
        ...

    def draft(self, name: str, attempt: str) -> AbstractContextManager[Draft]:
        """The same for a large file, written piece by piece; `attempt` is unique to the process."""
        ...

    def replace(self, name: str, data: bytes) -> None:
        """Write a file; a reader finds the old one or the new one."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        ...

    def claims(self, lease_s: float = 60.0) -> Claims:
        """A process's claims in this output."""
        ...

    def sweep(self) -> None:
        """Remove what killed processes left half-written; for when no chunk is left to do."""
        ...
