"""task=score from the command line against transformers: forwards in float32, tokenized here, summed in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import TICKETS, TINY, TOPICS, label_args, prompt, rows, run_cli, run_here, run_json, stats, write

EXACT = ["quant=none", "model.dtype=float32"]
NUM_ROWS = 14
TEMPLATE = "Which topic is this support ticket about?\n\n{{ ticket }}"
END = "<|end|>"
REPLIES = [
    "billing", " billing", "the customer asks about the shop, and wants an answer soon", f"login{END}", "é 🙂\n\n", "x"
]  # fmt: skip


@pytest.fixture(scope="module")
def tickets_14(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tickets, with a reply each."""
    table = pq.read_table(TICKETS).slice(40, NUM_ROWS)
    replies = [REPLIES[n % len(REPLIES)] * (1 + n // len(REPLIES)) for n in range(NUM_ROWS)]
    return write(tmp_path_factory.mktemp("score") / "t.parquet", table.append_column("reply", pa.array(replies)))


@pytest.fixture
def score(tickets_14: Path, tmp_path: Path) -> Any:
    """Score with the shipped model in float32; gives the rows."""

    def run(*overrides: str, data: Path = tickets_14, model: Path = TINY, out: str = "out") -> list[dict[str, Any]]:
        where = ["model=path", f"model.path={model}", f"data.path={data}", f"output.dir={tmp_path / out}"]
        run_here("task=score", *where, *EXACT, *overrides).done()
        return rows(tmp_path / out)

    return run


def logprobs(reference: Any, text: str, *, special: bool) -> tuple[list[int], list[float]]:
    """The text's tokens, and the log-probability of each from the second one on."""
    import torch

    model, tokenizer = reference
    ids = tokenizer(text, add_special_tokens=special).input_ids
    with torch.no_grad():
        steps = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
    return ids, [float(steps[place - 1, ids[place]]) for place in range(1, len(ids))]


def chat(reference: Any, ticket: str) -> str:
    messages = [{"role": "user", "content": TEMPLATE.replace("{{ ticket }}", ticket)}]
    text: str = reference[1].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def check(row: dict[str, Any], reference: Any, before: str, target: str, *, special: bool) -> None:
    """A row's numbers against prompt and target as one text."""
    prompt_ids = reference[1](before, add_special_tokens=special).input_ids
    ids, steps = logprobs(reference, before + target, special=special)
    assert ids[: len(prompt_ids)] == prompt_ids, "the target's tokens are not separable"
    assert (row["finish_reason"], row["error"]) == ("stop", None)
    assert (row["completion"], row["completion_tokens"]) == (None, 0)
    assert row["prompt_tokens"] == len(prompt_ids)
    assert row["target_tokens"] == len(ids) - len(prompt_ids)
    expected = math.fsum(steps[len(prompt_ids) - 1 :])
    assert row["target_logprob"] == row["cumulative_logprob"] == pytest.approx(expected, abs=1e-4)
    if "prompt_logprob" in row:
        assert row["prompt_logprob"] == pytest.approx(math.fsum(steps[: len(prompt_ids) - 1]), abs=1e-3)


def test_targets_behind_a_chat(score: Any, tiny_reference: Any) -> None:
    scored = score("task.target=reply", prompt(TEMPLATE), "task.prompt_logprob=true")
    assert list(scored[0])[-3:] == ["target_logprob", "target_tokens", "prompt_logprob"]
    assert {row["target_tokens"] for row in scored} > {1, 2}
    for row in scored:
        check(row, tiny_reference, chat(tiny_reference, row["ticket"]), row["reply"], special=False)


def test_targets_behind_a_plain_prompt(score: Any, tiny_reference: Any) -> None:
    """A target is scored as it stands: no blank is put in front of it."""
    scored = score("task.target=reply", prompt("Ticket: {{ ticket }}\nReply:"), "task.chat=false")
    for row in scored:
        check(row, tiny_reference, f"Ticket: {row['ticket']}\nReply:", row["reply"], special=True)


def test_prompts_themselves_from_the_second_token_on(
    score: Any, small_model: Path, small_reference: Any, varied: Path, tmp_path: Path
) -> None:
    """A corpus: plain texts, <|bos|> in front, of one word to 300 tokens; perplexities as DuckDB sums them up."""
    scored = score("task.chat=false", data=varied, model=small_model)
    nats = tokens = 0.0
    for row in scored:
        ids, steps = logprobs(small_reference, row["prompt"], special=True)
        assert row["prompt_tokens"] == len(ids) == row["target_tokens"] + 1
        assert row["target_logprob"] == pytest.approx(math.fsum(steps), abs=2e-5 * len(ids))
        nats, tokens = nats - math.fsum(steps), tokens + len(steps)
    query = f"select exp(-sum(target_logprob) / sum(target_tokens)) from '{tmp_path}/out/results/*.parquet'"
    ((perplexity,),) = duckdb.sql(query).fetchall()
    assert perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_single_tokens_on_request(score: Any, tiny_reference: Any) -> None:
    scored = score("task.target=reply", prompt(TEMPLATE), "sampling.logprobs=2")
    plain = score("task.target=reply", prompt(TEMPLATE), out="plain")
    assert [{k: v for k, v in row.items() if k not in ("token_ids", "logprobs")} for row in scored] == plain
    for row in scored:
        before = chat(tiny_reference, row["ticket"])
        ids, steps = logprobs(tiny_reference, before + row["reply"], special=False)
        assert row["token_ids"] == [step["token_id"] for step in row["logprobs"]] == ids[-row["target_tokens"] :]
        found = [step["logprob"] for step in row["logprobs"]]
        assert found == pytest.approx(steps[-len(found) :], abs=1e-4)
        assert math.fsum(found) == row["target_logprob"]
        assert all(len(step["top"]) == 2 for step in row["logprobs"])


def test_a_label_s_log_probability_is_the_score_of_the_same_text(score: Any, tickets_14: Path, tmp_path: Path) -> None:
    where = ["model=path", f"model.path={TINY}", f"data.path={tickets_14}", prompt(TEMPLATE), *EXACT]
    run_here(*where, *label_args(), f"output.dir={tmp_path / 'labels'}").done()
    many = {"long": "the customer asks about billing", "short": "crash"}
    run_here(*where, *label_args(many), "task.label_eos=false", f"output.dir={tmp_path / 'many'}").done()
    texts = {**{name: name for name in TOPICS}, **many}
    table = pq.read_table(tickets_14)
    for name, text in texts.items():
        data = write(tmp_path / f"{name}.parquet", table.append_column("text", pa.array([text] * NUM_ROWS)))
        scored = score("task.target=text", prompt(TEMPLATE), data=data, out=f"score-{name}")
        labelled = rows(tmp_path / ("many" if name in many else "labels"))
        for one, other in zip(scored, labelled, strict=True):
            expected = other["label_logprob"][name]
            assert one["target_logprob"] == pytest.approx(expected, abs=1e-4)
            assert name in many or one["target_logprob"] == expected, "one token: the same bits"


def test_rows_that_cannot_be_scored(score: Any, tmp_path: Path) -> None:
    targets = ["fine", None, "", "fine", "fine"]
    prompts = ["a", "b", "c", None, "word " * 2000]
    data = write(tmp_path / "bad.parquet", {"prompt": prompts, "t": targets})
    scored = score("task.target=t", data=data)
    assert [row["finish_reason"] for row in scored] == ["stop", "error", "error", "error", "error"]
    for row, reason in zip(scored[1:], ("t is null", "t is an empty text", "null", "more than the"), strict=True):
        assert reason in row["error"]
        assert row["target_logprob"] is row["cumulative_logprob"] is row["completion"] is None
        assert row["target_tokens"] == row["completion_tokens"] == 0
    assert [row["prompt_tokens"] > 0 for row in scored] == [True, True, True, False, True]
    numbers = write(tmp_path / "numbers.parquet", {"prompt": ["a"], "t": [7]})
    (row,) = score("task.target=t", data=numbers, out="numbers")
    assert row["error"] == "column t is int, not text; there is nothing to score"


def test_a_prompt_of_one_token_has_nothing_to_score(score: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "one.parquet", {"prompt": ["x", "x y"]})
    one, two = score("task.chat=false", data=data)
    assert one["error"] == "the prompt has 1 token; it is scored from its second one on"
    assert (one["prompt_tokens"], one["target_tokens"], one["target_logprob"]) == (1, 0, None)
    assert two["target_tokens"] == two["prompt_tokens"] - 1 == 1


@pytest.mark.parametrize("side", ["truncate_left", "truncate_right"])
def test_a_long_prompt_is_cut_and_the_target_is_not(side: str, score: Any, tmp_path: Path, tiny_reference: Any) -> None:
    """Each row's prompt is cut to the room that its own target leaves."""
    tokenizer = tiny_reference[1]
    news = [" ".join(f"n{i}" for i in range(count)) for count in (3, 200, 200, 200)]
    targets = ["short", "short", " ".join(["longer"] * 20), " ".join(["longest"] * 90)]
    data = write(tmp_path / "long.parquet", {"news": news, "t": targets})
    more = ["task.target=t", prompt("News: {{ news }} End:"), "task.chat=false", "model.max_len=64"]
    scored = score(*more, f"task.too_long={side}", "sampling.logprobs=true", data=data)
    for row in scored[:3]:
        assert row["error"] is None
        assert tokenizer.decode(row["token_ids"]) == row["t"]
    assert [row["prompt_tokens"] + row["target_tokens"] for row in scored[1:3]] == [64, 64]
    assert scored[0]["prompt_tokens"] < 40
    too_long = scored[3]
    assert too_long["finish_reason"] == "error"
    assert "of its target is more than the 64 there is room for" in too_long["error"]
    refused = score(*more, data=data, out="refused")
    assert [row["error"] is None for row in refused] == [True, False, False, False]


def test_a_corpus_is_cut_to_the_whole_row(score: Any, tmp_path: Path) -> None:
    """Nothing stands behind the prompt, so it may have all the room there is."""
    data = write(tmp_path / "long.parquet", {"prompt": ["word " * 300]})
    more = ["task.chat=false", "model.max_len=64", "task.too_long=truncate_right"]
    (row,) = score(*more, data=data)
    assert (row["prompt_tokens"], row["target_tokens"]) == (64, 63)


def test_conversations_are_scored_too(score: Any, tmp_path: Path, tiny_reference: Any) -> None:
    talk = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "?"},
    ]
    data = write(tmp_path / "talk.parquet", {"talk": [talk], "t": ["billing, please"]})
    (row,) = score("task.messages=talk", "task.target=t", data=data)
    before = tiny_reference[1].apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    check(row, tiny_reference, before, "billing, please", special=False)


def test_a_target_that_is_no_column_is_refused(tickets_14: Path, tmp_path: Path) -> None:
    args = ["task=score", "model=tiny", f"data.path={tickets_14}", f"output.dir={tmp_path / 'out'}", prompt(TEMPLATE)]
    message = run_here(*args, "task.target=nosuch").refusal()
    assert message.startswith("task.target=nosuch is no column; the columns are ")


def test_a_target_column_need_not_be_kept(score: Any, tickets_14: Path, tmp_path: Path) -> None:
    """The answers of an earlier run are in columns whose names the results need."""
    table = pq.read_table(tickets_14).rename_columns({"reply": "completion"})
    data = write(tmp_path / "earlier.parquet", table)
    scored = score("task.target=completion", prompt(TEMPLATE), "output.columns=[ticket]", data=data)
    again = score("task.target=reply", prompt(TEMPLATE), out="again")
    assert [row["target_logprob"] for row in scored] == [row["target_logprob"] for row in again]
    assert scored[0]["completion"] is None


def test_no_rows_give_the_schema(tmp_path: Path) -> None:
    data = write(tmp_path / "empty.parquet", {"prompt": pa.array([], pa.string()), "t": pa.array([], pa.string())})
    run_here("task=score", "task.target=t", f"data.path={data}", f"output.dir={tmp_path / 'out'}").done()
    found = pq.read_table(tmp_path / "out" / "results").schema
    assert found.field("target_logprob").type == pa.float64()
    assert found.field("target_tokens").type == pa.int32()


def test_the_rates_count_the_targets(tickets_14: Path, tmp_path: Path) -> None:
    args = ["task=score", "model=tiny", f"data.path={tickets_14}", "task.target=reply", prompt(TEMPLATE)]
    ended = run_cli(*args, f"output.dir={tmp_path / 'out'}").done()
    counted = sum(row["target_tokens"] for row in rows(tmp_path / "out"))
    (run,) = stats(tmp_path / "out")
    assert run["target_tokens"] == run_json(tmp_path / "out")["summary"]["target_tokens"] == counted > 0
    assert run["tokens_per_s"] == pytest.approx((run["prompt_tokens"] + counted) / run["generate_s"])
    assert f" + 0 completion + {counted:,} target tokens in " in ended.out
