"""The journal: completions of chunks that are not committed yet, so that a kill costs seconds and not a chunk.

`journal/rows-<chunk id>.<attempt>.<number>.segment` holds some rows of one chunk (see `segment.py`), written once,
whole. Whoever claims the chunk reads all of its segments, and whoever commits it removes them. Rows are known by
their index in the chunk, so it does no harm if two segments, or two attempts, hold the same row.
"""

from __future__ import annotations

import hashlib
import json
import re
from itertools import count
from typing import TYPE_CHECKING

from pipeline.output.durable import failing_run
from pipeline.output.segment import decode, encode
from pipeline.output.store import JOURNAL, StoreError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from collections.abc import Set as AbstractSet

    from pipeline.core import Completion
    from pipeline.data.source import Chunk
    from pipeline.output.store import Store

MOST_SEGMENTS = 16
"""Segments that a chunk may have of one attempt and those before it; then they become one."""
_NAME = re.compile(r"rows-(\d{6,}-\d{12,})\..+\.segment")


class Journal:
    """What this process writes down of the chunks of one run."""

    def __init__(self, store: Store, run: Mapping[str, str], attempt: str) -> None:
        """`run` names the run and the fingerprint of its settings, `attempt` is unique to the process."""
        self._store = store
        self._run = dict(run)
        self._attempt = attempt
        self._numbers = count()

    def open(self, chunk: Chunk, content: str, base: str = "") -> ChunkJournal:
        """What is known of a chunk that has just been claimed. Raises RunFailed if the store cannot be asked.

        `content` changes with the chunk's file. `base` is the attempt of the Part whose errors are done again.
        """
        about = {**self._run, "chunk": chunk.id, "rows": chunk.num_rows, "content": content, "base": base}
        owner = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        return ChunkJournal(self._store, chunk, owner, self._attempt, self._numbers)


class ChunkJournal:
    """The journal of one chunk: rows that are already there, and those that come in."""

    def __init__(self, store: Store, chunk: Chunk, owner: str, attempt: str, numbers: Iterable[int]) -> None:
        """`numbers` gives one for each segment of the process."""
        self._store = store
        self._chunk = chunk
        self._owner = owner
        self._attempt = attempt
        self._numbers = iter(numbers)
        self._names: list[str] = []
        self._rows: dict[int, Completion] = {}
        self._read()
        self.found: Mapping[int, Completion] = dict(self._rows)
        """The rows of earlier attempts, by index in the chunk."""

    def write(self, completions: Mapping[int, Completion]) -> None:
        """Keep some rows safe. Raises RunFailed when that fails."""
        self._rows.update(completions)
        if len(self._names) < MOST_SEGMENTS:
            self._names.append(self._add(completions))
            return
        merged = self._add(self._rows)
        self.remove()
        self._names = [merged]

    def remove(self) -> None:
        """Forget the segments that were read or written here: their rows are somewhere else. Raises RunFailed."""
        for name in self._names:
            with failing_run(self._store.shown(name)):
                self._store.remove(name)
        self._names = []

    def _add(self, completions: Mapping[int, Completion]) -> str:
        name = f"{JOURNAL}/rows-{self._chunk.id}.{self._attempt}.{next(self._numbers):06d}.segment"
        with failing_run(self._store.shown(name)):
            self._store.replace(name, encode(self._owner, completions))
        return name

    def _read(self) -> None:
        """All whole segments of this chunk of this run; others are removed with them, but not used."""
        with failing_run(self._store.shown(JOURNAL)):
            names = self._store.names(JOURNAL)
            self._names = [f"{JOURNAL}/{name}" for name in sorted(names) if _chunk_id(name) == self._chunk.id]
            for name in self._names:
                self._rows.update(self._rows_of(name))

    def _rows_of(self, name: str) -> Mapping[int, Completion]:
        """A segment's rows; none of one that is damaged, or that another attempt has just removed."""
        try:
            data = self._store.read(name)
        except StoreError:
            raise
        except OSError:  # gone, or a bad sector
            return {}
        return decode(self._owner, self._chunk.id, data) or {}


def sweep(store: Store, committed: AbstractSet[str]) -> None:
    """Remove the segments of chunks that have their Part, which a killed process had no time to remove; OSError."""
    for name in store.names(JOURNAL):
        if _chunk_id(name) in committed:
            store.remove(f"{JOURNAL}/{name}")


def _chunk_id(name: str) -> str | None:
    match = _NAME.fullmatch(name)
    return match and match[1]
