"""Equal requests computed once: what asks for the same gets the same answer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Protocol

from pipeline.core import Completion, Request
from pipeline.engine.engine import EngineCounters, Output
from pipeline.engine.plan import EnginePlan

KEPT_TOKENS = 1 << 20
"""Answers kept for requests to come, in tokens of prompts and answers together: some tens of MiB."""


class RequestEngine(Protocol):
    """What answers requests: see `Engine`."""

    @property
    def plan(self) -> EnginePlan: ...

    @property
    def counters(self) -> EngineCounters: ...

    @property
    def unfinished(self) -> int: ...

    @property
    def waiting(self) -> int: ...

    @property
    def eager_reason(self) -> str | None: ...

    def submit(self, request: Request) -> None: ...

    def cancel(self, request_id: Hashable) -> None: ...

    def poll(self) -> list[Output]: ...


@dataclass(slots=True)
class _Leader:
    """A request under way, and those that wait for its answer."""

    key: Request
    followers: list[Hashable] = field(default_factory=list)
    cancelled: bool = False


class DedupEngine:
    """An engine in front of another that passes each request on once.

    A request is equal to another in everything but its id. That is safe because an answer depends on the
    request alone: sampled tokens too are drawn by seed, prompt and choice. Followers get the completion when
    their leader has it; the last answers are kept for equal requests that come later.
    """

    def __init__(self, engine: RequestEngine, kept_tokens: int = KEPT_TOKENS) -> None:
        self._engine = engine
        self._kept_tokens = kept_tokens
        self._kept: OrderedDict[Request, Completion] = OrderedDict()
        self._size = 0
        self._leaders: dict[Request, Hashable] = {}
        self._under_way: dict[Hashable, _Leader] = {}
        self._answered: list[Output] = []

    @property
    def plan(self) -> EnginePlan:
        """The engine's shapes."""
        return self._engine.plan

    @property
    def counters(self) -> EngineCounters:
        """The engine's work; that of requests which were not computed is missing."""
        return self._engine.counters

    @property
    def unfinished(self) -> int:
        """Answers asked for that are neither reported nor cancelled."""
        followers = sum(len(leader.followers) for leader in self._under_way.values())
        return self._engine.unfinished + followers + len(self._answered)

    @property
    def waiting(self) -> int:
        """Answers asked for that have not reached the device, and will have to."""
        return self._engine.waiting

    @property
    def eager_reason(self) -> str | None:
        """Why decode steps are not captured in graphs, or None."""
        return self._engine.eager_reason

    def submit(self, request: Request) -> None:
        """Queue a request, or have it wait for an equal one."""
        key = replace(request, id=None)
        if key in self._kept:
            self._kept.move_to_end(key)
            self._answered += _answer(request.id, self._kept[key])
        elif key in self._leaders:
            self._under_way[self._leaders[key]].followers.append(request.id)
        else:
            self._engine.submit(request)
            self._leaders[key] = request.id
            self._under_way[request.id] = _Leader(key)

    def poll(self) -> list[Output]:
        """News of the engine, and the completions of those that followed."""
        outputs, self._answered = self._answered, []
        if not self._engine.unfinished:
            return outputs
        for output in self._engine.poll():
            leader = self._under_way[output.request_id]
            if not leader.cancelled:
                outputs.append(output)
            if output.completion is not None:
                outputs += self._fan_out(leader, output.completion)
        return outputs

    def cancel(self, request_id: Hashable) -> None:
        """Forget a request; its leader goes on as long as anybody waits for the answer. Unknown ids are ignored."""
        self._answered = [output for output in self._answered if output.request_id != request_id]
        for leader_id, leader in list(self._under_way.items()):
            if request_id in leader.followers:
                leader.followers.remove(request_id)
            elif request_id == leader_id:
                leader.cancelled = True
            if leader.cancelled and not leader.followers:
                self._engine.cancel(leader_id)
                self._forget(leader)

    def _fan_out(self, leader: _Leader, completion: Completion) -> list[Output]:
        self._forget(leader)
        self._keep(leader.key, completion)
        return [output for follower in leader.followers for output in _answer(follower, completion)]

    def _forget(self, leader: _Leader) -> None:
        del self._under_way[self._leaders.pop(leader.key)]

    def _keep(self, key: Request, completion: Completion) -> None:
        """Remember an answer, and forget the longest unused ones beyond the limit."""
        self._kept[key] = completion
        self._size += _tokens(key, completion)
        while self._size > self._kept_tokens:
            self._size -= _tokens(*self._kept.popitem(last=False))


def _tokens(key: Request, completion: Completion) -> int:
    answers = completion.choices or (completion,)
    scored = sum(map(len, key.candidates)) + len(key.target_ids) + len(completion.logprobs)
    return 1 + len(key.prompt_ids) + scored + sum(len(answer.token_ids) for answer in answers)


def _answer(request_id: Hashable, completion: Completion) -> list[Output]:
    """The news of a request whose answer is known: all tokens of each choice, then the completion."""
    choices = tuple(replace(choice, request_id=request_id) for choice in completion.choices)
    own = replace(completion, request_id=request_id, choices=choices)
    tokens = [choice.token_ids for choice in choices or (own,)]
    last = len(tokens) - 1
    return [Output(request_id, n, ids, own if n == last else None) for n, ids in enumerate(tokens)]
