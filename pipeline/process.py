"""What a process is asked while it works, and what it ends with."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from enum import IntEnum

Stopping = Callable[[], bool]
"""Whether a signal has asked the run to stop."""
LOOK_EVERY_S = 0.1
"""How often somebody looks whether there is a signal who has nothing else to do."""


class ExitCode(IntEnum):
    """What the process ends with; see docs/architecture.md."""

    DONE = 0
    FAILED = 1
    BAD_CONFIG = 2
    TOO_MANY_ERRORS = 3
    NOT_DONE = 75


class Loading:
    """The time before a process has anything that could be saved: a signal ends it at once, whatever it is at.

    That may be an import, a download, or the rows of a long file being counted, none of which asks for signals. What
    it leaves is what a kill would leave. A context manager; `over` ends that time before its end.
    """

    def __init__(self, stopping: Stopping, leave: Callable[[], None]) -> None:
        """`leave` says what happens, in a thread of its own; then the process ends with NOT_DONE."""
        self._stopping = stopping
        self._leave = leave
        self._over = threading.Event()
        self._ending = threading.Lock()
        self._watch = threading.Thread(target=self._look, name="loading", daemon=True)

    def __enter__(self) -> Loading:
        self._watch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over()
        self._watch.join()

    def over(self) -> None:
        """From here on whoever works asks for signals."""
        with self._ending:
            self._over.set()

    def _look(self) -> None:
        while not self._over.wait(LOOK_EVERY_S):
            with self._ending:
                if self._stopping() and not self._over.is_set():
                    self._leave()
                    os._exit(ExitCode.NOT_DONE)
