"""`python -m pipeline [overrides]`: compose, run, exit code. Cheap answers come before torch is imported."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from pipeline import __version__, config
from pipeline.console import Console
from pipeline.errors import ConfigError, Interrupted, RunFailed
from pipeline.run import ExitCode, run

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """A first signal asks the run to stop; a second one ends the process at once."""

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with the given command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(help_text())
        return ExitCode.DONE
    if "--version" in arguments:
        sys.stdout.write(f"{__version__}\n")
        return ExitCode.DONE
    console = Console()
    stopping = StopSignal()
    share_cores()
    try:
        return run(config.load_config(arguments), console, stopping)
    except ConfigError as error:
        console.note(f"error: {error}")
        return ExitCode.BAD_CONFIG
    except RunFailed as error:
        console.note(f"error: {error}")
        return ExitCode.FAILED
    except Interrupted as error:
        console.note(f"{error}; what is committed stays; run the same command again to go on")
        return ExitCode.NOT_DONE


def help_text() -> str:
    """Groups with their choices and keys with what they mean, from conf/ and the schema."""
    lines = [
        "usage: python -m pipeline [group=choice ...] [key=value ...]",
        "",
        "Runs a quantized LLM over every row of a dataset, exactly once. Without arguments: experiment=demo.",
        "Example: python -m pipeline model=llama7b quant=bnb data.path=prompts.parquet output.dir=out",
        "",
        "groups",
    ]
    lines += [f"  {group:<12} {', '.join(config.choices(group))}" for group in config.group_names()]
    lines += ["", "keys"]
    lines += [f"  {key:<28} {text}" for key, text in config.schema_keys().items()]
    lines += ["", "exit codes", "  0 done; 1 failed; 2 bad configuration, checkpoint or input location;"]
    lines += ["  3 done, but more than max_error_rate of the rows are errors; 75 not done but saved: run it again", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
