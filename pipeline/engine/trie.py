"""The token trie of a scored request's candidates: shared beginnings are computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

PROMPT_END = -1
"""The parent of first tokens: the prompt's last token, whose logits predict them."""


@dataclass(frozen=True, slots=True)
class CandidateTrie:
    """Nodes are the distinct proper beginnings of the candidates: the tokens that have to be run.

    tokens    token id of each node, parents before children
    parents   index of each node's parent, or PROMPT_END
    depths    1 for a candidate's first token
    paths     for each candidate, for each of its tokens: the node whose logits predict it, or PROMPT_END
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    depths: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]

    def ancestors(self) -> list[list[bool]]:
        """[N, N]: True where a node may look at another: itself and its ancestors."""
        rows: list[list[bool]] = []
        for node, parent in enumerate(self.parents):
            row = list(rows[parent]) if parent != PROMPT_END else [False] * len(self.tokens)
            row[node] = True
            rows.append(row)
        return rows


@lru_cache(maxsize=4096)
def build_trie(candidates: tuple[tuple[int, ...], ...]) -> CandidateTrie:
    """Build the trie; the same candidates (labels of a run) are built once. Raises ValueError on an empty one."""
    index: dict[tuple[int, ...], int] = {(): PROMPT_END}
    tokens: list[int] = []
    for candidate in candidates:
        if not candidate:
            raise ValueError("a candidate needs at least one token")
        for end in range(1, len(candidate)):
            prefix = candidate[:end]
            if prefix not in index:
                index[prefix] = len(tokens)
                tokens.append(prefix[-1])
    return CandidateTrie(
        tokens=tuple(tokens),
        parents=tuple(index[p[:-1]] for p in index if p),
        depths=tuple(len(p) for p in index if p),
        paths=tuple(_path(index, c) for c in candidates),
    )


def _path(index: dict[tuple[int, ...], int], candidate: Sequence[int]) -> tuple[int, ...]:
    return tuple(index[tuple(candidate[:end])] for end in range(len(candidate)))
