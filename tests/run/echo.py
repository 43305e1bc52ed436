"""Whole runs with an engine that echoes in the model's place: everything else is what a user runs.

The answer to a row is its own prompt, token for token, so that the column `token_ids` (with
`sampling.logprobs=true`) tells which tokens the model would have been given.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from harness import Ended, run_here

from pipeline.core import Completion, FinishReason, Request
from pipeline.engine.engine import EngineCounters, Output
from pipeline.engine.plan import EnginePlan


class EchoEngine:
    """Answers in the order of asking, a few requests a poll."""

    def __init__(self, plan: EnginePlan) -> None:
        self.plan = plan
        self.counters = EngineCounters()
        self._queue: deque[Request] = deque()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    unfinished = waiting
    eager_reason = None

    def submit(self, request: Request) -> None:
        self._queue.append(request)

    def poll(self) -> list[Output]:
        return [answer_of(self._queue.popleft()) for _ in range(min(500, len(self._queue)))]


def answer_of(request: Request) -> Output:
    """The request's own prompt."""
    completion = Completion(
        request_id=request.id,
        prompt_tokens=len(request.prompt_ids),
        finish_reason=FinishReason.LENGTH,
        token_ids=request.prompt_ids,
        cumulative_logprob=0.0,
    )
    return Output(request.id, 0, request.prompt_ids, completion)


def run_echo(patch: pytest.MonkeyPatch, *overrides: str) -> Ended:
    """`run_here` without weights; `token_ids` is always asked for."""

    def load_engine(job: Any, runtime: Any, *_: Any) -> EchoEngine:
        return EchoEngine(runtime.shapes)

    patch.setattr("pipeline.run.load_engine", load_engine)
    return run_here(*overrides, "sampling.logprobs=true")
