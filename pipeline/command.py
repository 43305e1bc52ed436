"""What every command shares: signals, cores, and errors turned into exit codes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType

from pipeline.console import Console
from pipeline.errors import ConfigError, Interrupted, RunFailed
from pipeline.process import ExitCode, Loading, Stopping

ON_AGAIN = "what is committed stays; run the same command again to go on"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """A first signal asks the command to stop; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received = False
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def __call__(self) -> bool:
        return self.received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(ExitCode.NOT_DONE)
        self.received = True


def share_cores() -> None:
    """Let idle compute threads sleep soon, before torch starts them: docs/performance.md has what it is worth.

    By default they spin for milliseconds at the end of every operation, and on cores that anybody else
    uses (a second process of the same run, the tokenizer) that costs many times more than waking up.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def guarded(
    body: Callable[[Console, Stopping], int], after_interrupt: str = ON_AGAIN, console: Console | None = None
) -> int:
    """Run a command's body; its errors become one sentence and an exit code."""
    console = console or Console()
    stopping = StopSignal()
    share_cores()
    try:
        return body(console, stopping)
    except ConfigError as error:
        console.note(f"error: {error}")
        return ExitCode.BAD_CONFIG
    except RunFailed as error:
        console.note(f"error: {error}")
        return ExitCode.FAILED
    except Interrupted as error:
        console.note(f"{error}; {after_interrupt}")
        return ExitCode.NOT_DONE


def until_loaded(console: Console, stopping: Stopping) -> Loading:
    """The time in which a command has nothing to save, and a signal ends it at once."""
    return Loading(stopping, lambda: console.note(f"stopped while loading; {ON_AGAIN}"))
