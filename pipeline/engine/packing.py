"""Requests side by side in one static prefill pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.core import Request
from pipeline.engine.attention import AttentionPass, CacheWrite, PackedPrefill, RowSpan, Tiling, TrieMask
from pipeline.engine.kv_cache import KVCache, Segment
from pipeline.engine.plan import EnginePlan
from pipeline.engine.prefix import Beginning, Splits
from pipeline.engine.seat import reach
from pipeline.engine.trie import PROMPT_END, build_trie
from pipeline.kernels.cache_attention import RowsKernel


class DecoderModel(Protocol):
    """What the engine needs of a model: a flat pass of tokens to hidden states, and those to logits."""

    def hidden(self, tokens_T: Tensor, positions_T: Tensor, attention: AttentionPass) -> Tensor:
        """What the output head takes, of every token of the pass: [T, hidden size]."""
        ...

    def head(self, hidden_LC: Tensor) -> Tensor:
        """Float32 logits [L, V] of L hidden states."""
        ...


@dataclass(frozen=True, slots=True)
class Layout:
    """A request in a pass.

    tokens     what is run: the prompt, then the beginning of a target or the nodes of a trie
    positions  where in the row each stands
    causal     how many of them, from the first, look at all before them
    wanted     indices of the tokens whose logits are needed, ascending
    asked      pairs of an index into `wanted` and a token whose log-probability is needed there
    """

    tokens: Sequence[int]
    positions: Sequence[int]
    causal: int
    wanted: range
    asked: Sequence[tuple[int, int]] = ()

    def behind(self, skipped: int) -> Layout:
        """The layout without the first tokens, none of whose logits are wanted."""
        assert skipped <= self.wanted.start
        wanted = range(self.wanted.start - skipped, self.wanted.stop - skipped)
        return Layout(self.tokens[skipped:], self.positions[skipped:], self.causal - skipped, wanted, self.asked)


def lay_out(request: Request) -> Layout:
    """The layout of a request; what a text's or a candidate's last token would predict is not needed."""
    prompt = request.prompt_ids
    length = len(prompt)
    if request.scores_text:
        text = prompt + request.target_ids
        first = 1 if request.score_prompt else length
        asked = list(enumerate(text[first:]))
        return Layout(text[:-1], range(len(text) - 1), len(text) - 1, range(first - 1, len(text) - 1), asked)
    if not request.candidates:
        return Layout(prompt, range(length), length, range(length - 1, length))
    trie = build_trie(request.candidates)
    positions = [*range(length), *(length - 1 + depth for depth in trie.depths)]
    wanted = range(length - 1, length + len(trie.tokens))
    asked = [
        (node - PROMPT_END, token)
        for path, candidate in zip(trie.paths, request.candidates, strict=True)
        for node, token in zip(path, candidate, strict=True)
    ]
    return Layout(prompt + trie.tokens, positions, length, wanted, asked)


def pass_tokens(request: Request) -> int:
    """Tokens the request adds to a prefill pass."""
    if request.scores_text:
        return len(request.prompt_ids) + len(request.target_ids) - 1
    return len(request.prompt_ids) + (len(build_trie(request.candidates).tokens) if request.candidates else 0)


Work = tuple[Request, int]
"""A request and which of its answers."""


def take_pass(waiting: deque[Work], plan: EnginePlan, most: int, splits: Splits) -> list[Work]:
    """Remove from the queue, in order, the work of the next pass: a request too large to share goes alone."""
    taken: list[Work] = []
    tokens = 0
    while waiting and len(taken) < most:
        request = waiting[0][0]
        tokens += pass_tokens(request) - splits.skipped(request)
        if taken and tokens > plan.prefill_tokens[0]:
            break
        taken.append(waiting.popleft())
    return taken


@dataclass(frozen=True, slots=True)
class PackedPass:
    """A prefill pass ready to run.

    `wanted` are the indices of the tokens whose logits are needed, row after row; `first_wanted` is where
    each request's begin in it, and `asked` pairs of an index into it and a token.
    """

    tokens_T: Tensor
    positions_T: Tensor
    attention: PackedPrefill
    wanted: Sequence[int]
    first_wanted: Sequence[int]
    asked: Sequence[tuple[int, int]]
    real_tokens: int

    def run(self, model: DecoderModel) -> Tensor:
        """What the output head takes, of every token: [T, hidden size]."""
        return model.hidden(self.tokens_T, self.positions_T, self.attention)

    def wanted_slices(self, plan: EnginePlan) -> Iterator[tuple[range, Tensor]]:
        """The indices [L] of the wanted tokens, in slices of listed size, each with the part of `wanted` it holds.

        A slice's padding is the pass's first token.
        """
        for begin in range(0, len(self.wanted), plan.logit_rows):
            held = range(begin, min(begin + plan.logit_rows, len(self.wanted)))
            padding = plan.rows("logits", plan.logit_rows, len(held)) - len(held)
            indices = [*self.wanted[held.start : held.stop], *[0] * padding]
            yield held, torch.tensor(indices, device=self.tokens_T.device)


@dataclass(frozen=True, slots=True)
class Entry:
    """What one row puts into a pass; `reach` is the row's longest length.

    `slot` is where its keys and values go, None for a row that ends with the pass.
    """

    layout: Layout
    reach: int
    slot: int | None = None
    trie: TrieMask | None = None
    earlier: tuple[Segment, ...] = ()
    kept_as: Segment | None = None


def entry_of(
    request: Request, plan: EnginePlan, device: torch.device, earlier: tuple[Segment, ...], slot: int | None = None
) -> Entry:
    """A request, but for the segments that its prompt begins with."""
    layout = lay_out(request)
    if earlier:
        layout = layout.behind(earlier[-1].end)
    return Entry(layout, reach(request, plan), slot, _mask(request, device), earlier)


def entry_of_beginning(beginning: Beginning) -> Entry:
    """A segment that prompts begin with: nothing is wanted of it but its keys and values."""
    segment = beginning.segment
    layout = Layout(beginning.tokens, range(segment.begin, segment.end), len(beginning.tokens), range(0))
    return Entry(layout, segment.end, None, None, beginning.earlier, segment)


def pack(
    entries: Sequence[Entry],
    plan: EnginePlan,
    device: torch.device,
    cache: KVCache | None = None,
    kernel: RowsKernel | None = None,
) -> PackedPass:
    """Lay the entries out in the smallest listed shape that holds them, their keys going to their slots of a cache.

    Their attention is the kernel's, or without one row by row.
    """
    tokens: list[int] = []
    positions: list[int] = []
    owners: list[int] = []
    wanted: list[int] = []
    asked: list[tuple[int, int]] = []
    reaches: list[int] = []
    firsts: list[int] = []
    spans: list[RowSpan] = []
    for entry in entries:
        layout = entry.layout
        begin = len(tokens)
        spans.append(RowSpan(begin, layout.causal, entry.trie, entry.earlier, entry.kept_as))
        firsts.append(len(wanted))
        asked.extend((len(wanted) + index, token) for index, token in layout.asked)
        wanted.extend(begin + index for index in layout.wanted)
        tokens.extend(layout.tokens)
        positions.extend(layout.positions)
        reaches.extend([entry.reach] * len(layout.tokens))
        if cache is not None:
            owners.extend([cache.scratch_slot if entry.slot is None else entry.slot] * len(layout.tokens))
    real = len(tokens)
    padding = plan.prefill_rows(real) - real
    positions_T = torch.tensor(positions + [0] * padding, device=device)
    write = None
    if cache is not None and any(entry.slot is not None for entry in entries):
        owners_T = torch.tensor(owners + [cache.scratch_slot] * padding, device=device)
        write = CacheWrite(cache, owners_T, positions_T)
    reach_T = torch.tensor(reaches + [0] * padding, device=device)
    return PackedPass(
        tokens_T=torch.tensor(tokens + [0] * padding, device=device),
        positions_T=positions_T,
        attention=PackedPrefill(
            tuple(spans), write, positions_T, reach_T, Tiling.of(spans, kernel, device) if kernel else None
        ),
        wanted=wanted,
        first_wanted=firsts,
        asked=asked,
        real_tokens=real,
    )


def _mask(request: Request, device: torch.device) -> TrieMask | None:
    trie = build_trie(request.candidates) if request.candidates else None
    if trie is None or not trie.tokens:
        return None
    return TrieMask(torch.tensor(trie.ancestors(), device=device), torch.tensor(trie.depths, device=device))
