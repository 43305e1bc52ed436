"""A fuzz target: any bytes as a file of a source end in rows, error rows or a clear refusal.

    python fuzz_readers.py jsonl -max_total_time=60 -seed=1 [FOLDER with inputs to begin with]

Every chunk that was counted comes with all its rows, or the file is refused in one sentence.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris
import pyarrow as pa

with atheris.instrument_imports(include=["pipeline.data"]):
    from reading import read_all

    from pipeline.data.jsonl import JsonlSource
    from pipeline.data.parquet import ParquetSource
    from pipeline.data.source import Source
from pipeline.errors import ConfigError, RunFailed

SOURCES: dict[str, tuple[str, Callable[..., Source]]] = {
    "jsonl": ("in.jsonl", JsonlSource),
    "parquet": ("in.parquet", ParquetSource),
}


def read(kind: str, folder: Path, data: bytes) -> None:
    """Read a file with these bytes, in chunks of a few rows."""
    name, source_of = SOURCES[kind]
    path = folder / name
    path.write_bytes(data)
    try:
        source = source_of([str(path)])
        if not source.schema().names:  # a table without columns does not know its length
            return
        table, reasons = read_all(source, chunk_rows=3)
    except (ConfigError, RunFailed) as refused:
        assert len(str(refused).splitlines()) == 1
        return
    assert table.num_rows == len(reasons)
    if kind == "jsonl":
        lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        assert table.num_rows == sum(bool(line.strip()) for line in lines)


def main() -> None:
    """Hand the rest of the command line to libFuzzer."""
    kind = sys.argv.pop(1)
    pa.set_cpu_count(1)
    with tempfile.TemporaryDirectory() as folder:
        atheris.Setup(sys.argv, lambda data: read(kind, Path(folder), data))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
