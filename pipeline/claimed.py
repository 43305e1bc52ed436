"""A chunk that this process has claimed, and what of it is there already: in a journal, or in a Part with errors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pipeline.core import Completion
    from pipeline.data.source import Chunk
    from pipeline.output.journal import ChunkJournal
    from pipeline.output.part import CommittedPart


@dataclass(frozen=True)
class ClaimedChunk:
    """`is_mine` asks whether nobody has taken the claim over. `part` is the one whose error rows are done again; None
    where the chunk has none yet."""

    chunk: Chunk
    journal: ChunkJournal
    is_mine: Callable[[], bool]
    part: CommittedPart | None = None

    @cached_property
    def wanted(self) -> Sequence[int]:
        """The rows that have to be there before the chunk can be committed, by index."""
        return range(self.chunk.num_rows) if self.part is None else self.part.failed

    @property
    def found(self) -> Mapping[int, Completion]:
        """Those that an earlier process has answered."""
        return self.journal.found

    @cached_property
    def left(self) -> frozenset[int]:
        """Those that this process has to answer."""
        return frozenset(self.wanted) - self.found.keys()
