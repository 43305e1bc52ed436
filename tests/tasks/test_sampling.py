"""Rows with sampling parameters of their own."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core import Request, SamplingParams
from pipeline.tasks.generate import GenerateTask
from pipeline.tasks.sampling import row_params

BASE = SamplingParams(max_new_tokens=9, temperature=0.5, seed=4, stop_token_ids=(1, 2), stop=("x",))
GOOD = [
    ("max_new_tokens", 3, 3),
    ("max_new_tokens", 3.0, 3),
    ("temperature", 0, 0.0),
    ("temperature", 1.5, 1.5),
    ("top_k", 5, 5),
    ("top_p", 0.5, 0.5),
    ("min_p", 0.1, 0.1),
    ("repetition_penalty", 1.2, 1.2),
    ("seed", 2**63, 2**63),
    ("n", 2, 2),
    ("stop", "END", ("END",)),
    ("stop", ["a", "b"], ("a", "b")),
    ("stop", [], ()),
    ("stop_token_ids", 7, (1, 2, 7)),
    ("stop_token_ids", [7, 2, 8], (1, 2, 7, 8)),
    ("logprobs", True, 0),
    ("logprobs", False, None),
    ("logprobs", 3, 3),
]
BAD = [
    ("max_new_tokens", 0, r"sampling\.max_new_tokens must be at least 1, got 0"),
    ("max_new_tokens", 2.5, r"column c holds 2\.5, which is no max_new_tokens"),
    ("max_new_tokens", float("nan"), r"column c holds nan, which is no max_new_tokens"),
    ("max_new_tokens", float("inf"), r"column c holds inf, which is no max_new_tokens"),
    ("max_new_tokens", True, r"column c holds True, which is no max_new_tokens"),
    ("temperature", -1, r"sampling\.temperature must be 0"),
    ("temperature", float("nan"), r"sampling\.temperature must be"),
    ("temperature", float("inf"), r"sampling\.temperature must be"),
    ("temperature", "hot", r"column c holds 'hot', which is no temperature"),
    ("temperature", [1], r"column c holds \[1\], which is no temperature"),
    ("top_p", 0, r"sampling\.top_p must be above 0"),
    ("seed", -1, r"sampling\.seed must be"),
    ("seed", "x", r"column c holds 'x', which is no seed"),
    ("n", 0, r"sampling\.n must be at least 1"),
    ("stop", [""], r"sampling\.stop must be"),
    ("stop", 3.5, r"column c holds 3\.5, which is no stop"),
    ("stop", [None], r"column c holds \[None\], which is no stop"),
    ("stop_token_ids", [-1], r"sampling\.stop_token_ids must be"),
    ("stop_token_ids", ["a"], r"column c holds \['a'\], which is no stop_token_ids"),
    ("stop_token_ids", [1.5], r"column c holds \[1\.5\], which is no stop_token_ids"),
    ("logprobs", 21, r"sampling\.logprobs must be"),
    ("logprobs", "all", r"column c holds 'all', which is no logprobs"),
    ("logprobs", 1.5, r"column c holds 1\.5, which is no logprobs"),
]


def test_every_parameter_can_come_from_a_column() -> None:
    assert {name for name, _, _ in GOOD} == {field.name for field in fields(SamplingParams)}


@pytest.mark.parametrize(("name", "value", "expected"), GOOD)
def test_a_row_s_own_value_takes_the_run_s_place(name: str, value: Any, expected: Any) -> None:
    found = row_params(BASE, {name: "c"}, {"c": value, "other": 3})
    assert getattr(found, name) == expected
    assert type(getattr(found, name)) is type(expected)
    for field in fields(SamplingParams):
        if field.name != name:
            assert getattr(found, field.name) == getattr(BASE, field.name)


@pytest.mark.parametrize("name", [field.name for field in fields(SamplingParams)])
def test_a_null_keeps_the_run_s_value(name: str) -> None:
    assert row_params(BASE, {name: "c"}, {"c": None}) == BASE


@pytest.mark.parametrize(("name", "value", "reason"), BAD, ids=[f"{name}={value}" for name, value, _ in BAD])
def test_an_unusable_value_is_the_row_s_error(name: str, value: Any, reason: str) -> None:
    task = GenerateTask(BASE, lambda ids: [], {name: "c"})
    assert task.columns == ("c",)
    refused, taken = task.requests([("chunk", 0), ("chunk", 1)], [{"c": value}, {"c": None}])
    assert isinstance(refused, str) and re.search(reason, refused)
    assert "\n" not in refused
    assert taken == Request(id=("chunk", 1), prompt_ids=(), sampling=BASE)


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=2)
NAMES = st.sampled_from([field.name for field in fields(SamplingParams)])


@given(name=NAMES, value=VALUES | st.lists(VALUES, max_size=3))
def test_any_value_is_taken_or_refused(name: str, value: Any) -> None:
    """Never anything but a ValueError, which is what makes an error row."""
    try:
        found = row_params(BASE, {name: "c"}, {"c": value})
    except ValueError as error:
        assert str(error)
        return
    assert isinstance(found, SamplingParams)
