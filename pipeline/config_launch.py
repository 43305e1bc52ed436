"""The groups `shard` and `launcher`: which process this is, and how others are started, as frozen settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.config_checks import not_negative, positive
from pipeline.errors import ConfigError
from pipeline.launch.place import Place
from pipeline.settings import LocalSettings, RaySettings, ShardSettings, SlurmSettings


def shard_from(values: Mapping[str, Any], place: Place) -> ShardSettings:
    """The shard asked for, else the place that Slurm gave this process; ConfigError where there is no such shard."""
    index, count = values["index"], values["count"]
    if index is None:
        index = place.shard_index if count is None else place.shard_index % max(1, count)
    shard = ShardSettings(
        index=index, count=place.shard_count if count is None else count, wait_s=not_negative("shard.wait_s", values)
    )
    if not 0 <= shard.index < shard.count:
        raise ConfigError(
            f"shard.index must be from 0 to shard.count - 1, got shard.index={shard.index} shard.count={shard.count}"
        )
    return shard


def launcher_from(values: Mapping[str, Any]) -> LocalSettings | SlurmSettings | RaySettings:
    """The `launcher` group of the kind that is asked for."""
    if values["kind"] == "local":
        return _local(values)
    if values["kind"] == "ray":
        return _ray(values)
    for key in ("tasks", "at_once", "cpus"):
        positive(f"launcher.{key}", values[key])
    not_negative("launcher.requeues", values)
    gpus = values["gpus"]
    if gpus is not None and (type(gpus) is not int or gpus < 0):
        raise ConfigError(f"launcher.gpus must be a number of GPUs for each task, or null, got {gpus}")
    known = {key: value for key, value in values.items() if key not in ("kind", "options")}
    return SlurmSettings(**known, options=tuple(values["options"]))


def _local(values: Mapping[str, Any]) -> LocalSettings:
    processes, gpus = values["processes"], values["gpus"]
    positive("launcher.processes", processes)
    if gpus is not None and gpus != "all" and (type(gpus) is not int or gpus < 1):
        raise ConfigError(f"launcher.gpus must be all, a number above 0 or null, got {gpus}")
    if gpus is not None and processes is not None:
        raise ConfigError(
            f"launcher.gpus={gpus} starts a process for each GPU, and launcher.processes={processes} is set too; set "
            "one of them to null"
        )
    return LocalSettings(
        processes=processes, gpus=gpus, margin_s=not_negative("launcher.margin_s", values), lock=values["lock"]
    )


def _ray(values: Mapping[str, Any]) -> RaySettings:
    for key in ("processes", "cpus"):
        positive(f"launcher.{key}", values[key])
    if values["gpus"] is not None and (type(values["gpus"]) is not int or values["gpus"] not in (0, 1)):
        raise ConfigError(
            f"launcher.gpus must be 0, 1 or null, got {values['gpus']}; a process uses one GPU, and launcher.processes "
            "says how many there are"
        )
    address = values["address"]
    if address is not None and address not in ("auto", "local") and not re.fullmatch(r"[^/\s]+:\d+", address):
        raise ConfigError(
            f"launcher.address must be host:port, auto, local or null, got {address}; start this on a machine of the "
            "cluster, since ray:// addresses are for clients outside it"
        )
    not_negative("launcher.margin_s", values)
    known = {key: value for key, value in values.items() if key not in ("kind", "env")}
    return RaySettings(**known, env=tuple(values["env"]))
