"""Several answers, log-probabilities, stop texts and rows' own parameters, end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from harness import greedy_tokens, results, rows, run_here, stats, write

MAX_NEW = 12
LIMIT = 16
LOGPROB = pa.struct([("token_id", pa.int32()), ("logprob", pa.float64())])
LOGPROBS = pa.list_(pa.struct([*LOGPROB, pa.field("top", pa.list_(LOGPROB))]))
SHARED = ("completion", "finish_reason", "completion_tokens", "cumulative_logprob", "token_ids", "logprobs")


def args(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    where = [f"model.path={model}", f"data.path={data}", f"output.dir={out}", "quant=none", "task.chat=false"]
    return ["model=path", *where, f"sampling.max_new_tokens={MAX_NEW}", f"data.limit={LIMIT}", *more]


@pytest.fixture(scope="module")
def several(small_model: Path, varied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three answers a row, with two alternatives at every step."""
    out = tmp_path_factory.mktemp("several") / "out"
    more = ["sampling.n=3", "sampling.logprobs=2", "sampling.temperature=1.0", "sampling.top_k=50"]
    run_here(*args(small_model, varied, out, *more)).done()
    return out


@pytest.fixture(scope="module")
def greedy(small_model: Path, varied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One answer a row, with the log-probability of every token."""
    out = tmp_path_factory.mktemp("greedy") / "out"
    run_here(*args(small_model, varied, out, "sampling.logprobs=true")).done()
    return out


def test_columns_on_request_have_the_types_of_the_contract(several: Path, greedy: Path) -> None:
    schema = results(several).schema
    assert schema.names[-3:] == ["token_ids", "logprobs", "choices"]
    assert schema.field("token_ids").type == pa.list_(pa.int32())
    assert schema.field("logprobs").type == LOGPROBS
    assert {field.name for field in schema.field("choices").type.value_type} == set(SHARED)
    assert results(greedy).schema.names[-2:] == ["token_ids", "logprobs"]


def test_the_first_choice_is_the_row_s_answer(several: Path) -> None:
    differing = 0
    for row in rows(several):
        assert row["error"] is None
        assert len(row["choices"]) == 3
        assert row["choices"][0] == {name: row[name] for name in SHARED}
        differing += len({choice["completion"] for choice in row["choices"]}) == 3
    assert differing > LIMIT // 2, "three draws, not one three times"


def test_choices_are_drawn_one_by_one_whatever_their_number(
    several: Path, small_model: Path, varied: Path, tmp_path: Path
) -> None:
    more = ["sampling.temperature=1.0", "sampling.top_k=50"]
    run_here(*args(small_model, varied, tmp_path / "one", *more)).done()
    run_here(*args(small_model, varied, tmp_path / "two", *more, "sampling.n=2")).done()
    for one, two, three in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), rows(several), strict=True):
        assert one["completion"] == two["completion"] == three["completion"]
        texts = [[choice["completion"] for choice in row["choices"]] for row in (two, three)]
        assert texts[0] == texts[1][:2]
        assert one["cumulative_logprob"] == three["cumulative_logprob"]


def test_token_ids_and_logprobs_are_those_of_the_model(several: Path, small_reference: Any) -> None:
    import torch

    model, tokenizer = small_reference
    for row in rows(several)[:8]:
        prompt = tokenizer(row["prompt"]).input_ids
        for choice in row["choices"]:
            tokens = choice["token_ids"]
            assert choice["completion"] == tokenizer.decode(tokens, skip_special_tokens=True)
            assert len(tokens) == choice["completion_tokens"]
            stopped = [1] if choice["finish_reason"] == "stop" else []
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *tokens, *stopped]])).logits[0].double()
            logprobs = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 :]
            steps = choice["logprobs"]
            assert [step["token_id"] for step in steps][: len(tokens)] == tokens
            for step, expected in zip(steps, logprobs, strict=False):
                assert step["logprob"] == pytest.approx(float(expected[step["token_id"]]), abs=1e-4)
                best = torch.topk(expected, 2)
                assert [other["token_id"] for other in step["top"]] == best.indices.tolist()
                assert [other["logprob"] for other in step["top"]] == pytest.approx(best.values.tolist(), abs=1e-4)
            total = sum(float(logprobs[i, token]) for i, token in enumerate([*tokens, *stopped]))
            assert choice["cumulative_logprob"] == pytest.approx(total, abs=1e-3)


def test_logprobs_true_has_no_alternatives(greedy: Path) -> None:
    for row in rows(greedy):
        assert len(row["logprobs"]) >= len(row["token_ids"]) > 0
        assert all(step["top"] == [] for step in row["logprobs"])
        total = sum(step["logprob"] for step in row["logprobs"])
        if row["finish_reason"] == "length":
            assert row["cumulative_logprob"] == pytest.approx(total, abs=1e-6)


def test_every_reader_opens_the_nested_columns(several: Path, tmp_path: Path) -> None:
    import datasets
    import duckdb
    import pandas as pd

    table = results(several)
    choices, first = table["choices"].to_pylist(), table["logprobs"][0].as_py()[0]
    loaded = datasets.load_dataset("parquet", data_files=f"{several}/results/*", split="train", cache_dir=str(tmp_path))
    assert loaded["choices"][:] == choices
    assert loaded["token_ids"][:] == table["token_ids"].to_pylist()
    assert loaded[0]["logprobs"][0] == first
    query = (
        f"select choices[2].completion, logprobs[1].top[1].logprob, len(token_ids) from '{several}/results/*.parquet'"
    )
    found = duckdb.sql(query).fetchall()
    assert [row[0] for row in found] == [row[1]["completion"] for row in choices]
    assert found[0][1] == first["top"][0]["logprob"]
    frame = pd.read_parquet(several / "results")
    assert [list(ids) for ids in frame["token_ids"]] == table["token_ids"].to_pylist()
    assert frame["choices"][0][2]["completion"] == choices[0][2]["completion"]


def test_all_choices_count_as_work(several: Path) -> None:
    (run,) = stats(several)
    assert run["rows"] == LIMIT
    assert run["decode_steps"] >= MAX_NEW - 1


def test_stop_texts_end_answers_and_stay_out_of_them(
    greedy: Path, small_model: Path, varied: Path, tmp_path: Path
) -> None:
    free = rows(greedy)
    texts = [row["completion"] for row in free]
    stops = sorted({text[4:6] for text in texts if text.isascii() and text[4:6].isalpha()})[:4]
    assert len(stops) >= 2
    listed = "[" + ",".join(f"'{stop}'" for stop in stops) + "]"
    run_here(*args(small_model, varied, tmp_path / "out", f"sampling.stop={listed}", "sampling.logprobs=true")).done()
    shortened = 0
    for row, before in zip(rows(tmp_path / "out"), free, strict=True):
        places = [before["completion"].find(stop) for stop in stops]
        end = min((place for place in places if place >= 0), default=None)
        assert row["completion"] == before["completion"][:end]
        assert row["token_ids"] == before["token_ids"][: len(row["token_ids"])]
        if end is not None:
            shortened += 1
            assert row["finish_reason"] == "stop"
            assert row["completion_tokens"] <= before["completion_tokens"]
        else:
            assert row["finish_reason"] == before["finish_reason"]
    assert shortened >= 2


OWN: dict[str, pa.Array] = {
    "heat": pa.array([None, 0.0, 1.0, 1.0, 1.0, -1.0, None, None, float("nan")]),
    "dice": pa.array([None, None, 1, 2, 1, None, None, -3, None], pa.int64()),
    "most": pa.array([None, 3, None, None, None, None, 0, None, 5], pa.int32()),
    "ends": pa.array([None, None, None, None, None, None, None, None, ["a"]], pa.list_(pa.string())),
}
COLUMNS = "sampling.columns={temperature: heat, seed: dice, max_new_tokens: most, stop: ends}"
BAD = {5: "sampling.temperature", 6: "sampling.max_new_tokens", 7: "sampling.seed", 8: "sampling.temperature"}


def test_rows_have_parameters_of_their_own(small_model: Path, small_reference: Any, tmp_path: Path) -> None:
    text = "Where is my parcel?"
    data = write(tmp_path / "in.parquet", pa.table({"prompt": [text] * 9, **OWN}))
    run_here(*args(small_model, data, tmp_path / "out", COLUMNS)).done()
    found = rows(tmp_path / "out")
    assert [i for i, row in enumerate(found) if row["error"] is not None] == list(BAD)
    for i, words in BAD.items():
        assert words in found[i]["error"]
        assert found[i]["finish_reason"] == "error" and found[i]["completion"] is None
        assert found[i]["prompt_tokens"] > 0
    model, tokenizer = small_reference
    tokens = greedy_tokens(model, tokenizer(text).input_ids, MAX_NEW)
    assert found[0]["completion"] == tokenizer.decode(tokens, skip_special_tokens=True), "nulls keep the run's"
    assert found[1]["completion"] == tokenizer.decode(tokens[:3], skip_special_tokens=True)
    assert found[1]["completion_tokens"] == min(3, len(tokens))
    hot = [found[i]["completion"] for i in (2, 3, 4)]
    assert hot[0] == hot[2] != hot[1]
    run_here(
        *args(small_model, data, tmp_path / "alone", "data.limit=1", "sampling.temperature=1", "sampling.seed=2")
    ).done()
    assert rows(tmp_path / "alone")[0]["completion"] == hot[1], "as if the whole run had these parameters"


def test_own_stop_texts_and_numbers_of_answers(small_model: Path, greedy: Path, varied: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    free = rows(greedy)
    stops = [[row["completion"][3:5]] if len(row["completion"]) > 6 else None for row in free]
    numbers = [1 + i % 3 for i in range(LIMIT)]
    table = pq.read_table(varied).slice(0, LIMIT)
    table = table.append_column("ends", pa.array(stops, pa.list_(pa.string()))).append_column("answers", [numbers])
    data = write(tmp_path / "in.parquet", table)
    run_here(*args(small_model, data, tmp_path / "out", "sampling.columns={stop: ends, n: answers}")).done()
    for row, before, stop, number in zip(rows(tmp_path / "out"), free, stops, numbers, strict=True):
        expected = before["completion"] if stop is None else before["completion"].split(stop[0])[0]
        assert row["completion"] == expected
        assert [choice["completion"] for choice in row["choices"]] == [expected] * number, "greedy: all alike"


def test_columns_that_are_not_there_are_refused(small_model: Path, varied: Path, tmp_path: Path) -> None:
    message = run_here(*args(small_model, varied, tmp_path / "out", "sampling.columns={seed: nosuch}")).refusal()
    assert "sampling.columns.seed=nosuch" in message and "key, prompt" in message


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_the_repetition_penalty_is_transformers_own(
    penalty: float, small_model: Path, varied: Path, small_reference: Any, greedy: Path, tmp_path: Path
) -> None:
    run_here(*args(small_model, varied, tmp_path / "out", f"sampling.repetition_penalty={penalty}")).done()
    model, tokenizer = small_reference
    changed = 0
    for row, free in zip(rows(tmp_path / "out"), rows(greedy), strict=True):
        ids = tokenizer(row["prompt"]).input_ids
        most = min(MAX_NEW, model.config.max_position_embeddings - len(ids))
        tokens = greedy_tokens(model, ids, most, repetition_penalty=penalty)
        assert row["completion"] == tokenizer.decode(tokens, skip_special_tokens=True)
        changed += row["completion"] != free["completion"]
    assert changed >= 3


@pytest.mark.parametrize("narrow", ["sampling.min_p=1", "sampling.top_k=1", "sampling.top_p=1e-6"])
def test_a_draw_among_one_is_greedy(narrow: str, small_model: Path, varied: Path, greedy: Path, tmp_path: Path) -> None:
    run_here(*args(small_model, varied, tmp_path / "out", "sampling.temperature=1.5", narrow)).done()
    assert results(tmp_path / "out")["completion"].to_pylist() == results(greedy)["completion"].to_pylist()


def test_min_p_keeps_what_is_likely_enough(small_model: Path, varied: Path, tmp_path: Path) -> None:
    """Every drawn token has at least the share of the likeliest one's probability, after the temperature."""
    import math

    more = ["sampling.temperature=1.0", "sampling.min_p=0.3", "sampling.logprobs=1", "sampling.n=2"]
    run_here(*args(small_model, varied, tmp_path / "out", *more)).done()
    drawn = 0
    for row in rows(tmp_path / "out"):
        for step in (step for choice in row["choices"] for step in choice["logprobs"]):
            assert step["logprob"] >= step["top"][0]["logprob"] + math.log(0.3) - 1e-4
            drawn += step["token_id"] != step["top"][0]["token_id"]
    assert drawn > 5, "not all greedy"


def test_a_checkpoint_that_does_not_sample_is_greedy(
    small_model: Path, varied: Path, greedy: Path, tmp_path: Path
) -> None:
    import json
    import shutil

    model = tmp_path / "model"
    shutil.copytree(small_model, model)
    stored = {"do_sample": False, "temperature": 0.7, "eos_token_id": 1}
    (model / "generation_config.json").write_text(json.dumps(stored))
    run_here(*args(model, varied, tmp_path / "out", "sampling=default")).done()
    assert results(tmp_path / "out")["completion"].to_pylist() == results(greedy)["completion"].to_pylist()
