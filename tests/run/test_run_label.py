"""task=label against transformers: a full forward per label, in float32."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import TICKETS, TINY, TOPICS, label_args, prompt, results, rows, run_here, write

NUM_ROWS = 12
VERBOSE = {
    "money": "The customer asks about billing",
    "door": "The customer asks about login",
    "parcel": "shipping",
    "parcel, late": "shipping is late",
}
EXACT = ["model.dtype=float32", "quant=none"]
TEMPLATE = "Which topic is this support ticket about?\n\n{{ ticket }}"
END = "<|end|>"


@pytest.fixture(scope="module")
def tickets_12(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("tickets") / "t.parquet", pq.read_table(TICKETS).slice(300, NUM_ROWS))


@pytest.fixture
def label(tickets_12: Path, tmp_path: Path) -> Any:
    """Label the twelve tickets with the shipped model in float32; gives the rows."""

    def run(*overrides: str, data: Path = tickets_12) -> list[dict[str, Any]]:
        out = tmp_path / "out"
        run_here(f"data.path={data}", f"output.dir={out}", prompt(TEMPLATE), *EXACT, *overrides).done()
        return rows(out)

    return run


def logprob(reference: Any, before: str, answer: str, *, chat: bool = True) -> float:
    """Summed log-probability of the answer's tokens behind the text, tokenized as one text."""
    import torch

    model, tokenizer = reference
    prompt_ids = tokenizer(before, add_special_tokens=not chat).input_ids
    ids = tokenizer(before + answer, add_special_tokens=not chat).input_ids
    assert ids[: len(prompt_ids)] == prompt_ids, "the label's tokens are not separable"
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
    return sum(float(logprobs[place - 1, ids[place]]) for place in range(len(prompt_ids), len(ids)))


def chat(reference: Any, row: Mapping[str, Any], system: str | None = None) -> str:
    messages = [{"role": "user", "content": TEMPLATE.replace("{{ ticket }}", row["ticket"])}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    text: str = reference[1].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def check(row: Mapping[str, Any], expected: Mapping[str, float]) -> None:
    """Log-probabilities, distribution and label of a row against the reference's log-probabilities."""
    logprobs, probs = dict(row["label_logprob"]), dict(row["label_probs"])
    assert list(logprobs) == list(probs) == list(expected)
    assert logprobs == pytest.approx(dict(expected), abs=1e-4)
    total = sum(math.exp(x) for x in expected.values())
    assert probs == pytest.approx({name: math.exp(x) / total for name, x in expected.items()}, abs=1e-4)
    assert row["label"] == max(probs, key=probs.__getitem__)


def test_one_token_labels_in_a_chat(label: Any, tiny_reference: Any) -> None:
    for row in label(*label_args()):
        before = chat(tiny_reference, row)
        check(row, {name: logprob(tiny_reference, before, name) for name in TOPICS})
        assert row["prompt_tokens"] == len(tiny_reference[1](before, add_special_tokens=False).input_ids)
        assert row["completion"] == row["label"]


def test_many_token_labels_that_begin_each_other_are_scored_with_their_end(label: Any, tiny_reference: Any) -> None:
    lengths = {name: len(tiny_reference[1](text, add_special_tokens=False).input_ids) for name, text in VERBOSE.items()}
    assert min(lengths.values()) < max(lengths.values())
    for row in label(*label_args(VERBOSE)):
        before = chat(tiny_reference, row)
        check(row, {name: logprob(tiny_reference, before, text + END) for name, text in VERBOSE.items()})
        assert row["completion"] == VERBOSE[row["label"]]
        assert row["completion_tokens"] == lengths[row["label"]] + 1


def test_label_eos_false_scores_the_text_alone(label: Any, tiny_reference: Any) -> None:
    for row in label(*label_args(VERBOSE), "task.label_eos=false"):
        before = chat(tiny_reference, row)
        check(row, {name: logprob(tiny_reference, before, text) for name, text in VERBOSE.items()})


def test_label_eos_true_and_a_separator(label: Any, tiny_reference: Any) -> None:
    extra = ["task.label_eos=true", "task.label_separator=' '", "task.system='Answer shortly.'"]
    for row in label(*label_args(TOPICS[:3]), *extra):
        before = chat(tiny_reference, row, "Answer shortly.")
        check(row, {name: logprob(tiny_reference, before, f" {name}{END}") for name in TOPICS[:3]})


def test_a_plain_prompt_continues_with_a_space(label: Any, tiny_reference: Any) -> None:
    template = "Ticket: {{ ticket }}\nTopic:"
    for row in label(*label_args(TOPICS[:3]), "task.chat=false", prompt(template)):
        before = template.replace("{{ ticket }}", row["ticket"])
        check(row, {name: logprob(tiny_reference, before, f" {name}", chat=False) for name in TOPICS[:3]})


def test_labels_from_a_column_are_each_rows_own(label: Any, tiny_reference: Any, tmp_path: Path) -> None:
    table = pq.read_table(TICKETS).slice(0, 8)
    own: list[Sequence[str | None] | None] = [
        ["billing", "login"],
        ["login", "billing", "crash"],
        ["a shipping problem", "crash"],
        None,
        ["billing"],
        ["billing", "billing"],
        ["billing", None],
        ["billing", ""],
    ]
    data = write(tmp_path / "own.parquet", table.append_column("choices", pa.array(own, pa.list_(pa.string()))))
    answered = label("task=label", "task.labels=choices", data=data)
    for row in answered[:3]:
        before = chat(tiny_reference, row)
        check(row, {name: logprob(tiny_reference, before, name) for name in row["choices"]})
    for row in answered[3:]:
        assert row["finish_reason"] == "error"
        assert "choices" in row["error"]
        assert row["label"] is row["label_probs"] is row["margin"] is row["completion"] is None
        assert row["prompt_tokens"] > 0


def test_abstaining_leaves_the_distribution(label: Any, tmp_path: Path) -> None:
    answered = label(*label_args(), "task.abstain_below=0.3", "task.truth=topic")
    best = [max(dict(row["label_probs"]).values()) for row in answered]
    assert min(best) < 0.3 < max(best), "else the threshold tests nothing"
    for row, probability in zip(answered, best, strict=True):
        assert (row["label"] is None) == (probability < 0.3)
        assert (row["completion"] is None) == (row["label"] is None)
        assert row["finish_reason"] == "stop" and row["error"] is None
        assert len(row["label_probs"]) == len(TOPICS)


def test_accuracy_is_the_share_of_labels_that_are_true(tickets_12: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = run_here(
        f"data.path={tickets_12}", f"output.dir={out}", prompt(TEMPLATE), *label_args(), "task.truth=topic"
    ).done()
    table = results(out)
    right = sum(a == b for a, b in zip(table["label"].to_pylist(), table["topic"].to_pylist(), strict=True))
    assert f"accuracy   {100 * right / NUM_ROWS:.1f} % of {NUM_ROWS} rows (column topic)" in ended.out
    assert TINY.is_dir()
