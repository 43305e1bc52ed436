"""Requests side by side in one static prefill pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.core import Request
from pipeline.engine.attention import AttentionPass, CacheWrite, PackedPrefill, RowSpan, TrieMask
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.plan import EnginePlan
from pipeline.engine.seat import reach
from pipeline.engine.trie import PROMPT_END, CandidateTrie, build_trie


class DecoderModel(Protocol):
    """What the engine needs of a model: logits of some positions of a flat pass of tokens."""

    def logits(
        self, tokens_T: Tensor, positions_T: Tensor, attention: AttentionPass, wanted_L: Tensor | None
    ) -> Tensor:
        """Float32 logits [L, V] at the pass's indices `wanted_L` (all T if None)."""
        ...


def pass_tokens(request: Request) -> int:
    """Tokens the request adds to a prefill pass."""
    return len(request.prompt_ids) + (len(build_trie(request.candidates).tokens) if request.candidates else 0)


def logit_rows(request: Request) -> int:
    """Positions whose logits the request needs."""
    return 1 + (len(build_trie(request.candidates).tokens) if request.candidates else 0)


Work = tuple[Request, int]
"""A request and which of its answers."""


def take_pass(waiting: deque[Work], plan: EnginePlan, most: int) -> list[Work]:
    """Remove from the queue, in order, the work of the next pass: a request too large to share goes alone."""
    taken: list[Work] = []
    tokens = rows = 0
    while waiting and len(taken) < most:
        request = waiting[0][0]
        tokens += pass_tokens(request)
        rows += logit_rows(request)
        if taken and (tokens > plan.prefill_tokens[0] or rows > plan.logit_rows[0]):
            break
        taken.append(waiting.popleft())
    return taken


@dataclass(frozen=True, slots=True)
class PackedPass:
    """A prefill pass ready to run; `first_logits` is each request's first index into the logits."""

    tokens_T: Tensor
    positions_T: Tensor
    wanted_L: Tensor
    attention: PackedPrefill
    first_logits: tuple[int, ...]
    real_tokens: int

    def run(self, model: DecoderModel) -> Tensor:
        """Logits [L, V], padding behind those of the requests."""
        return model.logits(self.tokens_T, self.positions_T, self.attention, self.wanted_L)


def pack(
    requests: Sequence[Request],
    plan: EnginePlan,
    device: torch.device,
    cache: KVCache | None = None,
    slots: Sequence[int] = (),
) -> PackedPass:
    """Lay the requests out in the smallest listed shape that holds them, their keys going to `slots` of a cache."""
    tokens: list[int] = []
    positions: list[int] = []
    owners: list[int] = []
    wanted: list[int] = []
    reaches: list[int] = []
    firsts: list[int] = []
    spans: list[RowSpan] = []
    for row, request in enumerate(requests):
        trie = build_trie(request.candidates) if request.candidates else None
        length = len(request.prompt_ids)
        spans.append(RowSpan(len(tokens), length, _mask(trie, device)))
        firsts.append(len(wanted))
        tokens.extend(request.prompt_ids)
        positions.extend(range(length))
        wanted.append(len(tokens) - 1)
        if trie is not None:
            wanted.extend(range(len(tokens), len(tokens) + len(trie.tokens)))
            tokens.extend(trie.tokens)
            positions.extend(length - 1 + depth for depth in trie.depths)
        reaches.extend([reach(request, plan)] * (len(tokens) - len(reaches)))
        if cache is not None:
            owners.extend([slots[row]] * length)
    real = len(tokens)
    padding = _smallest(plan.prefill_tokens, real) - real
    wanted += [0] * (_smallest(plan.logit_rows, len(wanted)) - len(wanted))
    positions_T = torch.tensor(positions + [0] * padding, device=device)
    write = None
    if cache is not None:
        owners_T = torch.tensor(owners + [cache.scratch_slot] * padding, device=device)
        write = CacheWrite(cache, owners_T, positions_T)
    return PackedPass(
        tokens_T=torch.tensor(tokens + [0] * padding, device=device),
        positions_T=positions_T,
        wanted_L=torch.tensor(wanted, device=device),
        attention=PackedPrefill(tuple(spans), write, torch.tensor(reaches + [0] * padding, device=device)),
        first_logits=tuple(firsts),
        real_tokens=real,
    )


def candidate_logprobs(logprobs_LV: Tensor, first: int, request: Request) -> tuple[float, ...]:
    """Each candidate's summed log-probability; `first` is the request's first row of the logits."""
    paths = build_trie(request.candidates).paths
    rows = [first + node - PROMPT_END for path in paths for node in path]
    columns = [token for candidate in request.candidates for token in candidate]
    device = logprobs_LV.device
    steps = iter(logprobs_LV[torch.tensor(rows, device=device), torch.tensor(columns, device=device)].double().tolist())
    return tuple(sum(next(steps) for _ in candidate) for candidate in request.candidates)


def _mask(trie: CandidateTrie | None, device: torch.device) -> TrieMask | None:
    if trie is None or not trie.tokens:
        return None
    return TrieMask(torch.tensor(trie.ancestors(), device=device), torch.tensor(trie.depths, device=device))


def _smallest(shapes: Sequence[int], needed: int) -> int:
    return next(shape for shape in shapes if shape >= needed)
