"""The memory of a process does not grow with the rows of a file."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from echo import run_echo

from pipeline.claimed import ClaimedChunk
from pipeline.shift import Shift


def test_chunks_that_are_done_with_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"prompt": [f"row {n}" for n in range(300)]}), tmp_path / "rows.parquet")
    alive: list[int] = []
    ended = Shift._ended

    def count(self: Shift, *values: Any) -> None:
        gc.collect()
        alive.append(sum(type(o) is ClaimedChunk for o in gc.get_objects()))
        ended(self, *values)

    monkeypatch.setattr(Shift, "_ended", count)
    where = [f"data.path={tmp_path}/rows.parquet", f"output.dir={tmp_path}/out", "data.chunk_rows=6"]
    run_echo(monkeypatch, "model=tiny", "task=generate", "engine.slots=8", "engine.max_len=256", *where).done()
    assert len(alive) == 50
    assert max(alive) <= 16, "those read ahead, in the engine and being written are a few"
