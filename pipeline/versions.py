"""`output.on_change=new`: versions of an output beside each other, and the one that a command line belongs to.

`output.dir` itself is version 1, `v0002/`, `v0003/`, ... below it are later ones, each an output of its own, whose
run.json says what it is for. `versions/v0002.json` says that there is a version 2. `latest.json`, and in a local folder
the link `latest`, name the newest version of which all rows are done.
"""

from __future__ import annotations

import errno
import json
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from pipeline.errors import OutputDiffers, Overtaken, RunFailed
from pipeline.job import Job
from pipeline.output import manifest as manifests
from pipeline.output.durable import failing_run
from pipeline.output.local import LocalStore
from pipeline.output.open import open_store
from pipeline.output.store import RESULTS, RUN_JSON, STATS, Store
from pipeline.settings import RunConfig

VERSIONS = "versions"
LATEST = "latest"
LATEST_JSON = "latest.json"
_TRIES = 100
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)

T = TypeVar("T")


def version_name(number: int) -> str:
    """The folder of a version after the first; names sort like numbers."""
    return f"v{number:04d}"


def with_job(config: RunConfig, body: Callable[[Job], T]) -> T:
    """What `body` makes of the job of the version that the configuration belongs to.

    Again with another version where it turns out that somebody else was first, or that device, dtype or kernel are
    not the version's.
    """
    resolved: Mapping[str, Any] | None = None
    for _ in range(_TRIES):
        job = open_job(config, resolved)
        try:
            return body(job)
        except Overtaken:
            continue
        except OutputDiffers:
            if config.output.on_change != "new":
                raise
            resolved = job.resolved
    raise RunFailed(f"output.dir {config.output.dir} changes all the time; stop the other runs, and run this one again")


def open_job(config: RunConfig, resolved: Mapping[str, Any] | None = None, *, looks_only: bool = False) -> Job:
    """The job of the newest version that has the configuration's settings and input, else of the next one.

    Nothing is written. Raises what Job raises. `resolved` are device, dtype and kernel, as far as they are known.
    """
    if config.output.on_change != "new":
        return Job(config, looks_only=looks_only)
    root = open_store(config.output.dir, config.output.storage_options)
    because = ""
    numbers = numbers_of(root)
    for number in reversed(numbers):
        job = _fitting(config, root, number, resolved, looks_only)
        if isinstance(job, Job) and job.manifest is None and number < numbers[-1]:
            job = "its run.json is gone"  # removed by hand: nothing is put in its place
        if isinstance(job, Job):
            return _told(job, root, because)
        where = root.shown() if number == 1 else root.shown(version_name(number))
        because = because or f"{where} was made otherwise ({job})"
    number = numbers[-1] + 1
    return _told(Job(config, _store(config, root, number), number, looks_only=looks_only), root, because)


def _told(job: Job, root: Store, because: str) -> Job:
    """The job, which says that there is its version before it makes its run.json."""
    if job.version > 1 and job.manifest is None:
        job.because = because
        job.announce = partial(_announce, root, job.version, because)
    return job


def _announce(root: Store, number: int, because: str) -> None:
    said = {"because": because, "begun": datetime.now(UTC).isoformat(timespec="seconds")}
    name = f"{VERSIONS}/{version_name(number)}.json"
    root.make_folder(VERSIONS)
    with failing_run(root.shown(name)):
        root.create(name, (json.dumps(said, indent=2) + "\n").encode())


def numbers_of(root: Store) -> list[int]:
    """The versions there are, the first one always."""
    with failing_run(root.shown(VERSIONS)):
        names = [name.removesuffix(".json") for name in root.names(VERSIONS)]
    found = [int(name[1:]) for name in names if name[:1] == "v" and name[1:].isdecimal()]
    return sorted({1, *found})


def _fitting(
    config: RunConfig, root: Store, number: int, resolved: Mapping[str, Any] | None, looks_only: bool
) -> Job | str:
    """The job of a version, or in what it differs; one without run.json is anybody's."""
    try:
        job = Job(config, _store(config, root, number), number, looks_only=looks_only)
        if resolved is not None:
            job.check_resolved(resolved)
        assert job.files is not None  # registers them, which finds those that have changed
    except OutputDiffers as differs:
        return differs.what
    return job


def _store(config: RunConfig, root: Store, number: int) -> Store:
    if number == 1:
        return root
    return open_store(f"{config.output.dir.rstrip('/')}/{version_name(number)}", config.output.storage_options)


def show_latest(job: Job) -> None:
    """With `output.on_change=new`, let latest.json and the link name this version if it is the newest that is done.

    Raises RunFailed when they cannot be written.
    """
    if job.config.output.on_change != "new" or job.manifest is None:
        return
    root = open_store(job.config.output.dir, job.config.output.storage_options)
    said = {"version": job.version, "folder": "" if job.version == 1 else version_name(job.version),
            "results": f"{job.output.shown(RESULTS)}", "run_id": job.manifest.run_id,
            "done": datetime.now(UTC).isoformat(timespec="seconds")}  # fmt: skip
    if not _is_newer(root, job):
        return
    with root.claims() as claims, manifests.locked(root, claims, LATEST_JSON):
        if _is_newer(root, job):
            with failing_run(root.shown(LATEST_JSON)):
                root.replace(LATEST_JSON, (json.dumps(said, indent=2) + "\n").encode())
                if isinstance(root, LocalStore):
                    _link(root, job.version)


def _is_newer(root: Store, job: Job) -> bool:
    """Whether latest.json names a version before the job's, or nothing, or one that was removed and made anew."""
    assert job.manifest is not None
    with failing_run(root.shown(LATEST_JSON)):
        if not root.exists(LATEST_JSON):
            return True
        try:
            said = json.loads(root.read(LATEST_JSON))
            number, run_id = int(said["version"]), said["run_id"]
        except (ValueError, KeyError, TypeError):
            return True  # whatever it says, it is not ours
    return number < job.version or (number == job.version and run_id != job.manifest.run_id)


def _link(root: LocalStore, number: int) -> None:
    """`latest` to the version's folder; the first version, which is its own parent, has one made of links."""
    folder = root.root / version_name(number)
    fresh = root.root / f".{LATEST}.{uuid.uuid4().hex}"
    try:
        if number == 1:
            folder.mkdir(exist_ok=True)
            for name in (RESULTS, STATS, RUN_JSON):
                (folder / name).unlink(missing_ok=True)
                (folder / name).symlink_to(f"../{name}")
        fresh.symlink_to(folder.name)
        fresh.replace(root.root / LATEST)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    finally:
        fresh.unlink(missing_ok=True)
