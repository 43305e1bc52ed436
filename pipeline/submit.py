"""`python -m pipeline.submit [overrides] --tasks N [--time T] ... [--dry-run]`: the same run, by Slurm.

`--key value` is short for `launcher.key=value`, with `launcher=slurm`; further options of sbatch are given together,
as in `--options "--exclude=n1 --nice=10"`. `--dry-run` prints the script that would be run.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields

from pipeline import config
from pipeline.command import guarded
from pipeline.config_schema import LauncherSlurmSchema
from pipeline.console import Console
from pipeline.errors import ConfigError
from pipeline.launch.slurm import active_job, check_paths, script_of, send
from pipeline.models.checkpoint import is_here
from pipeline.process import ExitCode
from pipeline.settings import RunConfig, SlurmSettings
from pipeline.versions import open_job


def main(arguments: Sequence[str] | None = None) -> int:
    """Submit with the given command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(help_text())
        return ExitCode.DONE
    return guarded(lambda console, _: submit(["launcher=slurm", *as_overrides(arguments)], console))


def help_text() -> str:
    """The options, which are the keys of launcher=slurm."""
    options = {f.name: f.metadata["doc"] for f in fields(LauncherSlurmSchema) if "doc" in f.metadata}
    lines = [__doc__ or "", *(f"  --{name.replace('_', '-'):<12} {text}" for name, text in options.items()), ""]
    return "\n".join(lines)


def as_overrides(arguments: Sequence[str]) -> list[str]:
    """Options as overrides of the launcher's keys; what does not begin with -- stays. Raises ConfigError."""
    overrides: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            overrides.append(argument)
        elif name == "dry-run":
            overrides.append("dry_run=true")
        elif equals or (value := next(rest, "")):
            overrides.append(f"launcher.{name.replace('-', '_')}={_quoted(name, value)}")
        else:
            raise ConfigError(f"{argument} has no value; options are written --time 4:00:00")
    return overrides


def _quoted(name: str, value: str) -> str:
    """A value as Hydra takes it: numbers as they are, several options as a list, all else as a text."""
    if name == "options":
        return f"[{','.join(map(_text, shlex.split(value)))}]"
    return value if value.isdecimal() else _text(value)


def _text(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def submit(overrides: Sequence[str], console: Console) -> ExitCode:
    """Submit an array of tasks and the job after it, or print the script with `dry_run`.

    Raises ConfigError for whatever would make the jobs fail, RunFailed when Slurm refuses.
    """
    settings = config.load_config(overrides)
    launcher = settings.launcher
    assert isinstance(launcher, SlurmSettings)
    job_overrides = [o for o in overrides if not _is_ours(o)]
    if isinstance(config.load_config(job_overrides).launcher, SlurmSettings):
        job_overrides.append("launcher=local")  # an experiment's choice of launcher is for this command alone
    config.refuse_credentials(job_overrides, "the job's command line")
    check(config.load_config(job_overrides), launcher)
    script = script_of(settings, launcher, job_overrides)
    if settings.dry_run:
        console.result(script.rstrip())
        return ExitCode.DONE
    busy = active_job(settings, launcher) if launcher.lock else None
    if busy is not None:
        console.note(f"{settings.output.dir}: job {busy} is at work on it already; nothing was submitted")
        return ExitCode.NOT_DONE
    send(script, console, settings, launcher)
    return ExitCode.DONE


def check(settings: RunConfig, launcher: SlurmSettings) -> None:
    """Raise ConfigError for what would make every task fail: configuration, input, checkpoint, paths."""
    model = settings.model
    asked = {"model.path": model.path, "model.tokenizer": model.tokenizer, "model.adapter": model.adapter}
    for key, path in asked.items():
        revision = model.revision if key == "model.path" else None
        if path is None or is_here(path, revision):
            continue
        if launcher.network:
            check_paths(settings, launcher, None)
            return
        raise ConfigError(
            f"{key}={path} is not here, and compute nodes often have no network; download it first "
            f"(`hf download {path}`), or set launcher.network=true if they have one"
        )
    check_paths(settings, launcher, open_job(settings).checkpoint.folder)


def _is_ours(override: str) -> bool:
    """Whether an override is for the submission, not for the tasks."""
    key = override.lstrip("+~").partition("=")[0]
    return key.partition(".")[0] in ("launcher", "dry_run")


if __name__ == "__main__":
    sys.exit(main())
