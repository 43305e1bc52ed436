"""Beginnings that prompts share: run once, kept, and attended to as segments of their own.

Where a prompt is cut depends on the prompt and the run's splits alone, and a cut prompt is run segment by segment
whether or not anybody shares them; so a row's bits do not depend on the company it is in.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.core import Request
from pipeline.engine.kv_cache import Segment
from pipeline.engine.plan import LEAST_SHARED

PrefixKey = bytes
"""Stands for the tokens of a prompt up to a cut."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The end of a segment, and what stands for all tokens up to there."""

    end: int
    key: PrefixKey


@dataclass(frozen=True, slots=True)
class Beginning:
    """A segment to run: its tokens, the segments before it, and what its keys and values are to fill."""

    tokens: tuple[int, ...]
    earlier: tuple[Segment, ...]
    segment: Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """Where prompts are cut: behind `head`, the token ids that the run's template begins every prompt with, and from
    there every `grid` tokens (0: nowhere)."""

    head: tuple[int, ...] = ()
    grid: int = 0

    def ends(self, prompt_ids: Sequence[int]) -> tuple[int, ...]:
        """The ends of a prompt's segments but for the last, ascending; none where it is not cut."""
        length, first = len(prompt_ids), len(self.head)
        if first < LEAST_SHARED or first >= length or tuple(prompt_ids[:first]) != self.head:
            first = 0
        grid = range(first + self.grid, length, self.grid) if self.grid else ()
        return ((first,) if first else ()) + tuple(grid)

    def cuts(self, prompt_ids: Sequence[int]) -> tuple[Cut, ...]:
        """The prompt's cuts."""
        cuts, digest, begin = [], hashlib.blake2b(digest_size=16), 0
        for end in self.ends(prompt_ids):
            digest.update(array("q", prompt_ids[begin:end]).tobytes())
            cuts.append(Cut(end, digest.digest()))
            begin = end
        return tuple(cuts)

    def skipped(self, request: Request) -> int:
        """How many of a request's tokens are in segments, and not run with the rest of its prompt."""
        return next(reversed(self.ends(request.prompt_ids)), 0) if _is_cut(request) else 0


def _is_cut(request: Request) -> bool:
    """A prompt whose own tokens are scored is run in one piece, since their logits are needed."""
    return not request.score_prompt


class PrefixStore:
    """Segments by the prompt's tokens up to their end; the longest unused ones go when there are too many."""

    def __init__(self, most_tokens: int) -> None:
        """`most_tokens` bounds the memory: what all segments hold together."""
        self._most_tokens = most_tokens
        self._segments: OrderedDict[PrefixKey, Segment] = OrderedDict()
        self._tokens = 0

    def get(self, key: PrefixKey) -> Segment | None:
        """The segment that ends there, if it is kept."""
        if key in self._segments:
            self._segments.move_to_end(key)
        return self._segments.get(key)

    def add(self, key: PrefixKey, segment: Segment) -> None:
        """Keep a segment, and let go of the longest unused ones beyond the limit."""
        assert key not in self._segments, "a segment that is there is not run again"
        self._segments[key] = segment
        self._tokens += segment.end - segment.begin
        while self._tokens > self._most_tokens and len(self._segments) > 1:
            _, oldest = self._segments.popitem(last=False)
            self._tokens -= oldest.end - oldest.begin


class PrefixRunner:
    """Finds the segments that prompts begin with, and has those run that are missing."""

    def __init__(self, splits: Splits, store: PrefixStore, run: Callable[[list[Beginning]], None]) -> None:
        """`run` runs the segments of some beginnings, all in one pass, and fills them."""
        self.splits = splits
        self._store = store
        self._run = run

    def segments_of(self, requests: Sequence[Request], most_tokens: int) -> list[tuple[Segment, ...]]:
        """The segments of each request's prompt but for the last one; at most `most_tokens` are run in a pass."""
        cuts = [self.splits.cuts(r.prompt_ids) if _is_cut(r) else () for r in requests]
        found: list[tuple[Segment, ...]] = [() for _ in requests]
        for level in range(max(map(len, cuts), default=0)):
            missing: dict[PrefixKey, Beginning] = {}
            here: dict[PrefixKey, Segment] = {}
            for request, row_cuts, earlier in zip(requests, cuts, found, strict=True):
                if len(row_cuts) > level and row_cuts[level].key not in here:
                    cut = row_cuts[level]
                    begin = earlier[-1].end if earlier else 0
                    kept = self._store.get(cut.key)
                    here[cut.key] = kept or Segment(begin, cut.end)
                    if kept is None:
                        missing[cut.key] = Beginning(request.prompt_ids[begin : cut.end], earlier, here[cut.key])
            for group in _in_passes(list(missing.values()), most_tokens):
                self._run(group)
            for key, beginning in missing.items():
                self._store.add(key, beginning.segment)
            found = [
                (*earlier, here[row_cuts[level].key]) if len(row_cuts) > level else earlier
                for row_cuts, earlier in zip(cuts, found, strict=True)
            ]
        return found


def _in_passes(beginnings: Sequence[Beginning], most_tokens: int) -> Iterator[list[Beginning]]:
    """As many in a pass as fit; one that is longer goes alone."""
    group: list[Beginning] = []
    for beginning in beginnings:
        if group and sum(len(b.tokens) for b in group) + len(beginning.tokens) > most_tokens:
            yield group
            group = []
        group.append(beginning)
    if group:
        yield group
