"""`python witness.py LOG overrides...`: as `python -m pipeline overrides...`, and notes in LOG what it does and when.

A line is `<seconds> <what> <rest>`: `done <chunk> <row>` for each answer of the engine, `commit`, `published` and
`committed` for a chunk, `journal` and `journaled` for a segment. A line is one write to the end of the file, so a
kill cuts none short. Files reach the disk as late as on a network disk, so that kills land between the steps of a
commit; nothing else is changed. Read by `test_run_killed.py`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

DISK_S = 0.02
"""How long fsync and link take at least."""


def slow(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same, later."""

    def late(*given: Any, **more: Any) -> Any:
        time.sleep(DISK_S)
        return call(*given, **more)

    return late


def main(log: str, arguments: list[str]) -> int:
    from pipeline.__main__ import main as pipeline
    from pipeline.outlet import Outlet
    from pipeline.output.journal import ChunkJournal
    from pipeline.output.sink import Sink

    os.fsync, os.link = slow(os.fsync), slow(os.link)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(*words: Any) -> None:
        os.write(descriptor, f"{time.monotonic()} {' '.join(map(str, words))}\n".encode())

    def around(owner: type, name: str, before: str, after: str, chunk: Callable[..., str]) -> None:
        method = getattr(owner, name)

        def noted(self: Any, *given: Any, **more: Any) -> Any:
            if before:
                note(before, chunk(self, *given))
            result = method(self, *given, **more)
            note(after, chunk(self, *given))
            return result

        setattr(owner, name, noted)

    add = Outlet.add

    def noted_add(self: Outlet, completions: Any) -> None:
        for completion in completions:
            note("done", *completion.request_id)
        add(self, completions)

    Outlet.add = noted_add  # type: ignore[method-assign]
    around(Outlet, "_write_part", "commit", "committed", lambda self, chunk: chunk.claimed.chunk.id)
    around(Sink, "commit", "", "published", lambda self, chunk, *_: chunk.id)
    around(ChunkJournal, "write", "journal", "journaled", lambda self, *_: self._chunk.id)
    note("start", os.getpid())
    return pipeline(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
