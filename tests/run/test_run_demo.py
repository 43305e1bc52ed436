"""The demo as a newcomer runs it, and its output as other readers see it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import (
    TICKETS,
    TOPICS,
    Ended,
    disk_state,
    environment,
    nothing_left_over,
    parts,
    results,
    run_cli,
    run_json,
    stats,
)

LIMIT = 60
CHUNK_ROWS = 25
ADDED = {
    "row_id": pa.string(),
    "completion": pa.string(),
    "finish_reason": pa.string(),
    "error": pa.string(),
    "prompt_tokens": pa.int32(),
    "completion_tokens": pa.int32(),
    "cumulative_logprob": pa.float64(),
    "label": pa.string(),
    "label_probs": pa.struct([(name, pa.float64()) for name in TOPICS]),
    "label_logprob": pa.struct([(name, pa.float64()) for name in TOPICS]),
    "margin": pa.float64(),
    "entropy": pa.float64(),
}


def demo_args(out: Path, limit: int = LIMIT) -> list[str]:
    return ["experiment=demo", f"output.dir={out}", f"data.limit={limit}", f"data.chunk_rows={CHUNK_ROWS}"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """One run of the demo, from another working directory than the checkout."""
    folder = tmp_path_factory.mktemp("demo")
    out = folder / "out"
    return out, run_cli(*demo_args(out), cwd=folder).done()


@pytest.fixture(scope="module")
def out(demo: tuple[Path, Ended]) -> Path:
    return demo[0]


@pytest.fixture(scope="module")
def source() -> pa.Table:
    return pq.read_table(TICKETS).slice(0, LIMIT)


def test_the_run_says_where_how_fast_and_how_well(demo: tuple[Path, Ended]) -> None:
    folder, ended = demo
    lines = ended.out.splitlines()
    assert lines[0].startswith(f"results    {folder / 'results'} ({LIMIT} rows, 0 of them errors, in 3 parts)")
    assert lines[1].startswith("speed      ")
    assert "rows/s" in lines[1] and "tokens/s" in lines[1]
    assert any(line.startswith("accuracy   ") and f"of {LIMIT} rows (column topic)" in line for line in lines)


def test_progress_in_a_log_is_whole_lines(demo: tuple[Path, Ended]) -> None:
    err = demo[1].err
    assert "\r" not in err and "\x1b" not in err
    assert "kernel" in err.splitlines()[0]
    assert f"{LIMIT} of {LIMIT} rows (100 %)" in err


def test_every_row_comes_back_in_place(out: Path, source: pa.Table) -> None:
    table = results(out)
    assert table.select(source.column_names).equals(source)
    assert table["row_id"].to_pylist() == [f"000000-{row:012d}" for row in range(LIMIT)]
    assert [pq.read_metadata(part).num_rows for part in parts(out)] == [25, 25, 10]
    assert [part.name for part in parts(out)] == [f"part-000000-{row:012d}.parquet" for row in (0, 25, 50)]


def test_columns_and_types_are_those_of_the_contract(out: Path, source: pa.Table) -> None:
    expected = [*zip(source.schema.names, source.schema.types, strict=True), *ADDED.items()]
    for part in parts(out):
        schema = pq.read_schema(part)
        assert list(zip(schema.names, schema.types, strict=True)) == expected


def test_labels_are_the_likeliest_of_a_distribution(out: Path) -> None:
    for row in results(out).to_pylist():
        probs, logprobs = dict(row["label_probs"]), dict(row["label_logprob"])
        assert tuple(probs) == tuple(logprobs) == TOPICS
        assert math.fsum(probs.values()) == pytest.approx(1, abs=1e-9)
        assert row["label"] == row["completion"] == max(probs, key=probs.__getitem__)
        assert row["cumulative_logprob"] == logprobs[row["label"]] < 0
        total = math.fsum(math.exp(x) for x in logprobs.values())
        assert total <= 1 + 1e-5
        assert probs == pytest.approx({name: math.exp(x) / total for name, x in logprobs.items()}, rel=1e-6)
        first, second = sorted(probs.values(), reverse=True)[:2]
        assert row["margin"] == pytest.approx(first - second, abs=1e-12)
        assert row["entropy"] == pytest.approx(-sum(p * math.log(p) for p in probs.values()), abs=1e-9)
        assert (row["finish_reason"], row["error"], row["completion_tokens"]) == ("stop", None, 1)


def test_duckdb_reads_and_joins_the_results(out: Path) -> None:
    import duckdb

    parquet = f"read_parquet('{out}/results/*.parquet')"
    assert duckdb.sql(f"select count(*), count(distinct row_id) from {parquet}").fetchall() == [(LIMIT, LIMIT)]
    joined = duckdb.sql(
        f"select count(*) from (select row_number() over (order by row_id) as place, ticket from {parquet}) "
        f"join (select file_row_number + 1 as place, ticket from read_parquet('{TICKETS}', file_row_number=true)) "
        "using (place, ticket)"
    )
    assert joined.fetchall() == [(LIMIT,)]
    best = duckdb.sql(f"select max(label_probs['billing']), min(label_probs['billing']) from {parquet}").fetchall()
    assert 0 <= best[0][1] < best[0][0] <= 1


def test_pandas_reads_the_results(out: Path) -> None:
    import pandas as pd

    frame = pd.read_parquet(out / "results")
    assert len(frame) == LIMIT
    assert set(frame["label"]) <= set(TOPICS)


def test_datasets_reads_the_results(out: Path, tmp_path: Path) -> None:
    import datasets

    loaded = datasets.load_dataset(
        "parquet", data_files=f"{out}/results/*.parquet", split="train", cache_dir=str(tmp_path)
    )
    assert loaded["row_id"][:] == results(out)["row_id"].to_pylist()
    assert loaded["label"][:] == results(out)["label"].to_pylist()
    assert loaded["label_probs"][:] == results(out)["label_probs"].to_pylist()
    assert list(loaded[0]["label_logprob"]) == list(TOPICS)


def test_run_stats_account_for_the_run(out: Path) -> None:
    (run,) = stats(out)
    table = results(out)
    wanted = {
        "rows", "error_rows", "prompt_tokens", "completion_tokens", "padded_tokens", "load_s", "generate_s",
        "prefill_s", "decode_s", "wall_s", "rows_per_s", "tokens_per_s", "peak_memory_bytes", "kernel", "dtype",
        "device", "versions", "config",
    }  # fmt: skip
    assert wanted <= set(run)
    assert (run["rows"], run["error_rows"]) == (LIMIT, 0)
    assert run["prompt_tokens"] == sum(table["prompt_tokens"].to_pylist())
    assert run["completion_tokens"] == sum(table["completion_tokens"].to_pylist())
    assert 0 < run["prefill_s"] <= run["generate_s"] < run["wall_s"]
    assert run["load_s"] + run["generate_s"] <= run["wall_s"]
    assert 0 < run["start_s"] < run["start_s"] + run["load_s"] < run["first_answer_s"] < run["start_s"] + run["wall_s"]
    assert run["rows_per_s"] == pytest.approx(LIMIT / run["generate_s"])
    assert run["peak_memory_bytes"] > 10 * 2**20
    assert (run["device"], run["dtype"], run["kernel"]) == ("cpu", "bfloat16", "bitsandbytes")
    assert json.loads(run["config"])["data"]["limit"] == LIMIT
    assert json.loads(run["versions"])["versions.torch"]


def test_intervals_sum_to_the_run(out: Path) -> None:
    (run,) = stats(out)
    (path,) = (out / "stats").glob("intervals-*.parquet")
    intervals = pq.read_table(path).to_pylist()
    for key in ("rows", "padded_tokens", "prefill_passes", "decode_steps"):
        assert sum(interval[key] for interval in intervals) == run[key], key
    for key in ("prefill_s", "decode_s"):
        assert sum(interval[key] for interval in intervals) == pytest.approx(run[key]), key
    assert all(interval["run_id"] == run["run_id"] == run_json(out)["run_id"] for interval in intervals)
    assert all(interval["attempt"] == run["attempt"] for interval in intervals)


def test_manifest_plan_and_nothing_else_are_left(out: Path) -> None:
    manifest = run_json(out)
    assert manifest["summary"]["rows"] == LIMIT
    assert manifest["summary"]["accuracy"]["rows"] == LIMIT
    plan: dict[str, Any] = json.loads((out / "plan.json").read_text())
    assert plan["rows"] == LIMIT
    assert plan["shapes"] == manifest["engine"]
    assert nothing_left_over(out)
    assert sorted(p.name for p in out.iterdir()) == [
        "claims", "journal", "plan.json", "report.html", "results", "run.json", "stats",
    ]  # fmt: skip
    assert not list(out.rglob(".*"))


def test_a_finished_run_answers_at_once_and_touches_nothing(demo: tuple[Path, Ended]) -> None:
    folder, first = demo
    before = disk_state(folder)
    again = run_cli(*demo_args(folder), env=environment(PYTHONPROFILEIMPORTTIME="1")).done()
    assert again.out == first.out
    imported = {line.rpartition("|")[2].strip() for line in again.err.splitlines() if line.startswith("import time:")}
    assert "pipeline.run" in imported
    assert not imported & {"torch", "transformers", "bitsandbytes", "datasets"}
    assert again.seconds < 8, "3 s on an idle machine"
    assert disk_state(folder) == before


@pytest.mark.slow
def test_the_shipped_model_labels_the_shipped_tickets_well(tmp_path: Path) -> None:
    run_cli(cwd=tmp_path).done()  # an empty command line is the demo
    summary = run_json(tmp_path / "outputs" / "demo")["summary"]
    assert summary["rows"] == pq.read_metadata(TICKETS).num_rows
    assert summary["accuracy"]["value"] >= 0.9
