"""What a process is asked while it works, and what it ends with."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

Stopping = Callable[[], bool]
"""Whether a signal has asked the run to stop."""


class ExitCode(IntEnum):
    """What the process ends with; see docs/architecture.md."""

    DONE = 0
    FAILED = 1
    BAD_CONFIG = 2
    TOO_MANY_ERRORS = 3
    NOT_DONE = 75
