"""The log-probabilities that a packed pass was asked for, from logits that are never there all at once.

Shapes: T tokens of the pass, C hidden size, L wanted tokens of a slice, V vocab, P asked pairs, K likeliest tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pipeline.core import MOST_LOGPROBS, Completion, FinishReason, Request, TokenLogprob
from pipeline.engine.packing import DecoderModel, PackedPass
from pipeline.engine.plan import EnginePlan
from pipeline.engine.seat import NOT_FINITE

Top = Sequence[tuple[int, float]]
"""The likeliest tokens at a place, with their log-probabilities."""


@dataclass(frozen=True, slots=True)
class PassLogprobs:
    """What a pass came to, on the host.

    asked   the log-probability of each asked pair
    finite  of each wanted token, whether its logits are
    tops    of each wanted token, the likeliest tokens; empty if no request has asked
    """

    asked: Sequence[float]
    finite: Sequence[bool]
    tops: Sequence[Top]


@dataclass(frozen=True, slots=True)
class _Slice:
    """The same of a slice of the wanted tokens, on the device; `pairs_P` are the asked pairs that it holds."""

    pairs_P: Tensor
    logprobs_P: Tensor
    finite_L: Tensor
    top_tokens_LK: Tensor
    top_logprobs_LK: Tensor


def score_pass(model: DecoderModel, packed: PackedPass, plan: EnginePlan, top: int) -> PassLogprobs:
    """Run the pass, then the output head slice by slice; `top` likeliest tokens at each place. One read-back."""
    hidden_TC = packed.run(model)
    asked_P2 = torch.tensor(packed.asked, dtype=torch.int64)
    slices = [
        _score_slice(model.head(hidden_TC[indices_L]), held, asked_P2, top)
        for held, indices_L in packed.wanted_slices(plan)
    ]
    asked_P = torch.empty(len(packed.asked), dtype=torch.float64)
    asked_P[torch.cat([s.pairs_P for s in slices])] = torch.cat([s.logprobs_P for s in slices]).cpu()
    tokens = torch.cat([s.top_tokens_LK for s in slices]).tolist()
    logprobs = torch.cat([s.top_logprobs_LK for s in slices]).tolist()
    return PassLogprobs(
        asked=asked_P.tolist(),
        finite=torch.cat([s.finite_L for s in slices]).tolist(),
        tops=[list(zip(t, p, strict=True)) for t, p in zip(tokens, logprobs, strict=True)] if top else (),
    )


def _score_slice(logits_LV: Tensor, held: range, asked_P2: Tensor, top: int) -> _Slice:
    """What is asked of the wanted tokens `held`, the first rows of `logits_LV`, which are lost."""
    pairs_P = ((asked_P2[:, 0] >= held.start) & (asked_P2[:, 0] < held.stop)).nonzero()[:, 0]
    rows_P = (asked_P2[pairs_P, 0] - held.start).to(logits_LV.device)
    chosen_P = logits_LV[rows_P, asked_P2[pairs_P, 1].to(logits_LV.device)].double()
    # always as many: which of equals comes first must not depend on what the neighbours ask for
    most = min(MOST_LOGPROBS if top else 0, logits_LV.shape[1])
    top_LK, top_tokens_LK = torch.topk(logits_LV[: len(held)], most, dim=-1)
    lse_L = log_sum_exp_(logits_LV)
    return _Slice(
        pairs_P=pairs_P,
        logprobs_P=chosen_P - lse_L[rows_P],
        finite_L=torch.isfinite(lse_L[: len(held)]),
        top_tokens_LK=top_tokens_LK[:, :top],
        top_logprobs_LK=(top_LK.double() - lse_L[: len(held), None])[:, :top],
    )


def log_sum_exp_(logits_LV: Tensor) -> Tensor:
    """Float64 [L] of float32 logits, which are lost. In float32 the sum over a large V is off by 1e-5, to one side."""
    max_L1 = logits_LV.amax(dim=-1, keepdim=True)
    sum_L = logits_LV.sub_(max_L1).exp_().sum(dim=-1, dtype=torch.float64)
    return max_L1[:, 0].double() + sum_L.log()


def completions(requests: Sequence[Request], packed: PackedPass, found: PassLogprobs) -> list[Completion]:
    """The completion of each request of the pass; one with logits that are not finite is an error."""
    made = []
    asked = iter(found.asked)
    ends = [*packed.first_wanted[1:], len(packed.wanted)]
    for request, first, end in zip(requests, packed.first_wanted, ends, strict=True):
        count = sum(map(len, request.candidates)) or end - first
        logprobs = list(islice(asked, count))
        if not all(found.finite[first:end]):
            values: dict[str, Any] = {"finish_reason": FinishReason.ERROR, "error": NOT_FINITE}
        elif request.candidates:
            values = {"candidate_logprobs": _of_candidates(request, logprobs)}
        else:
            values = _of_text(request, logprobs, found.tops[first:end])
        common = {"prompt_tokens": len(request.prompt_ids), "finish_reason": FinishReason.STOP}
        made.append(Completion(request_id=request.id, **{**common, **values}))
    return made


def _of_candidates(request: Request, logprobs: Iterable[float]) -> tuple[float, ...]:
    steps = iter(logprobs)
    return tuple(math.fsum(islice(steps, len(candidate))) for candidate in request.candidates)


def _of_text(request: Request, logprobs: Sequence[float], tops: Sequence[Top]) -> dict[str, Any]:
    """The sums over prompt and target, and the single tokens of the target, or else the prompt, if asked for."""
    begin = len(logprobs) - len(request.target_ids)
    values: dict[str, Any] = {"target_tokens": len(request.target_ids)}
    if request.score_prompt:
        values["prompt_logprob"] = math.fsum(logprobs[:begin])
    if request.target_ids:
        values["cumulative_logprob"] = math.fsum(logprobs[begin:])
    wanted = request.sampling.logprobs
    if wanted is not None:
        tokens = request.target_ids or request.prompt_ids[1:]
        shown = tops[-len(tokens) :] or [()] * len(tokens)
        values["logprobs"] = tuple(
            TokenLogprob(token_id=token, logprob=logprob, top=tuple(top[:wanted]))
            for token, logprob, top in zip(tokens, logprobs[-len(tokens) :], shown, strict=True)
        )
    return values
