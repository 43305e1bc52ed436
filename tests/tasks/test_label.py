"""The label task: distributions against SciPy, ties, abstentions, labels of a row's own, ends of answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from pipeline.core import Completion, FinishReason
from pipeline.errors import ConfigError
from pipeline.output.schema import output_fields
from pipeline.settings import TaskSettings
from pipeline.tasks.label import LabelTask

STOP = (90, 91)
NULL_IN_ERRORS = (
    "completion", "cumulative_logprob", "label", "label_probs", "label_logprob", "margin", "entropy",
)  # fmt: skip
ABC = {"alpha": "alpha", "beta": "beta", "gamma": "gamma"}


def encode(text: str) -> tuple[int, ...]:
    """Tokens that are characters."""
    return tuple(text.encode())


def task(labels: Any = None, *, is_chat: bool = True, stop: Sequence[int] = STOP, **settings: Any) -> LabelTask:
    asked = TaskSettings(kind="label", prompt="x", labels=ABC if labels is None else labels, **settings)
    return LabelTask(asked, encode, is_chat=is_chat, stop_token_ids=stop)


def scored(*logprobs: float) -> Completion:
    return Completion(request_id=0, prompt_tokens=5, finish_reason=FinishReason.STOP, candidate_logprobs=logprobs)


def failed(reason: str = "bad row") -> Completion:
    return Completion(request_id=0, prompt_tokens=0, finish_reason=FinishReason.ERROR, error=reason)


def result(made: LabelTask, completion: Completion, row: dict[str, Any] | None = None) -> dict[str, Any]:
    """The columns' values for one row."""
    columns = made.results([completion], [row or {}])
    assert {name: len(values) for name, values in columns.items()} == dict.fromkeys(columns, 1)
    return {name: values[0] for name, values in columns.items()}


def candidates(made: LabelTask, row: dict[str, Any] | None = None) -> list[str]:
    """What a row's request asks for, as text; ValueError with the reason if it cannot be asked."""
    (request,) = made.requests([("chunk", 0)], [row or {}])
    if isinstance(request, str):
        raise ValueError(request)
    assert request.prompt_ids == ()
    assert request.answer_tokens == max(map(len, request.candidates))
    return [bytes(ids).decode() for ids in request.candidates]


# --- distributions -----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.floats(-2000, 0), min_size=2, max_size=9))
def test_the_distribution_is_scipys(logprobs: list[float]) -> None:
    made = task({f"label {i}": str(i) for i in range(len(logprobs))})
    found = result(made, scored(*logprobs))
    probs = special.softmax(np.array(logprobs))
    names = [f"label {i}" for i in range(len(logprobs))]
    assert list(found["label_probs"]) == names
    assert list(found["label_probs"].values()) == pytest.approx(probs, rel=1e-9, abs=1e-300)
    assert sum(found["label_probs"].values()) == pytest.approx(1, abs=1e-12)
    assert list(found["label_logprob"].items()) == list(zip(names, logprobs, strict=True))
    assert found["entropy"] == pytest.approx(stats.entropy(probs), rel=1e-9, abs=1e-12)
    assert found["margin"] == pytest.approx(np.diff(np.sort(probs))[-1], rel=1e-9, abs=1e-12)
    assert found["label"] == names[int(np.argmax(logprobs))]
    assert found["cumulative_logprob"] == max(logprobs)


def test_equals_go_to_the_first_label() -> None:
    assert result(task(), scored(-2.0, -1.0, -1.0))["label"] == "beta"
    assert result(task(), scored(-1.0, -1.0, -1.0))["label"] == "alpha"
    even = result(task(), scored(-1.0, -1.0, -1.0))
    assert even["margin"] == 0
    assert even["entropy"] == pytest.approx(math.log(3))


def test_an_impossible_label_has_probability_zero() -> None:
    found = result(task(), scored(-1.0, -math.inf, -math.inf))
    assert list(found["label_probs"].values()) == [1.0, 0.0, 0.0]
    assert found["entropy"] == 0


@pytest.mark.parametrize(
    ("below", "label"), [(0.0, "alpha"), (0.5, "alpha"), (0.6, "alpha"), (0.61, None), (1.0, None)]
)
def test_the_task_abstains_below_the_threshold(below: float, label: str | None) -> None:
    logprobs = [math.log(p) for p in (0.6 + 1e-12, 0.3, 0.1)]
    found = result(task(abstain_below=below), scored(*logprobs))
    assert found["label"] == found["completion"] == label
    assert (found["cumulative_logprob"] is None) == (label is None)
    assert found["completion_tokens"] == (5 if label else 0)
    assert found["margin"] == pytest.approx(0.3), "the distribution is there all the same"
    assert len(found["label_probs"]) == 3


def test_error_rows_are_null() -> None:
    columns = task().results([failed(), scored(-1.0, -2.0, -3.0), failed()], [{}, {}, {}])
    for name in NULL_IN_ERRORS:
        assert [value is None for value in columns[name]] == [True, False, True], name
    assert columns["completion_tokens"] == [0, 5, 0]
    assert task().results([], []) == {name: [] for name in columns}


def test_the_columns_are_those_of_the_schema() -> None:
    common = {"row_id", "finish_reason", "error", "prompt_tokens"}
    assert set(task().results([], [])) == {field.name for field in output_fields("label")} - common


# --- what is asked -----------------------------------------------------------------------------------------------


def test_a_map_gives_each_label_the_text_that_stands_for_it() -> None:
    made = task({"positive": "yes", "negative": "no"})
    assert candidates(made) == ["yes", "no"]
    found = result(made, scored(-3.0, -1.0))
    assert (found["label"], found["completion"], found["completion_tokens"]) == ("negative", "no", 2)


@pytest.mark.parametrize(
    ("is_chat", "separator", "text"),
    [(True, None, "alpha"), (False, None, " alpha"), (False, "", "alpha"), (True, "\n", "\nalpha")],
)
def test_the_separator_between_prompt_and_label(is_chat: bool, separator: str | None, text: str) -> None:
    assert candidates(task(is_chat=is_chat, label_separator=separator))[0] == text


def test_labels_of_a_row_s_own() -> None:
    made = task("options")
    assert made.columns == ("options",)
    assert task().columns == ()
    rows = [{"options": ["x", "y"]}, {"options": ["long one", "z", "q"]}, {"options": ["y", "x"]}]
    assert [candidates(made, row) for row in rows] == [row["options"] for row in rows]
    columns = made.results([scored(-2.0, -1.0), failed(), scored(-1.0, -2.0)], rows)
    assert columns["label"] == ["y", None, "y"]
    assert [name for name, _ in columns["label_probs"][2]] == ["y", "x"]


@pytest.mark.parametrize(
    "labels", [None, [], ["one"], ["a", "a"], ["a", None], ["a", ""], ["a", 1], "ab", 3, [["a"], "b"], {"a": "b"}]
)
def test_unusable_labels_of_a_row_are_its_error(labels: Any) -> None:
    with pytest.raises(ValueError, match=r"^column options must hold at least two different, non-empty labels$"):
        candidates(task("options"), {"options": labels})
    assert result(task("options"), failed(), {"options": labels})["label"] is None


def test_labels_with_the_same_tokens_are_refused() -> None:
    def lowercase(text: str) -> tuple[int, ...]:
        return encode(text.lower())

    settings = TaskSettings(kind="label", prompt="x", labels={"a": "Yes", "b": "yes"})
    with pytest.raises(ConfigError, match=r"^task\.labels: two labels have the same tokens"):
        LabelTask(settings, lowercase, is_chat=True, stop_token_ids=STOP)
    own = LabelTask(
        TaskSettings(kind="label", prompt="x", labels="options"), lowercase, is_chat=True, stop_token_ids=()
    )
    with pytest.raises(ValueError, match=r"^two labels have the same tokens"):
        candidates(own, {"options": ["Yes", "yes"]})


def test_a_label_without_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^task\.labels: a label has no tokens"):
        LabelTask(
            TaskSettings(kind="label", prompt="x", labels=ABC), lambda text: (), is_chat=True, stop_token_ids=STOP
        )


# --- the end of the answer ---------------------------------------------------------------------------------------

PREFIX = {"no": "no", "not sure": "not sure"}
END = chr(STOP[0])


@pytest.mark.parametrize(
    ("labels", "label_eos", "asked"),
    [
        (ABC, None, ["alpha", "beta", "gamma"]),
        (PREFIX, None, [f"no{END}", f"not sure{END}"]),
        (PREFIX, False, ["no", "not sure"]),
        (ABC, True, [f"alpha{END}", f"beta{END}", f"gamma{END}"]),
    ],
)
def test_the_end_is_scored_where_one_label_begins_another(
    labels: dict[str, str], label_eos: bool | None, asked: list[str]
) -> None:
    assert candidates(task(labels, label_eos=label_eos)) == asked


def test_an_end_is_needed_only_where_it_is_scored() -> None:
    assert candidates(task(stop=())) == list(ABC)
    with pytest.raises(ConfigError, match=r"^task\.labels: one label's tokens begin another's"):
        task(PREFIX, stop=())
    with pytest.raises(ConfigError, match=r"^task\.label_eos=true, but the checkpoint names no end token"):
        task(label_eos=True, stop=())
    with pytest.raises(ValueError, match=r"^one label's tokens begin another's"):
        candidates(task("options", stop=()), {"options": ["no", "not sure"]})
