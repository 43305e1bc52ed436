"""What several processes do together: 160 rows in 16 chunks, which take long enough to be disturbed."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
from harness import nothing_left_over, results

NUM_ROWS = 160
CHUNK_ROWS = 10


def args(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    return [
        "model=path", f"model.path={model}", f"data.path={data}", f"output.dir={out}", "quant=none",
        f"data.chunk_rows={CHUNK_ROWS}", "engine.slots=16", "sampling.max_new_tokens=60",
        "sampling.temperature=1.0", *more,
    ]  # fmt: skip


def assert_all_there(out: Path, alone: pa.Table) -> None:
    assert results(out).equals(alone)
    assert nothing_left_over(out)
