"""Runs over other sources than Parquet, from the command line to the Parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import Ended, nothing_left_over, parts, results, rows, run_here, run_json

from pipeline.data.jsonl import JsonlSource

LINES = ['{"prompt": "a", "n": 1}', "", '{"prompt": "b", "n": 2', '{"prompt": "c", "n": "x"}', '{"prompt": "d"}']


@pytest.fixture
def attempt(small_model: Path, tmp_path: Path) -> Callable[..., Ended]:
    def run(*more: str) -> Ended:
        base = ["model=path", f"model.path={small_model}", "quant=none", "sampling.max_new_tokens=3"]
        return run_here(*base, f"output.dir={tmp_path / 'out'}", "data.chunk_rows=2", *more)

    return run


def test_lines_that_are_no_rows_are_error_rows_with_their_text(attempt: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("\n".join(LINES))
    out = tmp_path / "out"
    attempt("data=jsonl", f"data.path={tmp_path / 'x.jsonl'}").done()
    answered = rows(out)
    assert [row["prompt"] for row in answered] == ["a", None, None, "d"]
    assert [row["finish_reason"] == "error" for row in answered] == [False, True, True, False]
    assert answered[1]["error"].startswith("x.jsonl, line 3: it is not valid JSON")
    assert answered[1]["error"].endswith('; the line: {"prompt": "b", "n": 2')
    assert "n is a string, and the column's type is int64" in answered[2]["error"]
    assert run_json(out)["summary"]["error_rows"] == 2
    assert run_json(out)["input_schema"]["fields"] == ["prompt: string", "n: int64"]
    assert nothing_left_over(out)


def test_a_resumed_run_reads_only_what_is_new_and_keeps_the_schema(
    attempt: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(LINES))
    attempt("data=jsonl", f"data.path={folder}").done()
    before = [part.read_bytes() for part in parts(tmp_path / "out")]
    counted: list[str] = []
    original = JsonlSource.count
    monkeypatch.setattr(JsonlSource, "count", lambda self, found: counted.append(found.name) or original(self, found))
    monkeypatch.setattr(JsonlSource, "_sample", lambda self: pytest.fail("the schema is inferred again"))
    (folder / "0.jsonl").write_text('{"prompt": "new", "n": 0.5}\n{"n": 7, "prompt": "newer"}\n{"prompt": "x", "y": 1}')
    attempt("data=jsonl", f"data.path={folder}").done()
    assert counted == ["0.jsonl"]
    assert [part.read_bytes() for part in parts(tmp_path / "out")][:2] == before
    answered = rows(tmp_path / "out")
    assert [row["prompt"] for row in answered] == ["a", None, None, "d", None, "newer", None]
    assert results(tmp_path / "out").schema.field("n").type == pa.int64()
    assert "the key y is not among" in answered[6]["error"]
    attempt("data=jsonl", f"data.path={folder}").done()
    assert counted == ["0.jsonl"]


def test_a_limit_and_columns(attempt: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("\n".join(LINES))
    attempt("data=jsonl", f"data.path={tmp_path / 'x.jsonl'}", "data.limit=3", "data.columns=[prompt]").done()
    assert [row["prompt"] for row in rows(tmp_path / "out")] == ["a", None, "c"]
    refusal = attempt("data=jsonl", f"data.path={tmp_path / 'x.jsonl'}", "data.limit=3").refusal()
    assert "data.columns" in refusal
    assert "results of another run" in refusal


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_gives_one_part_without_rows(content: str, attempt: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    for _ in range(2):
        assert "(0 rows" in attempt("data=jsonl", f"data.path={tmp_path / 'x.jsonl'}").done().out
    (part,) = parts(tmp_path / "out")
    assert pq.read_schema(part).names[:2] == ["prompt", "row_id"]
    assert pq.read_metadata(part).num_rows == 0


def test_a_saved_dataset(attempt: Callable[..., Ended], tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    saved = datasets.Dataset.from_dict({"prompt": ["a", "b", "c"], "n": [1, 2, 3]})
    datasets.DatasetDict({"train": saved, "test": saved.select([2])}).save_to_disk(str(tmp_path / "d"))
    assert "train, test" in attempt("data=hub", f"data.path={tmp_path / 'd'}").refusal()
    attempt("data=hub", f"data.path={tmp_path / 'd'}", "data.split=train").done()
    assert [(row["prompt"], row["n"]) for row in rows(tmp_path / "out")] == [("a", 1), ("b", 2), ("c", 3)]


def test_a_url_with_credentials_leaves_none_behind(attempt: Callable[..., Ended], tmp_path: Path) -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe_file("/in/x.jsonl", "\n".join(LINES).encode())
    options = (
        "{key: hidden1, secret: hidden2, opaque: hidden3, client_kwargs: {aws_session_token: hidden4}, anon: false}"
    )
    attempt("data=jsonl", "data.path=memory://in", f"data.storage_options={options}").done()
    stored = run_json(tmp_path / "out")["config"]["data"]["storage_options"]
    assert stored["anon"] is False
    assert stored["client_kwargs"] == {"aws_session_token": "(redacted)"}
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"hidden" not in path.read_bytes(), path
    assert len(rows(tmp_path / "out")) == 4
    fs.rm("/in", recursive=True)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["files"][0]["name"] == "x.jsonl"
