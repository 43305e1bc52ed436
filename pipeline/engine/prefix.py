"""Beginnings that prompts share: run once, kept, and attended to as segments of their own.

Where a prompt is cut depends on the prompt and the run's splits alone, and a cut prompt is computed in segments
whether or not anybody shares them; so a row's bits do not depend on the company it is in.

Shapes: K key/value heads, S tokens of a segment, D head dim.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

LEAST_SHARED = 16
"""A beginning of fewer tokens is not worth a segment."""

PrefixKey = bytes
"""Stands for the tokens of a prompt up to a cut."""


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

    def keys(self, prompt_ids: Sequence[int]) -> tuple[PrefixKey, ...]:
        """What stands for the prompt up to each of its cuts."""
        keys, digest, begin = [], hashlib.blake2b(digest_size=16), 0
        for end in self.ends(prompt_ids):
            digest.update(array("q", prompt_ids[begin:end]).tobytes())
            keys.append(digest.digest())
            begin = end
        return tuple(keys)


@dataclass(slots=True)
class Segment:
    """The keys and values of a prompt's tokens from one cut to the next, of every layer, [K, S, D] each.

    They are filled in layer by layer by the pass that runs the segment.
    """

    begin: int
    end: int
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def put(self, layer: int, k_KSD: Tensor, v_KSD: Tensor) -> None:
        """Take a copy of a layer's keys and values; layers come in order."""
        assert layer == len(self.keys)
        self.keys.append(k_KSD.clone())
        self.values.append(v_KSD.clone())


class PrefixStore:
    """Segments by the prompt's tokens up to their end; the longest unused ones go when there are too many."""

    def __init__(self, most_tokens: int) -> None:
        """`most_tokens` bounds the memory: what all segments hold together."""
        self._most_tokens = most_tokens
        self._segments: OrderedDict[PrefixKey, Segment] = OrderedDict()
        self._tokens = 0
        self._wanted: Counter[PrefixKey] = Counter()

    def want(self, keys: Iterable[PrefixKey]) -> None:
        """A prompt with these cuts is waiting."""
        self._wanted.update(keys)

    def unwant(self, keys: Iterable[PrefixKey]) -> None:
        """That prompt has been run, or is not wanted any more."""
        self._wanted.subtract(keys)
        for key in keys:
            if self._wanted[key] <= 0:
                del self._wanted[key]

    def shared(self, keys: Sequence[PrefixKey]) -> int:
        """How many of a prompt's cuts, from the first, are there already or are shared with another that waits."""
        return next((n for n, key in enumerate(keys) if key not in self._segments and self._wanted[key] < 2), len(keys))

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
