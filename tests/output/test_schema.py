"""The schema of the results, and that every reader sees it."""

from __future__ import annotations

from pathlib import Path

import datasets
import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConfigError
from pipeline.output.schema import output_fields, results_schema

COMMON = {
    "row_id": "string",
    "completion": "string",
    "finish_reason": "string",
    "error": "string",
    "prompt_tokens": "int32",
    "completion_tokens": "int32",
    "cumulative_logprob": "double",
}
LABEL = COMMON | {
    "label": "string",
    "label_probs": "map<string, double>",
    "label_logprob": "map<string, double>",
    "margin": "double",
    "entropy": "double",
}
SCORE = COMMON | {"target_logprob": "double", "target_tokens": "int32"}
INPUT = pa.schema(
    [("id", pa.int64()), ("prompt", pa.string()), ("tags", pa.list_(pa.string()))],
    metadata={"pandas": "{}", "huggingface": '{"info": {}}'},
)


@pytest.mark.parametrize(("task", "expected"), [("generate", COMMON), ("label", LABEL), ("score", SCORE)])
def test_the_columns_of_a_task(task: str, expected: dict[str, str]) -> None:
    assert [(field.name, str(field.type)) for field in output_fields(task)] == [
        (name, str(pa.map_(pa.string(), pa.float64())) if kind.startswith("map") else kind)
        for name, kind in expected.items()
    ]
    assert all(field.nullable for field in output_fields(task))


def test_the_run_s_labels_make_structs_and_rows_own_labels_maps() -> None:
    labels = ["yes", "no, thanks", "a.b"]
    fields = {field.name: field.type for field in output_fields("label", (), labels)}
    struct = pa.struct([(label, pa.float64()) for label in labels])
    assert fields["label_probs"] == fields["label_logprob"] == struct
    assert list(fields) == list(LABEL)
    own = {field.name: field.type for field in output_fields("label", (), None)}
    assert own["label_probs"] == own["label_logprob"] == pa.map_(pa.string(), pa.float64())
    assert [(f.name, f.type) for f in output_fields("generate", (), labels)] == [
        (f.name, f.type) for f in output_fields("generate")
    ]


@pytest.mark.parametrize(
    "asked", [(), ("token_ids",), ("token_ids", "logprobs"), ("choices",), ("token_ids", "logprobs", "choices")]
)
def test_columns_on_request_come_last(asked: tuple[str, ...]) -> None:
    assert [field.name for field in output_fields("generate", asked)] == [*COMMON, *asked]
    taken = pa.schema([("id", pa.int64()), *((name, pa.int64()) for name in asked)])
    if asked:
        with pytest.raises(ConfigError, match=rf"columns {', '.join(asked)} have .* set output\.columns to .*: \[id\]"):
            results_schema(taken, None, "generate", {}, asked)
    assert results_schema(taken, ["id"], "generate", {}, asked).names == ["id", *COMMON, *asked]
    assert results_schema(taken, None, "generate", {}).names == [*taken.names, *COMMON]


def test_a_scored_prompt_is_on_request() -> None:
    fields = output_fields("score", ("token_ids", "prompt_logprob"))
    assert [field.name for field in fields] == [*SCORE, "token_ids", "prompt_logprob"]
    assert fields[-1].type == pa.float64()


def test_a_choice_has_the_columns_of_an_answer() -> None:
    fields = {field.name: field.type for field in output_fields("generate", ("token_ids", "logprobs", "choices"))}
    inner = {field.name: field.type for field in fields["choices"].value_type}
    assert inner == {name: fields[name] for name in inner}
    assert set(inner) == set(fields) - {"row_id", "error", "prompt_tokens", "choices"}


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ConfigError, match="task must be one of generate, label, score, got rank"):
        output_fields("rank")


def test_input_columns_come_first_and_only_our_metadata_stays() -> None:
    schema = results_schema(INPUT, None, "label", {"pipeline.run": "r1"})
    assert schema.names == [*INPUT.names, *LABEL]
    assert schema.metadata == {b"pipeline.run": b"r1"}
    assert results_schema(INPUT, ["tags", "id"], "generate", {}).names == ["tags", "id", *COMMON]
    assert results_schema(INPUT, [], "generate", {}).names == list(COMMON)


def test_a_collision_names_the_columns_and_the_remedy() -> None:
    taken = pa.schema([("id", pa.int64()), ("label", pa.string()), ("error", pa.string())])
    with pytest.raises(ConfigError, match=r"columns label, error have .* set output\.columns to .*: \[id\]"):
        results_schema(taken, None, "label", {})
    assert results_schema(taken, ["id"], "label", {}).names == ["id", *LABEL]
    assert results_schema(taken, ["id", "label"], "generate", {}).names == ["id", "label", *COMMON]


def test_a_name_that_differs_by_case_alone_collides(tmp_path: Path) -> None:
    """A reader that tells no case apart would give the input's column for the answer's."""
    both = pa.table({"Completion": ["the input's"], "completion": ["the answer"]})
    pq.write_table(both, tmp_path / "x.parquet")
    asked = f"select completion from '{tmp_path / 'x.parquet'}'"
    assert duckdb.sql(asked).fetchall() == [("the input's",)], "what is refused"
    with pytest.raises(ConfigError, match=r"Completion have the names of output columns.*\[Prompt\]"):
        results_schema(pa.schema([("Prompt", pa.string()), ("Completion", pa.string())]), None, "generate", {})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["id", "nope", "no"], r"output\.columns names nope, no, .* columns are id, prompt, tags"),
        (["id", "id"], r"output\.columns must name each column once, got id, id"),
    ],
)
def test_bad_output_columns_are_refused(columns: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        results_schema(INPUT, columns, "generate", {})


@pytest.mark.parametrize("labels", [None, ["x", "y z"]], ids=["map", "struct"])
def test_every_reader_sees_one_schema_and_the_same_values(labels: list[str] | None, tmp_path: Path) -> None:
    schema = results_schema(INPUT, None, "label", {"pipeline.run": "r1"}, (), labels)
    probs = [("x", 0.25)] if labels is None else {"x": 0.25, "y z": 0.75}
    row = {"id": 1, "prompt": "p", "tags": ["a"], "row_id": "000000-000000000000", "label_probs": probs}
    pq.write_table(pa.Table.from_pylist([row], schema=schema), tmp_path / "part-0.parquet")
    pq.write_table(schema.empty_table(), tmp_path / "part-1.parquet")
    assert ds.dataset(tmp_path).schema.equals(schema)
    assert ds.dataset(tmp_path).to_table().to_pylist() == [dict.fromkeys(schema.names) | row]
    assert list(pd.read_parquet(tmp_path).columns) == schema.names
    query = f"select id, label_probs['x'], margin from read_parquet('{tmp_path}/*.parquet')"
    assert duckdb.sql(query).fetchall() == [(1, 0.25, None)]
    if labels is not None:
        part = str(tmp_path / "part-0.parquet")  # `datasets` refuses files without rows
        loaded = datasets.load_dataset("parquet", data_files=part, split="train", cache_dir=str(tmp_path / "cache"))
        assert loaded[0]["label_probs"] == probs
        assert loaded.column_names == schema.names
