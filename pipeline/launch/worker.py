"""`python -m pipeline.launch.worker`: one of the processes that `local.py` starts. It speaks to its parent alone.

To the parent, on standard output, a JSON object a line: `note` (for the log), `rows` and `tokens` (answered since
the line before), `idle` (whether it has nothing to take). From the parent, on standard input: `busy <n>` (how many
processes beside it may still give chunks up) and `stop`. The end of standard input is the end of the parent.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TextIO, TypeVar

from pipeline import config
from pipeline.command import guarded
from pipeline.console import Console, RowProgress
from pipeline.launch.patience import Patience
from pipeline.launch.place import place_of
from pipeline.process import Stopping
from pipeline.run import work

TELL_EVERY_S = 0.2

T = TypeVar("T")


class Wire:
    """What a worker says; a parent that is gone hears nothing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def tell(self, **values: str | int | bool) -> None:
        """One line."""
        with self._lock, suppress(BrokenPipeError):
            self._stream.write(json.dumps(values) + "\n")
            self._stream.flush()


class Orders:
    """What the parent has said so far."""

    def __init__(self, stream: Iterable[str]) -> None:
        """Listens in a thread."""
        self.stop = False
        self.busy = 1
        self._stream = stream
        threading.Thread(target=self._listen, name="orders", daemon=True).start()

    def _listen(self) -> None:
        for line in self._stream:
            word, _, number = line.strip().partition(" ")
            if word == "busy":
                self.busy = int(number)
            else:
                break
        self.stop = True


class SiblingPatience(Patience):
    """Waits as long as a process beside this one is at work, and then as long as anybody would."""

    def __init__(self, wait_s: float, wire: Wire, orders: Orders) -> None:
        super().__init__(wait_s)
        self._wire = wire
        self._orders = orders

    def begin(self) -> None:
        """Tell the parent that there is nothing to take."""
        super().begin()
        self._wire.tell(idle=True)

    def lasts(self) -> bool:
        """Whether somebody is at work, or the time is not over."""
        return self._orders.busy > 0 or super().lasts()

    def end(self) -> None:
        """Tell the parent that the waiting is over."""
        self._wire.tell(idle=False)


class RelayConsole(Console):
    """Notes and progress go to the parent, which alone shows anything; results are its own to tell."""

    def __init__(self, wire: Wire) -> None:
        super().__init__(is_terminal=False)
        self._wire = wire

    def note(self, text: str) -> None:
        """One line for the parent's log."""
        self._wire.tell(note=text)

    def result(self, text: str) -> None:
        """Nothing: the parent looks at the whole."""

    def loading(self, items: Sequence[T], *, what: str = "", unit: str = "") -> Iterator[T]:
        """The items."""
        yield from items

    @contextmanager
    def rows(self, total: int, done: int) -> Iterator[RowProgress]:
        """Progress for the parent's bar."""
        progress = RelayProgress(self, self._wire, total, done)
        try:
            yield progress
        finally:
            progress.close()


class RelayProgress(RowProgress):
    """Tells the parent a few times a second."""

    def __init__(self, console: Console, wire: Wire, total: int, done: int) -> None:
        super().__init__(console, sys.stderr, total, done)
        self._wire = wire
        self._untold = [0, 0]
        self._told_at = 0.0

    def advance(self, rows: int, tokens: int) -> None:
        """So many more rows and tokens."""
        self._untold = [self._untold[0] + rows, self._untold[1] + tokens]
        if time.monotonic() - self._told_at >= TELL_EVERY_S:
            self._tell()

    def close(self) -> None:
        """Tell what was not told."""
        self._tell()

    def _tell(self) -> None:
        rows, tokens = self._untold
        self._untold, self._told_at = [0, 0], time.monotonic()
        if rows or tokens:
            self._wire.tell(rows=rows, tokens=tokens)


def main(arguments: Sequence[str]) -> int:
    """Work with the given command line; returns the exit code."""
    wire = Wire(os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8"))
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is for the log, not for the parent
    orders = Orders(sys.stdin)

    def run(console: Console, signalled: Stopping) -> int:
        settings = config.load_config(arguments, place_of(os.environ, time.time()))
        patience = SiblingPatience(settings.shard.wait_s, wire, orders)
        return work(settings, console, lambda: orders.stop or signalled(), patience)

    return guarded(run, console=RelayConsole(wire))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
