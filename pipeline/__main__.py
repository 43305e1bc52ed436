"""`python -m pipeline [overrides]`: compose, run, exit code. Cheap answers come before torch is imported."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from pipeline import __version__
from pipeline.command import guarded
from pipeline.console import Console
from pipeline.process import ExitCode, Stopping

# All else is imported where it is used: signals are heard from `guarded` on, and it may take long on a shared disk.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with the given command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(help_text())
        return ExitCode.DONE
    if "--version" in arguments:
        sys.stdout.write(f"{__version__}\n")
        return ExitCode.DONE
    return guarded(lambda console, stopping: launch(arguments, console, stopping))


def launch(arguments: Sequence[str], console: Console, stopping: Stopping) -> int:
    """Run as the launcher says: here, in several processes of this machine, on a Ray cluster, or by Slurm."""
    from pipeline.config import load_config
    from pipeline.launch.place import place_of
    from pipeline.run import run
    from pipeline.settings import LocalSettings, RaySettings

    settings = load_config(arguments, place_of(os.environ, time.time()))
    if isinstance(settings.launcher, LocalSettings):
        if settings.launcher.alone:
            return run(settings, console, stopping)
        from pipeline.launch.local import run_processes

        return run_processes(settings, arguments, console, stopping)
    if isinstance(settings.launcher, RaySettings):
        from pipeline.config import refuse_credentials
        from pipeline.launch.ray import run_on_ray

        refuse_credentials(arguments, "a worker's command line on every node")
        return run_on_ray(settings, arguments, console, stopping)
    from pipeline.submit import submit

    return submit(arguments, console)


def help_text() -> str:
    """Groups with their choices and keys with what they mean, from conf/ and the schema."""
    from pipeline import config

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
    lines += ["", "exit codes", "  0 done; 1 failed; 2 bad configuration, checkpoint or input;"]
    lines += ["  3 done, but more than max_error_rate of the rows are errors; 75 not done but saved: run it again", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
