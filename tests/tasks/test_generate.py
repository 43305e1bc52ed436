"""The generate task's columns, and where the sampling parameters come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import PACKAGE
from pipeline.core import Completion, FinishReason, Request, SamplingParams
from pipeline.data.source import Chunk
from pipeline.errors import ConfigError
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.models.tokenizer import Tokenizer
from pipeline.output.schema import output_fields
from pipeline.settings import SamplingSettings
from pipeline.tasks.generate import GenerateTask
from pipeline.tasks.sampling import sampling_params
from pipeline.tasks.task import common_results

FROM_CHECKPOINT = SamplingSettings(temperature=None, top_k=None, top_p=None)


def answered(*token_ids: int, reason: FinishReason = FinishReason.STOP, logprob: float = -1.5) -> Completion:
    return Completion(
        request_id=0, prompt_tokens=4, finish_reason=reason, token_ids=token_ids, cumulative_logprob=logprob
    )


FAILED = Completion(request_id=0, prompt_tokens=0, finish_reason=FinishReason.ERROR, error="the row is too long")


def checkpoint(folder: Path, generation: dict[str, Any] | None, **config: Any) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return open_checkpoint(str(folder))


# --- columns -----------------------------------------------------------------------------------------------------


def test_answers_are_decoded_and_counted() -> None:
    tokenizer = Tokenizer(str(PACKAGE / "assets" / "tiny"))
    texts = ["billing", "", "é🙂 two words"]
    ids = tokenizer.encode(texts, add_special_tokens=False)
    completions = [answered(*ids[0]), answered(), FAILED, answered(*ids[2], reason=FinishReason.LENGTH)]
    columns = GenerateTask(SamplingParams(), tokenizer.decode).results(completions, [{}] * 4)
    assert columns == {
        "completion": ["billing", "", None, "é🙂 two words"],
        "completion_tokens": [len(ids[0]), 0, 0, len(ids[2])],
        "cumulative_logprob": [-1.5, -1.5, None, -1.5],
    }


def test_the_columns_are_those_of_the_schema() -> None:
    chunk = Chunk(file_ordinal=2, first_row=100, num_rows=2)
    task = GenerateTask(SamplingParams(), lambda ids: ["text" for _ in ids])
    completions = [answered(7), FAILED]
    columns = common_results(chunk, range(2), completions) | task.results(completions, [{}, {}])
    assert set(columns) == {field.name for field in output_fields("generate")}
    assert columns["row_id"] == ["000002-000000000100", "000002-000000000101"]
    assert columns["finish_reason"] == ["stop", "error"]
    assert columns["error"] == [None, "the row is too long"]
    assert columns["prompt_tokens"] == [4, 0]


def test_a_request_has_the_run_s_sampling() -> None:
    sampling = SamplingParams(max_new_tokens=3, stop_token_ids=(1,))
    (request,) = GenerateTask(sampling, lambda ids: []).requests([("chunk", 7)], [{}])
    assert request == Request(id=("chunk", 7), prompt_ids=(), sampling=sampling)
    assert request.answer_tokens == 3


# --- sampling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"temperature": 0.6, "top_k": 20, "top_p": 0.95}, (0.6, 20, 0.95)),
        ({"temperature": 0.6}, (0.6, 0, 1.0)),
        ({"temperature": None, "top_k": None, "top_p": None}, (1.0, 0, 1.0)),
        ({}, (1.0, 0, 1.0)),
        (None, (1.0, 0, 1.0)),
    ],
)
def test_null_is_what_the_checkpoint_says(
    generation: dict[str, Any] | None, expected: tuple[float, int, float], tmp_path: Path
) -> None:
    found = sampling_params(FROM_CHECKPOINT, checkpoint(tmp_path, generation))
    assert (found.temperature, found.top_k, found.top_p) == expected


def test_what_is_set_wins_over_the_checkpoint(tmp_path: Path) -> None:
    stored = checkpoint(tmp_path, {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_new_tokens": 5})
    found = sampling_params(SamplingSettings(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=9, seed=3), stored)
    assert (found.temperature, found.top_k, found.top_p) == (0.0, 0, 1.0)
    assert (found.max_new_tokens, found.seed) == (9, 3)


@pytest.mark.parametrize(
    ("generation", "config", "asked", "stops"),
    [
        ({"eos_token_id": 2}, {}, (), (2,)),
        ({"eos_token_id": [2, 7]}, {"eos_token_id": 9}, (), (2, 7)),
        ({"eos_token_id": [2, 7]}, {}, (7, 5, 5), (2, 7, 5)),
        ({"eos_token_id": None}, {"eos_token_id": 9}, (5,), (9, 5)),
        ({}, {"eos_token_id": [9]}, (), (9,)),
        (None, {}, (5,), (5,)),
        ({"eos_token_id": 0}, {"eos_token_id": 9}, (), (0,)),
    ],
)
def test_stop_tokens_are_the_checkpoint_s_and_those_asked_for(
    generation: dict[str, Any] | None, config: dict[str, Any], asked: tuple[int, ...], stops: tuple[int, ...],
    tmp_path: Path,
) -> None:  # fmt: skip
    found = sampling_params(SamplingSettings(stop_token_ids=asked), checkpoint(tmp_path, generation, **config))
    assert found.stop_token_ids == stops


@pytest.mark.parametrize(("key", "value"), [("temperature", -1.0), ("top_p", 0.0), ("top_k", -5)])
def test_a_checkpoint_s_bad_value_is_a_config_error(key: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=rf"^sampling\.{key} must be .*got {value} \(from .*generation_config\.json\)$"
    ):
        sampling_params(FROM_CHECKPOINT, checkpoint(tmp_path, {key: value}))
