"""The score task: which texts can be scored, what is asked of the engine, and the columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from pipeline.core import Completion, FinishReason, Request, SamplingParams, TokenLogprob
from pipeline.output.schema import output_fields
from pipeline.tasks.score import ScoreTask

ASKED = ("token_ids", "logprobs", "prompt_logprob")
STEPS = (
    TokenLogprob(token_id=7, logprob=-1.0, top=((9, -0.5),)),
    TokenLogprob(token_id=8, logprob=-2.0, top=((8, -2.0),)),
)
SCORED = Completion(
    request_id=0, prompt_tokens=5, finish_reason=FinishReason.STOP, target_tokens=2, cumulative_logprob=-3.0,
    prompt_logprob=-11.0, logprobs=STEPS,
)  # fmt: skip
FAILED = Completion(request_id=0, prompt_tokens=4, finish_reason=FinishReason.ERROR, error="bad row")


class Encoder:
    """Tokens that are bytes, blanks left out; notes how often it is asked."""

    def __init__(self) -> None:
        self.calls: list[Sequence[str]] = []

    def __call__(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        self.calls.append(texts)
        return [tuple(text.replace(" ", "").encode()) for text in texts]


def asked(task: ScoreTask, *rows: dict[str, Any]) -> list[Request | str]:
    return task.requests([("chunk", n) for n in range(len(rows))], rows)


def test_targets_are_tokenized_together_and_bad_ones_are_said() -> None:
    encode = Encoder()
    task = ScoreTask("t", encode)
    assert task.columns == ("t",)
    values: list[Any] = ["ab", None, "", 7, 1.5, [1], "  ", "\ud83d", "c"]
    first, *bad, last = asked(task, *({"t": value} for value in values))
    assert first == Request(id=("chunk", 0), prompt_ids=(), target_ids=tuple(b"ab"))
    assert last == Request(id=("chunk", 8), prompt_ids=(), target_ids=tuple(b"c"))
    assert encode.calls == [["ab", "  ", "c"]]
    assert bad[:6] == [
        "column t is null; there is nothing to score",
        "column t is an empty text; there is nothing to score",
        "column t is int, not text; there is nothing to score",
        "column t is float, not text; there is nothing to score",
        "column t is list, not text; there is nothing to score",
        "column t holds '  ', which has no tokens to score",
    ]
    assert str(bad[6]).startswith("column t holds no valid text")


def test_without_a_target_the_prompt_is_scored() -> None:
    task = ScoreTask(None, Encoder())
    assert task.columns == ()
    assert asked(task, {}) == [Request(id=("chunk", 0), prompt_ids=(), score_prompt=True)]


def test_the_prompt_s_own_sum_is_only_computed_on_request() -> None:
    (request,) = asked(ScoreTask("t", Encoder(), on_request=("prompt_logprob",)), {"t": "a"})
    assert isinstance(request, Request) and request.score_prompt
    (request,) = asked(ScoreTask("t", Encoder()), {"t": "a"})
    assert isinstance(request, Request) and not request.score_prompt


def test_single_tokens_for_the_run_and_for_a_row() -> None:
    columns = {"logprobs": "k", "temperature": "heat"}
    task = ScoreTask("t", Encoder(), logprobs=2, sampling_columns=columns)
    assert task.columns == ("t", "k"), "nothing is drawn, so a temperature is not looked at"
    own, unset, bad = asked(task, {"t": "a", "k": 5}, {"t": "a", "k": None}, {"t": "a", "k": 99})
    assert isinstance(own, Request) and own.sampling == SamplingParams(logprobs=5)
    assert isinstance(unset, Request) and unset.sampling == SamplingParams(logprobs=2)
    assert "logprobs must be" in str(bad)


def test_columns_of_a_target() -> None:
    columns = ScoreTask("t", Encoder(), on_request=ASKED).results([SCORED, FAILED], [{}, {}])
    assert columns == {
        "completion": [None, None],
        "completion_tokens": [0, 0],
        "cumulative_logprob": [-3.0, None],
        "target_logprob": [-3.0, None],
        "target_tokens": [2, 0],
        "token_ids": [[7, 8], None],
        "logprobs": [
            [
                {"token_id": 7, "logprob": -1.0, "top": [{"token_id": 9, "logprob": -0.5}]},
                {"token_id": 8, "logprob": -2.0, "top": [{"token_id": 8, "logprob": -2.0}]},
            ],
            None,
        ],
        "prompt_logprob": [-11.0, None],
    }


def test_columns_of_a_prompt() -> None:
    prompt = Completion(request_id=0, prompt_tokens=3, finish_reason=FinishReason.STOP, prompt_logprob=-3.0)
    columns = ScoreTask(None, Encoder()).results([prompt, FAILED], [{}, {}])
    assert columns["target_logprob"] == columns["cumulative_logprob"] == [-3.0, None]
    assert columns["target_tokens"] == [2, 0], "from the second token on"


@pytest.mark.parametrize("on_request", [(), ASKED])
def test_the_columns_are_those_of_the_schema(on_request: tuple[str, ...]) -> None:
    common = {"row_id", "finish_reason", "error", "prompt_tokens"}
    columns = ScoreTask("t", Encoder(), on_request=on_request).results([SCORED], [{}])
    assert common | set(columns) == {field.name for field in output_fields("score", on_request)}
