"""Accuracy over Parts, against scikit-learn and pandas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score

from pipeline.evaluate.truth import Accuracy, accuracy

NAMES = ["billing", "login", "crash"]


def write(folder: Path, labels: list[str | None], truth: pa.Array, parts: int = 1) -> Path:
    """Results in several Parts, with a column between that accuracy has no use for."""
    folder.mkdir(exist_ok=True)
    table = pa.table({"topic": truth, "text": ["x"] * len(labels), "label": pa.array(labels, pa.string())})
    size = -(-len(labels) // parts) or 1
    for number in range(parts):
        pq.write_table(table.slice(number * size, size), folder / f"part-{number:06d}.parquet", row_group_size=3)
    return folder


def judge(tmp_path: Path, labels: list[str | None], truth: pa.Array | list[Any], parts: int = 1) -> Accuracy:
    array = truth if isinstance(truth, pa.Array) else pa.array(truth)
    return accuracy(ds.dataset(write(tmp_path / "results", labels, array, parts)), "topic")


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.sampled_from([*NAMES, None]), st.sampled_from([*NAMES, "other", None])), max_size=40),
    parts=st.integers(1, 4),
)
def test_as_scikit_learn_and_pandas_have_it(
    rows: list[tuple[str | None, str | None]], parts: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    frame = pd.DataFrame(rows, columns=["label", "topic"], dtype=object)
    truth = pa.array(frame["topic"].tolist(), pa.string())
    found = judge(tmp_path_factory.mktemp("truth"), frame["label"].tolist(), truth, parts)
    judged = frame[frame["topic"].notna()].fillna("(no label)")
    assert found.judged == len(judged)
    assert found.correct == (judged["label"] == judged["topic"]).sum()
    if len(judged):
        assert found.value == pytest.approx(accuracy_score(judged["topic"], judged["label"]))
    else:
        assert found.value is None


def test_abstentions_and_error_rows_are_wrong_and_rows_without_truth_do_not_count(tmp_path: Path) -> None:
    found = judge(tmp_path, ["a", None, "b", "a", None], ["a", "a", "a", None, None], parts=2)
    assert (found.judged, found.correct, found.value) == (3, 1, pytest.approx(1 / 3))


@pytest.mark.parametrize(
    ("labels", "truth", "correct"),
    [
        (["1", "2", "10"], pa.array([1, 2, 3], pa.int64()), 2),
        (["1", "2", "3"], pa.array([1, None, 3], pa.uint8()), 2),
        (["1", "2", "2.5"], pa.array([1.0, 2.0, 2.5]), 3),
        (["true", "false", "True"], pa.array([True, False, True]), 2),
        (["a", "b", "c"], pa.array(["a", "b", "x"]).dictionary_encode(), 2),
        (["a", "b", "c"], pa.array(["a", "b", "x"], pa.large_string()), 2),
        (["a", "b", "c"], pa.array(["a", "b", "x"], pa.string_view()), 2),
        (["a", "b", "c"], pa.nulls(3), 0),
        (["2026-01-31", "b", "c"], pa.array(["2026-01-31"] * 3).cast(pa.date32()), 1),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_truth_of_other_types_is_compared_as_text(
    labels: list[str | None], truth: pa.Array, correct: int, tmp_path: Path
) -> None:
    found = judge(tmp_path, labels, truth)
    assert (found.judged, found.correct) == (len(truth) - truth.null_count, correct)


def test_case_and_spaces_matter(tmp_path: Path) -> None:
    assert judge(tmp_path, ["a", "a", "a"], ["A", " a", "a"]).correct == 1


def test_no_rows(tmp_path: Path) -> None:
    assert judge(tmp_path, [], pa.array([], pa.string())) == Accuracy(judged=0, correct=0)
    assert Accuracy(judged=0, correct=0).value is None
