"""Runs whose output is in an object store: the same rows as in a folder, exactly once, whatever is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from harness import (
    Ended,
    ended,
    environment,
    label_args,
    prompt,
    results,
    run_cli,
    run_here,
    start,
    wait_for,
    write,
)
from stores import KEY, SECRET, Place, Request, S3Server, memory_place, s3_place

from pipeline.config import load_config
from pipeline.console import Console
from pipeline.errors import ConfigError, RunFailed
from pipeline.job import Job

NUM_ROWS = 60
CHUNK_ROWS = 5
NUM_CHUNKS = NUM_ROWS // CHUNK_ROWS


def args(model: Path, data: Path, *more: str) -> list[str]:
    return [
        "model=path", f"model.path={model}", f"data.path={data}", "quant=none", f"data.chunk_rows={CHUNK_ROWS}",
        "engine.slots=16", "sampling.max_new_tokens=40", "sampling.temperature=1.0", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def expected(small_model: Path, varied: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """What the same run writes to a folder, in one go."""
    out = tmp_path_factory.mktemp("expected") / "out"
    run_here(*args(small_model, varied), f"output.dir={out}").done()
    return results(out)


@pytest.fixture
def bucket(s3: S3Server) -> Iterator[Place]:
    with s3.failing(None):
        yield s3_place(s3, f"run-{uuid.uuid4().hex}")


@pytest.fixture(params=["memory", "s3"])
def away(request: pytest.FixtureRequest) -> Place:
    """A place in an object store."""
    return memory_place(f"run-{uuid.uuid4().hex}") if request.param == "memory" else request.getfixturevalue("bucket")


def parts(place: Place) -> dict[str, bytes]:
    return {name: content for name, content in sorted(place.files().items()) if name.startswith("results/")}


def rows(place: Place) -> pa.Table:
    """The Parts, put together from their bytes."""
    return pa.concat_tables([pq.read_table(pa.BufferReader(content)) for content in parts(place).values()])


def run_json(place: Place) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(place.files()["run.json"])
    return values


def assert_complete(place: Place, expected: pa.Table, chunks: int = NUM_CHUNKS) -> None:
    """All rows, bit for bit and in order; nothing else lies around."""
    assert rows(place).equals(expected)
    names = sorted(place.files())
    assert sum(name.startswith("results/") for name in names) == chunks
    assert {name.partition("/")[0] for name in names} == {"plan.json", "report.html", "results", "run.json", "stats"}
    assert run_json(place)["summary"]["rows"] == NUM_ROWS


def attempts(place: Place) -> dict[str, bytes]:
    """By which attempt each Part was made."""
    metadata = {name: pq.read_metadata(pa.BufferReader(content)).metadata for name, content in parts(place).items()}
    return {name: values[b"pipeline.attempt"] for name, values in metadata.items()}


# One process


def test_a_run_is_the_same_as_in_a_folder(
    away: Place, small_model: Path, varied: Path, expected: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = [*args(small_model, varied), *away.args()]
    done = run_here(*command).done()
    assert f"results    {away.url}/results (60 rows, 0 of them errors, in 12 parts)" in done.out
    assert f"stats      {away.url}/stats/run-" in done.out
    assert_complete(away, expected)
    before = away.files()
    again = run_here(*command).done()
    assert again.out == done.out
    assert away.files() == before
    assert list(tmp_path.iterdir()) == [], "no folder called s3: or memory:"
    assert json.loads(before["plan.json"])["chunks_left"] == NUM_CHUNKS


def test_other_readers_open_it(
    bucket: Place, s3: S3Server, small_model: Path, varied: Path, expected: pa.Table
) -> None:
    """Arrow's own S3 client, which is not fsspec, and DuckDB."""
    from pyarrow.fs import S3FileSystem

    run_here(*args(small_model, varied), *bucket.args()).done()
    folder = bucket.url.removeprefix("s3://") + "/results"
    native = S3FileSystem(access_key=KEY, secret_key=SECRET, endpoint_override=s3.url, region="us-east-1")
    assert ds.dataset(folder, filesystem=native).to_table().equals(expected)
    with duckdb.connect() as connection:
        connection.register_filesystem(fsspec.filesystem("s3", skip_instance_cache=True, **s3.options))
        query = f"select key, completion from read_parquet('{bucket.url}/results/*.parquet') order by row_id"
        found = connection.sql(query).fetchall()
    assert found == list(zip(expected["key"].to_pylist(), expected["completion"].to_pylist(), strict=True))


def test_a_finished_run_writes_nothing_and_a_dry_run_neither(
    bucket: Place, s3: S3Server, small_model: Path, varied: Path
) -> None:
    command = [*args(small_model, varied, "sampling.max_new_tokens=1"), *bucket.args()]
    for more in (["dry_run=true"], []):
        before = len(s3.requests)
        run_here(*command, *more).done()
        writing = {method for method, _ in s3.requests[before:]} - {"GET", "HEAD"}
        assert bool(writing) == (not more)
    before = len(s3.requests)
    run_here(*command).done()
    assert {method for method, _ in s3.requests[before:]} <= {"GET", "HEAD"}
    assert len(s3.requests) - before < 60


def test_labels_truth_and_errors_are_summed_up_from_the_store(away: Place, tmp_path: Path, tickets: list[str]) -> None:
    data = write(tmp_path / "in.parquet", {"ticket": [*tickets[:20], None, None], "topic": ["login"] * 22})
    more = [prompt("{{ ticket }}\nTopic:"), "task.truth=topic", "data.chunk_rows=8", f"data.path={data}"]
    local = run_here(*label_args(), *more, f"output.dir={tmp_path / 'out'}").done()
    there = run_here(*label_args(), *more, *away.args()).done()
    chosen = [line for line in there.out.splitlines() if line.startswith(("accuracy", "errors"))]
    assert len(chosen) == 2
    assert chosen == [line for line in local.out.splitlines() if line.startswith(("accuracy", "errors"))]
    assert run_json(away)["summary"] == json.loads((tmp_path / "out" / "run.json").read_text())["summary"]


def test_no_rows(away: Place, small_model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "in.parquet", pa.table({"prompt": pa.array([], pa.string())}))
    for _ in range(2):
        assert "(0 rows" in run_here(*args(small_model, data), *away.args()).done().out
    assert rows(away).num_rows == 0


# What is refused


def test_another_run_is_refused(away: Place, small_model: Path, varied: Path) -> None:
    command = [*args(small_model, varied, "sampling.max_new_tokens=1"), *away.args()]
    run_here(*command).done()
    before = away.files()
    assert "sampling.seed: 0 -> 1" in run_here(*command, "sampling.seed=1").refusal()
    away.remove("run.json")
    assert "has results but no run.json" in run_here(*command).refusal()
    assert {**before, "run.json": b""} == {**away.files(), "run.json": b""}


def test_a_process_whose_run_json_was_replaced_publishes_nothing(away: Place, small_model: Path, varied: Path) -> None:
    command = [*args(small_model, varied, "sampling.max_new_tokens=1"), *away.args()]
    run_here(*command).done()
    job = Job(load_config(command))
    lost = f"results/part-{job.chunks[1].id}.parquet"
    table = pq.read_table(pa.BufferReader(away.files()[lost]))
    away.remove(lost)
    with job.output.claims() as claims:
        sink = job.sink(claims.attempt)
        away.put("run.json", json.dumps({**run_json(away), "run_id": "another", "summary": None}).encode())
        with pytest.raises(RunFailed, match=r"run\.json is not the one this process started with"):
            sink.commit(job.chunks[1], table, {})
        away.remove("run.json")
        with pytest.raises(RunFailed, match=r"run\.json is not the one this process started with"):
            sink.commit(job.chunks[1], table, {})
    assert lost not in away.files()


@pytest.mark.parametrize(
    ("data", "output", "refused"),
    [
        ("in", "in/out", True),
        ("in/", "in", True),
        ("in/*", "in/out", True),
        ("*/results/*.parquet", "out", True),
        ("in/**/*.parquet", "in/a/b", True),
        ("in/*.parquet", "in/out", False),
        ("in", "in2/out", False),
    ],
)
def test_an_output_that_would_be_read_as_input_is_refused(
    data: str, output: str, refused: bool, small_model: Path, varied: Path
) -> None:
    place = memory_place(f"apart-{uuid.uuid4().hex}")
    for name in ("in/a.parquet", "in/results/b.parquet"):
        place.put(name, varied.read_bytes())
    data, output = f"{place.url}/{data}", f"{place.url}/{output}"
    run = run_here(*args(small_model, Path("x"), f"data.path={data}", "data.limit=2"), f"output.dir={output}")
    if refused:
        assert run.refusal() == f"output.dir={output} lies inside data.path={data}; choose another one"
    else:
        run.done()


def refused_cli(*overrides: str, cwd: Path) -> Ended:
    """A refusal of a real process, which must come before torch is imported."""
    code = (
        "import sys; from pipeline.__main__ import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, *overrides], capture_output=True, text=True, cwd=cwd, env=environment(), timeout=60
    )
    return Ended(process.returncode, process.stdout, process.stderr, 0)


def test_what_is_wrong_is_said_before_the_model_is_loaded(
    bucket: Place, s3: S3Server, small_model: Path, varied: Path, tmp_path: Path
) -> None:
    command = args(small_model, varied)
    missing = refused_cli(*command, *bucket.args(), "output.dir=s3://nosuchbucket/x", cwd=tmp_path)
    assert "The specified bucket does not exist" in missing.refusal()
    nobody = "output.storage_options.client_kwargs.endpoint_url=http://127.0.0.1:1"
    assert "Could not connect" in refused_cli(*command, *bucket.args(), nobody, cwd=tmp_path).refusal()
    s3.fault = lambda r: r.refuse(403, "AccessDenied") if r.method == "PUT" else r.carry_out()
    denied = refused_cli(*command, *bucket.args(), cwd=tmp_path)
    assert "AccessDenied by the test" in denied.refusal()
    for run in (missing, denied):
        assert SECRET not in run.err
    assert list(tmp_path.iterdir()) == []


def test_credentials_stay_where_they_are(bucket: Place, small_model: Path, varied: Path) -> None:
    run = run_here(*args(small_model, varied, "sampling.max_new_tokens=1"), *bucket.args()).done()
    stored = run_json(bucket)["config"]["output"]["storage_options"]
    assert (stored["key"], stored["secret"]) == ("(redacted)", "(redacted)")
    assert stored["client_kwargs"]["endpoint_url"].startswith("http://127.0.0.1")
    files = bucket.files()
    texts = {name: repr(pq.read_table(pa.BufferReader(content)).to_pylist()).encode() + content
             for name, content in files.items() if name.endswith(".parquet")}  # fmt: skip
    for secret in (KEY, SECRET):
        assert secret not in run.out + run.err
        assert not [name for name, content in {**files, **texts}.items() if secret.encode() in content]


def test_a_local_run_does_not_import_a_store(small_model: Path, varied: Path, tmp_path: Path) -> None:
    command = [*args(small_model, varied, "sampling.max_new_tokens=1"), f"output.dir=file://{tmp_path}/out"]
    run_here(*command).done()
    code = (
        "import sys; from pipeline.__main__ import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 's3fs', 'aiobotocore', 'pipeline.output.remote'} & set(sys.modules); sys.exit(code)"
    )
    again = subprocess.run([sys.executable, "-c", code, *command], env=environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("output", ["s3://bucket/x", "memory://x", "s3:/bucket/x"])
def test_a_checkpoint_is_written_to_a_folder_only(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import quantize

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"output.dir={output} is n"):
        quantize.quantize(["model=tiny", "quant=bnb", f"output.dir={output}"], Console(), lambda: False)
    assert list(tmp_path.iterdir()) == []


# Kills and company


def test_killed_and_run_again(bucket: Place, small_model: Path, varied: Path, expected: pa.Table) -> None:
    command = [*args(small_model, varied), *bucket.args()]
    process, store = start(*command), bucket.store()
    wait_for(lambda: len(store.names("results")) >= 2, process)
    process.send_signal(signal.SIGKILL)
    assert ended(process).code == -signal.SIGKILL
    kept = parts(bucket)
    assert 2 <= len(kept) < NUM_CHUNKS, "it was killed on the way"
    assert any(name.startswith("claims/") for name in bucket.files())
    run_here(*command).done()
    assert_complete(bucket, expected)
    assert {name: content for name, content in parts(bucket).items() if name in kept} == kept


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_one_output(
    processes: int, bucket: Place, s3: S3Server, small_model: Path, varied: Path, expected: pa.Table
) -> None:
    def claimants() -> int:
        claims = [content for name, content in bucket.files().items() if name.startswith("claims/0")]
        return len({json.loads(content)["attempt"] for content in claims})

    def wait_for_all(request: Request) -> Sequence[bytes] | None:
        """No Part before every process has its share: loading takes longer than answering so few rows."""
        if request.method == "PUT" and "/results/" in request.path:
            wait_for(lambda: s3.fault is None or claimants() == processes)
            s3.fault = None
        return request.carry_out()

    s3.fault = wait_for_all
    command = [*args(small_model, varied, "data.chunk_rows=2"), *bucket.args()]
    shares = [[f"shard.index={index}", f"shard.count={processes}"] for index in range(processes)]
    running = [start(*command, *share) for share in shares]
    all_ended = [ended(process) for process in running]
    assert {one.code for one in all_ended} <= {0, 75}, [one.err for one in all_ended]
    assert not any("Traceback" in one.err for one in all_ended)
    run_cli(*command).done()
    assert_complete(bucket, expected, chunks=NUM_ROWS // 2)
    assert len(set(attempts(bucket).values())) == processes


@pytest.mark.slow
def test_a_process_that_stood_still_commits_too_late(
    bucket: Place, small_model: Path, varied: Path, expected: pa.Table
) -> None:
    """It is taken for dead after a lease, its chunks are done by another, and its own Parts are not published."""
    command = [*args(small_model, varied), *bucket.args()]
    process, store = start(*command), bucket.store()
    wait_for(lambda: store.names("results"), process)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        claims = [name for name in bucket.files() if name.startswith("claims/")]
        assert claims
        second = run_here(*command)
        assert second.code == 75, "its claims are young"
        assert "in the hands of other processes" in second.err
        for name in claims:
            bucket.age(name, 70)
        run_here(*command).done()
        assert_complete(bucket, expected)
        made = parts(bucket)
    finally:
        os.kill(process.pid, signal.SIGCONT)
    late = ended(process)
    assert late.code == 0, late.err
    assert parts(bucket) == made
    assert_complete(bucket, expected)


def test_a_store_that_goes_away_ends_the_run_and_the_next_goes_on(
    bucket: Place, s3: S3Server, small_model: Path, varied: Path, expected: pa.Table
) -> None:
    command = [*args(small_model, varied), *bucket.args()]
    published: list[str] = []

    def lose_rights(request: Request) -> Sequence[bytes]:
        if request.method == "PUT" and "/results/" in request.path:
            published.append(request.path)
        denied = len(published) > 3 and request.method in ("PUT", "DELETE")
        return request.refuse(403, "ExpiredToken") if denied else request.carry_out()

    s3.fault = lose_rights
    broken = run_cli(*command)
    s3.fault = None
    assert broken.code == 1, broken.err
    assert "ExpiredToken by the test" in broken.err.splitlines()[-1]
    assert "Traceback" not in broken.err
    assert len(parts(bucket)) == 3
    run_here(*command).done()
    assert_complete(bucket, expected)
