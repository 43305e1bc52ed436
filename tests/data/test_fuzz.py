"""The readers against bytes that a fuzzer makes up, for a bounded time (see fuzz_readers.py)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

SECONDS = 30


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """What it begins with."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    (folder / "lines").write_bytes(b'{"a": 1, "s": "x"}\n{"a": 2, "s": null}\n\n{"a": [1]}\n\xff\r\n')
    pq.write_table(pa.table({"a": [1, 2, 3], "s": ["x", "y", None]}), folder / "flat", compression="none")
    pq.write_table(pa.table({"l": [[1], [2, 3], None] * 4}), folder / "nested", row_group_size=4)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_any_bytes_are_rows_or_a_refusal(kind: str, inputs: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("needs atheris, which has packages for some Pythons only")
    program = [sys.executable, str(Path(__file__).with_name("fuzz_readers.py")), kind]
    options = [f"-max_total_time={SECONDS}", "-seed=1", "-rss_limit_mb=4000", "-timeout=20", str(inputs)]
    done = subprocess.run([*program, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done " in done.stderr
