"""The hashes that a Part holds of itself: any bit of it that is another one is found, and everybody can read it."""

from __future__ import annotations

import io
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.source import Chunk
from pipeline.errors import RunFailed
from pipeline.output.inspection import inspect_part
from pipeline.output.local import LocalStore
from pipeline.output.part import read_footer
from pipeline.output.seal import footer_of, is_as_sealed
from pipeline.output.sink import Sink, part_path

SCHEMA = pa.schema(
    [
        ("x", pa.string()),
        ("row_id", pa.string()),
        ("finish_reason", pa.string()),
        ("error", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
    ],
    metadata={"pipeline.run_id": "this", "pipeline.fingerprint": "ab" * 32},
)
CHUNK = Chunk(file_ordinal=0, first_row=0, num_rows=5)
COUNTS = {"rows": 5, "error_rows": 0, "prompt_tokens": 15, "completion_tokens": 10}


def answers(first: str = "a") -> pa.Table:
    ids = [CHUNK.row_id(index) for index in range(5)]
    columns = [[first, *"bcde"], ids, ["stop"] * 5, [None] * 5, [3] * 5, [2] * 5]
    return pa.table([pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)], SCHEMA)


def committed(folder: Path, table: pa.Table) -> Path:
    assert Sink(LocalStore(folder), SCHEMA, "an attempt").commit(CHUNK, table, COUNTS)
    return folder / part_path(CHUNK.id)


def problems(folder: Path) -> list[str]:
    return inspect_part(LocalStore(folder), SCHEMA, CHUNK).problems


def test_every_bit_of_a_part_counts(tmp_path: Path) -> None:
    """One bit of each byte, a different one each time."""
    part = committed(tmp_path, answers())
    assert problems(tmp_path) == []
    whole = part.read_bytes()
    footer = read_footer(LocalStore(tmp_path), SCHEMA.metadata, part_path(CHUNK.id))
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << (at * 7 + at // 8) % 8
        part.write_bytes(damaged)
        assert problems(tmp_path), f"byte {at} of {len(whole)}"
        try:
            found = read_footer(LocalStore(tmp_path), SCHEMA.metadata, part_path(CHUNK.id))
        except RunFailed:
            continue
        assert found == footer, f"byte {at}: wrong counts would be taken for right ones"


def test_values_that_look_like_the_hash_of_a_footer(tmp_path: Path) -> None:
    """They stand in the footer too, as a column's greatest value."""
    part = committed(tmp_path, answers("pipeline.footer\x18@" + "0" * 64))
    assert pq.read_metadata(part).row_group(0).column(0).statistics.max.startswith("pipeline.footer")
    assert problems(tmp_path) == []


def test_others_read_it_with_its_statistics(tmp_path: Path) -> None:
    part = committed(tmp_path, answers())
    assert pq.read_table(part).replace_schema_metadata(None).equals(answers().replace_schema_metadata(None))
    assert duckdb.execute(f"select count(*), min(x) from '{part}' where x >= 'b'").fetchall() == [(4, "b")]
    assert pq.read_metadata(part).row_group(0).column(0).statistics.max == "e"


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" * 3, b"PAR1\xff\xff\xff\x7fPAR1", bytes(100)])
def test_what_has_no_footer(content: bytes) -> None:
    with pytest.raises(ValueError, match="it has no footer"):
        footer_of(io.BytesIO(content))


def test_a_footer_longer_than_one_look(tmp_path: Path) -> None:
    names = [f"column {number} {'x' * 300}" for number in range(300)]
    out = Sink(LocalStore(tmp_path), pa.schema([(name, pa.int32()) for name in names]), "an attempt")
    assert out.commit(CHUNK, pa.table({name: pa.array(range(5), pa.int32()) for name in names}), {"rows": 5})
    content = (tmp_path / part_path(CHUNK.id)).read_bytes()
    footer = footer_of(io.BytesIO(content))
    assert len(footer) > 2**16 and content.endswith(footer)
    assert is_as_sealed(footer) and is_as_sealed(footer.replace(b"column 7", b"column 8", 1)) is False
    assert out.totals([CHUNK.id]) == {"rows": 5}
