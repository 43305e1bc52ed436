"""The end of a process's Slurm job: what is still worth beginning before it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Walltime:
    """Counts rows taken and answered, and says by that pace whether more of them can be answered in time.

    `ends_at` is in seconds since 1970, None without an end; work should be saved `margin_s` before.
    """

    def __init__(
        self, ends_at: float | None = None, margin_s: float = 0.0, clock: Callable[[], float] = time.time
    ) -> None:
        """`clock` gives the time now, in seconds since 1970."""
        self._end = math.inf if ends_at is None else ends_at - margin_s
        self._clock = clock
        self._began: float | None = None
        self._busy_s = 0.0
        self._taken = self._answered = 0
        self.short = False
        """Whether rows were refused for want of time."""

    @property
    def over(self) -> bool:
        """Whether it is time to save."""
        return self._clock() >= self._end

    def take(self, rows: int) -> bool:
        """Count so many more rows as taken if they fit; before any pace is known, everything does."""
        if self._began is None:
            self._began = self._clock()
        if self.short or not self._fits(rows):
            self.short = True
            return False
        self._taken += rows
        return True

    def answer(self, rows: int) -> None:
        """So many of the rows taken are answered."""
        self._answered += rows

    def pause(self) -> None:
        """No rows are being answered; until the next are taken, time is not counted."""
        if self._began is not None:
            self._busy_s += self._clock() - self._began
            self._began = None

    def _fits(self, rows: int) -> bool:
        now = self._clock()
        if math.isinf(self._end) or self._began is None or not self._answered:
            return now < self._end
        waiting = self._taken - self._answered + rows
        return now + waiting * (self._busy_s + now - self._began) / self._answered <= self._end
