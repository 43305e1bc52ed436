"""`launcher=slurm`: an array of tasks over one output and a job that looks at what they did, submitted by sbatch."""

from __future__ import annotations

import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.console import Console
from pipeline.data.files import is_url, local_path
from pipeline.errors import ConfigError, RunFailed
from pipeline.launch.shared_paths import refuse_unshared
from pipeline.redaction import redacted_url
from pipeline.settings import RunConfig, SlurmSettings

PACKAGE = Path(__file__).parents[1]


def jobs_folder() -> Path:
    """jobs/ inside an installed package, else beside it in a checkout."""
    return next(p for p in (PACKAGE / "jobs", PACKAGE.parent / "jobs") if p.is_dir())


def logs_folder(config: RunConfig, settings: SlurmSettings) -> Path:
    """Where the jobs write their logs: slurm/ in the output, or here where that is a URL."""
    if settings.logs is not None:
        return Path(settings.logs).expanduser().absolute()
    beside = Path() if is_url(config.output.dir) else local_path(config.output.dir)
    return beside.absolute() / "slurm"


def script_of(config: RunConfig, settings: SlurmSettings, job_arguments: Sequence[str]) -> str:
    """The shell script that submits the array and the job after it; it can be run by hand, too."""
    logs, jobs = logs_folder(config, settings), jobs_folder()
    gpus = settings.gpus if settings.gpus is not None else int(config.model.device != "cpu")
    every_gpu = ["launcher.gpus=all"] if gpus > 1 else []
    throttle = f"%{settings.at_once}" if settings.at_once else ""
    array = [
        *_sbatch(config, settings, settings.name, logs / "%x-%A_%a.log"),
        *(f"--{name}={value}" for name, value in _resources(settings, gpus).items() if value is not None),
        f"--array=0-{settings.tasks - 1}{throttle}",
        *settings.options,
        str(jobs / "label_array.sbatch"),
        *job_arguments,
        *every_gpu,
    ]
    finish = _sbatch(config, settings, f"{settings.name}-finish", logs / "%x-%A.log")
    after = shlex.join([str(jobs / "finish.sbatch"), *job_arguments])
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"# {settings.tasks} tasks that share {config.output.dir}, then a look at what they did.",
            "set -euo pipefail",
            f"cd {shlex.quote(str(Path.cwd()))}",
            f"mkdir -p {shlex.quote(str(logs))}",
            f"export PIPELINE_PYTHON={shlex.quote(sys.executable)} REQUEUES={settings.requeues}",
            f"array=$({shlex.join(array)})",
            "array=${array%%;*}",
            f'finish=$({shlex.join(finish)} --dependency="afterany:$array" {after}) || {{ scancel "$array"; exit 1; }}',
            'echo "$array ${finish%%;*}"',
            "",
        ]
    )


def _sbatch(config: RunConfig, settings: SlurmSettings, name: str, log: Path) -> list[str]:
    """What the array and the job after it have in common."""
    payer = {"partition": settings.partition, "account": settings.account, "qos": settings.qos}
    known = {"job-name": name, "output": log, "comment": comment_of(config), **payer}
    return ["sbatch", "--parsable", *(f"--{option}={value}" for option, value in known.items() if value is not None)]


def _resources(settings: SlurmSettings, gpus: int) -> Mapping[str, str | int | None]:
    return {
        "time": settings.time,
        "gres": f"gpu:{gpus}" if gpus else "none",
        "cpus-per-task": settings.cpus,
        "mem": settings.mem,
    }


def check_paths(config: RunConfig, settings: SlurmSettings, model_folder: Path | None) -> None:
    """Raise ConfigError for a path that the compute nodes do not see; `model_folder` None: they fetch the model."""
    elsewhere = [] if settings.shared else nodes_elsewhere(settings)
    if not elsewhere:
        return
    refuse_unshared(config, model_folder, elsewhere, "the jobs run on")


def nodes_elsewhere(settings: SlurmSettings) -> list[str]:
    """The names of the nodes on which tasks can run and which are not this machine; none without Slurm."""
    if shutil.which("sinfo") is None:
        return []
    where = [] if settings.partition is None else [f"--partition={settings.partition}"]
    here = socket.gethostname().partition(".")[0]
    hosts = {line.strip().partition(".")[0] for line in _slurm("sinfo", "-h", "-N", "-o", "%n", *where).splitlines()}
    return sorted(hosts - {here})


def active_job(config: RunConfig, settings: SlurmSettings) -> str | None:
    """The id of a job of this name for the same output that has not ended."""
    lines = _slurm("squeue", "-h", "--me", f"--name={settings.name}", "-o", "%F %k").splitlines()
    found = [line.partition(" ") for line in lines]
    return next((job for job, _, comment in found if comment == comment_of(config)), None)


def comment_of(config: RunConfig) -> str:
    """What tells the jobs of one output from others."""
    place = config.output.dir
    return redacted_url(place) if is_url(place) else str(local_path(place).absolute())


def send(script: str, console: Console, config: RunConfig, settings: SlurmSettings) -> None:
    """Run the script; ConfigError where there is no sbatch, RunFailed when Slurm refuses."""
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "launcher=slurm, but there is no sbatch here; submit where Slurm is, or see the script with --dry-run"
        )
    array, finish = _slurm("bash", "-c", script).split()
    console.result(f"submitted  job {array} ({settings.tasks} tasks), and job {finish} after it")
    console.result(f"logs       {logs_folder(config, settings)}")


def _slurm(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603  # Slurm's programs, our script
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise RunFailed(f"Slurm does not take the job: {said}")
    return done.stdout
