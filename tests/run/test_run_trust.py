"""What must not happen silently: settings that mix, results read as input, errors nobody hears of."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import TICKETS, put_run_json, run_here, run_json

from pipeline.config import load_config
from pipeline.errors import RunFailed
from pipeline.job import Job

DEMO = ("experiment=demo", "data.limit=40", "data.chunk_rows=16")


def another_run(out: Path) -> None:
    """Make run.json tell of another run, as if somebody had removed it and begun again."""
    put_run_json(out, {**run_json(out), "run_id": uuid.uuid4().hex, "summary": None})


def test_a_process_whose_run_json_was_replaced_publishes_nothing(tmp_path: Path) -> None:
    run_here(*DEMO, f"output.dir={tmp_path}").done()
    job = Job(load_config([*DEMO, f"output.dir={tmp_path}"]))
    (tmp_path / "results" / "part-000000-000000000016.parquet").unlink()
    with job.output.claims() as claims:
        sink = job.sink(claims.attempt)
        another_run(tmp_path)
        with pytest.raises(RunFailed, match=r"run\.json is not the one this process started with"):
            sink.commit(job.chunks[1], pq.read_table(tmp_path / "results").slice(0, 16), {})
    assert len(list((tmp_path / "results").glob("*.parquet"))) == 2
    assert not list((tmp_path / "journal").iterdir())


def test_parts_of_another_run_are_not_taken_for_this_one(tmp_path: Path) -> None:
    run_here(*DEMO, f"output.dir={tmp_path}").done()
    another_run(tmp_path)
    ended = run_here(*DEMO, f"output.dir={tmp_path}")
    assert ended.code == 1
    assert "was made by another run" in ended.err


def test_an_output_inside_the_input_is_refused(tmp_path: Path) -> None:
    pq.write_table(pq.read_table(TICKETS).slice(0, 4), tmp_path / "a.parquet")
    ended = run_here(f"data.path={tmp_path}", f"output.dir={tmp_path}/out", "task.prompt='{{ ticket }}'")
    assert "lies inside data.path" in ended.refusal()


def test_the_end_of_a_run_names_the_commonest_error(tmp_path: Path) -> None:
    texts = [None, None, "a ticket", None]
    pq.write_table(pa.table({"ticket": texts, "topic": ["login"] * 4}), tmp_path / "in.parquet")
    ended = run_here("experiment=demo", f"data.path={tmp_path}/in.parquet", f"output.dir={tmp_path}/out").done()
    assert "3 of them errors, in 1 part)" in ended.out
    assert "errors     most often, in 3 rows: the prompt cannot be made: a value of the template is null" in ended.out


def test_every_answer_of_a_row_counts(tmp_path: Path) -> None:
    run_here(
        f"data.path={TICKETS}", f"output.dir={tmp_path}", "data.limit=6", "task.prompt='{{ ticket }}'", "sampling.n=3",
        "sampling.temperature=1", "sampling.max_new_tokens=5",
    ).done()  # fmt: skip
    rows = pq.read_table(tmp_path / "results").to_pylist()
    total = sum(choice["completion_tokens"] for row in rows for choice in row["choices"])
    stats = pq.read_table(next((tmp_path / "stats").glob("run-*.parquet"))).to_pylist()[0]
    assert stats["completion_tokens"] == total > sum(row["completion_tokens"] for row in rows)


def test_a_column_of_labels_must_hold_lists(tmp_path: Path) -> None:
    ended = run_here("experiment=demo", "task.labels=topic", f"output.dir={tmp_path}")
    assert "task.labels=topic is a column of string; name one of lists of labels" in ended.refusal()


def test_a_column_called_row_leaves_the_whole_row_a_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"row": [1, 2], "odd name": ["a", "b"]}), tmp_path / "in.parquet")
    run_here(
        f"data.path={tmp_path}/in.parquet", f"output.dir={tmp_path}/out", "sampling.max_new_tokens=2",
        """task.prompt='{{ _row["odd name"] }} {{ row }}'""",
    ).done()  # fmt: skip
    assert pq.read_table(tmp_path / "out" / "results")["error"].null_count == 2


def test_parts_with_other_rows_than_the_input_are_told(tmp_path: Path) -> None:
    """Whoever puts files among the Parts: a copy of the first one has 16 rows, and the last chunk 8."""
    command = (*DEMO, f"output.dir={tmp_path}")
    run_here(*command).done()
    first, *_, last = sorted((tmp_path / "results").iterdir())
    shutil.copy(first, last)
    put_run_json(tmp_path, {**run_json(tmp_path), "summary": None})
    found = run_here(*command)
    assert found.code == 1 and "with 48 rows in all, and the input has 40; python -m pipeline.verify" in found.err
    last.unlink()
    assert "(40 rows" in run_here(*command).done().out
