"""What a process does that finds every chunk done or in other hands: it waits, or it ends."""

from __future__ import annotations

import time
from collections.abc import Callable

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0


class Patience:
    """How long to wait for the chunks of others: so many seconds from `begin` on."""

    def __init__(self, wait_s: float = 0.0) -> None:
        self._wait_s = wait_s
        self._until = 0.0

    def begin(self) -> None:
        """There is nothing left to take."""
        self._until = time.monotonic() + self._wait_s

    def lasts(self) -> bool:
        """Whether to go on waiting."""
        return time.monotonic() < self._until

    def end(self) -> None:
        """There is something to take again, or no reason to wait."""


def wait_for_chunks(
    patience: Patience, left: Callable[[], int], held: Callable[[], int], check: Callable[[], None]
) -> bool:
    """Wait for a chunk that somebody else gave up; False when all are done or the patience is over.

    `left` and `held` are how many chunks are not done, and how many of them living others hold; `check` is
    called while waiting and may raise to end it.
    """
    patience.begin()
    pause = FIRST_PAUSE_S
    try:
        while True:
            lasts = patience.lasts()  # asked first: whoever died before it was over has left something to take
            undone = left()
            if undone > held():
                return True
            if not undone or not lasts:
                return False
            check()
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE_S)
    finally:
        patience.end()
