"""One row being decoded: what it was asked, what it has answered, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pipeline.core import Completion, FinishReason, Request, TokenLogprob
from pipeline.engine.plan import EnginePlan
from pipeline.engine.sampler import SamplerRow, prompt_key

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens left out."""
NOT_FINITE = "the model's logits are not finite (nan or inf)"
WINDOW_MARGIN = 8
"""Tokens looked at beyond a stop text's bytes: a token may end in the middle of a character."""


def reach(request: Request, plan: EnginePlan) -> int:
    """The longest the row can become, in tokens."""
    return min(len(request.prompt_ids) + request.answer_tokens, plan.max_len)


@dataclass(slots=True)
class Seat:
    """A row in a slot; `choice` is which of its prompt's answers it is, `limit` the tokens it may have."""

    request: Request
    choice: int
    limit: int
    key: int
    decode: Decode | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reported: int = 0
    logprob: float = 0.0
    text_end: int | None = None
    finish: FinishReason | None = None

    @classmethod
    def of(cls, request: Request, choice: int, plan: EnginePlan, decode: Decode | None) -> Seat:
        """A seat for a fresh row; its answer ends where the longest row would."""
        limit = reach(request, plan) - len(request.prompt_ids)
        return cls(request, choice, limit, prompt_key(request.prompt_ids), decode)

    @property
    def sampler_row(self) -> SamplerRow:
        """What the sampler needs to know."""
        return SamplerRow(self.request.sampling, self.key, self.choice)

    def accept(self, token: int, logprob: float, finite: bool, top: Sequence[tuple[int, float]] = ()) -> None:
        """Take the next token, unless the row has ended; a stop token is not part of the answer."""
        if self.finish is not None:
            return
        if not finite:
            self.finish = FinishReason.ERROR
            return
        self.logprob += logprob
        if token in self.request.sampling.stop_token_ids:
            self.finish = FinishReason.STOP
            return
        self.token_ids.append(token)
        wanted = self.request.sampling.logprobs
        if wanted is not None:
            self.logprobs.append(TokenLogprob(token_id=token, logprob=logprob, top=tuple(top[:wanted])))
        if self.request.sampling.stop and self._find_stop():
            self.finish = FinishReason.STOP
        elif len(self.token_ids) >= self.limit:
            self.finish = FinishReason.LENGTH

    def completion(self) -> Completion:
        """The ended row's answer."""
        assert self.finish is not None
        failed = self.finish is FinishReason.ERROR
        return Completion(
            request_id=self.request.id,
            prompt_tokens=len(self.request.prompt_ids),
            finish_reason=self.finish,
            token_ids=() if failed else tuple(self.token_ids),
            text_end=None if failed else self.text_end,
            cumulative_logprob=None if failed else self.logprob,
            logprobs=() if failed else tuple(self.logprobs),
            error=NOT_FINITE if failed else None,
        )

    def _find_stop(self) -> bool:
        """Whether the last token has completed a stop text: looked for in the last tokens, placed in the whole text."""
        assert self.decode is not None, "an engine that takes stop texts has a decoder"
        stops = self.request.sampling.stop
        window = max(len(stop.encode()) for stop in stops) + WINDOW_MARGIN
        tail = self.decode(self.token_ids[-window:])
        if not any(stop in tail for stop in stops):
            return False
        text = self.decode(self.token_ids)
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            self.text_end = min(found)
        return bool(found)
