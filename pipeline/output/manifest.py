"""RunManifest: what a run's results depend on, kept in run.json from its first start to its last resume."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.data.source import SourceFile
from pipeline.errors import ConfigError, OutputDiffers, RunFailed
from pipeline.output.claims import RUN_CLAIM
from pipeline.output.durable import failing_run
from pipeline.output.store import RUN_JSON

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.output.claims import Claims
    from pipeline.output.store import Store

FORMAT = 1
"""The version of run.json that this code writes and reads."""

HASH_KEY = "sha256"
"""The key of a hash of all others: a digit changed in chunk_rows, or in a file's rows, would make rows again or leave
some out."""
OTHER_VERSIONS = "other_versions"
"""The key of `informational` that lists the changes of libraries since the run began."""
HARDWARE = {
    "threads": ("{} compute threads", "set OMP_NUM_THREADS={}"),
    "cpu": ("{} instructions", "keep a run to one kind of processor"),
    "cuda": ("CUDA {}", "keep a run to one version of CUDA"),
    "gpu": ("{}", "keep a run to one kind of GPU"),
}
"""Keys of `informational`: what they say of where a run is computed, and what to do against a change."""
_SHOWN_DIFFERENCES = 5
_SHOWN_CHARACTERS = 80
_LEAD_CHARACTERS = 20  # shown before the first difference of two long values

Json = Any
"""A value that json.dumps takes: None, bool, int, float, str, or lists and string-keyed dicts of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunManifest:
    """One output folder's run.

    `fingerprint` holds, under flat dotted keys, everything that can change a row's output; only it
    guards resume. `informational` is for the reader ("versions.torch"). `files` are in the order of
    their registration, `chunk_rows`, `schema` (of the Parts) and `input_schema` are fixed with the first run,
    `engine` are the resolved shapes, `config` has its credentials redacted, `summary` is of the last
    process that ended.
    """

    run_id: str
    created: str
    pipeline_version: str
    fingerprint: Mapping[str, Json]
    informational: Mapping[str, Json]
    files: tuple[SourceFile, ...]
    chunk_rows: int
    schema: pa.Schema
    input_schema: pa.Schema
    engine: Mapping[str, Json]
    config: Mapping[str, Json]
    summary: Mapping[str, Json] | None = None
    format: int = FORMAT

    def to_json(self) -> str:
        """The text of run.json: sorted keys, so that two versions of it can be compared line by line."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["files"] = [asdict(file) for file in self.files]
        values["schema"] = _schema_to(self.schema)
        values["input_schema"] = _schema_to(self.input_schema)
        values[HASH_KEY] = _hash_of(values)
        return json.dumps(values, sort_keys=True, indent=2, ensure_ascii=False) + "\n"

    def part_metadata(self) -> dict[str, str]:
        """What the schema of every Part says of the run it belongs to."""
        text = json.dumps(dict(self.fingerprint), sort_keys=True)
        return {
            "pipeline.run_id": self.run_id,
            "pipeline.fingerprint": hashlib.sha256(text.encode()).hexdigest(),
        }

    @classmethod
    def from_json(cls, text: str) -> RunManifest:
        """The manifest in a text by `to_json`; ValueError saying what is wrong with any other."""
        values = json.loads(text)
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else None
            raise ValueError(f"its format is {found}, this version reads {FORMAT}")
        if values.pop(HASH_KEY, None) not in (None, _hash_of(values)):
            raise ValueError(f"it is not what was written, by its {HASH_KEY}")
        try:
            values["files"] = tuple(_file_from(file) for file in values["files"])
            values["schema"] = _schema_from(values["schema"]["arrow_ipc_base64"])
            values["input_schema"] = _schema_from(values["input_schema"]["arrow_ipc_base64"])
            return cls(**values)
        except (KeyError, TypeError, pa.ArrowException, OSError) as error:
            raise ValueError(f"a field is missing or malformed: {error}") from error


def find(store: Store) -> RunManifest | None:
    """Read run.json if there is one; ConfigError when it is corrupt or of another format version."""
    try:
        present = store.exists(RUN_JSON)
    except OSError as error:
        raise _unreadable(store, error) from error
    return load(store) if present else None


def load(store: Store) -> RunManifest:
    """Read run.json; ConfigError when it is missing, corrupt or of another format version."""
    try:
        return read(store)
    except (OSError, ValueError) as error:
        raise _unreadable(store, error) from error


def read(store: Store) -> RunManifest:
    """The same for whoever tells the errors apart: OSError as the store raises it, ValueError for another content."""
    return RunManifest.from_json(store.read(RUN_JSON).decode("utf-8"))


def create_or_load(store: Store, manifest: RunManifest) -> tuple[RunManifest, bool]:
    """Make run.json with `manifest` unless there is one; the run.json that counts, and whether it is ours.

    Of several processes that start at once exactly one creates, the others load what it made.
    Raises ConfigError when output.dir cannot be made or its run.json not be read, RunFailed when
    writing fails.
    """
    store.make_folder("")
    stored = find(store)
    if stored is not None:
        return stored, False
    with failing_run(store.shown(RUN_JSON)):
        created = store.create(RUN_JSON, manifest.to_json().encode())
    return (manifest, True) if created else (load(store), False)


def update(store: Store, lock: Claims, change: Callable[[RunManifest], RunManifest]) -> RunManifest:
    """Replace run.json by `change` of what it holds, alone among all processes; returns the new one.

    Raises RunFailed when another process keeps run.json locked or writing fails, and what `load` and
    `change` raise; run.json then is as it was.
    """
    shown = store.shown(RUN_JSON)
    with locked(store, lock, RUN_JSON):
        changed = change(load(store))
        if not lock.confirm(RUN_CLAIM):
            raise RunFailed(f"{shown} was taken over while this process stood still; run the same command again")
        with failing_run(shown):
            store.replace(RUN_JSON, changed.to_json().encode())
    return changed


@contextmanager
def locked(store: Store, lock: Claims, name: str) -> Iterator[None]:
    """Alone among all processes with what is changed under the claim of run.json; RunFailed if that takes too long."""
    _lock(store.shown(name), lock)
    try:
        yield
    finally:
        lock.release(RUN_CLAIM)


def diff(then: Mapping[str, Json], now: Mapping[str, Json]) -> list[str]:
    """A line "key: then -> now" for every key whose JSON value differs, was added or was removed."""
    old, new = ({key: _text(value) for key, value in values.items()} for values in (then, now))
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    return [f"{key}: {' -> '.join(_shortened(old.get(key, '(absent)'), new.get(key, '(absent)')))}" for key in changed]


def check(then: Mapping[str, Json], now: Mapping[str, Json], output_dir: str, *, started: bool = True) -> None:
    """OutputDiffers unless the fingerprint of `output_dir` equals that of the run that is asked for.

    `started` tells whether any row is done, which decides on the remedy.
    """
    lines = diff(then, now)
    if not lines:
        return
    more = [f"and {len(lines) - _SHOWN_DIFFERENCES} more"] if len(lines) > _SHOWN_DIFFERENCES else []
    differences = "; ".join(lines[:_SHOWN_DIFFERENCES] + more)
    if not started:
        raise OutputDiffers(
            f"output.dir {output_dir} was begun with other settings: {differences}; no row is done yet: stop the "
            "processes that work on it, if any, and remove its run.json to begin again with these",
            differences,
        )
    raise OutputDiffers(
        f"output.dir {output_dir} holds results of another run: {differences}; "
        "use another output.dir or the settings it was made with, or output.on_change=new for a version beside it",
        differences,
    )


def with_versions(manifest: RunManifest, versions: Mapping[str, str]) -> RunManifest:
    """The manifest with a mark for every library whose version is not the one that the run began with."""
    marks = {*manifest.informational.get(OTHER_VERSIONS, ()), *other_versions(manifest, versions)}
    marked = {OTHER_VERSIONS: sorted(marks)} if marks else {}
    return replace(manifest, informational={**manifest.informational, **marked})


def other_versions(manifest: RunManifest, versions: Mapping[str, str]) -> list[str]:
    """The libraries that have other versions now than when the run began, as "torch 2.11 -> 2.12"."""
    known = {"versions.pipeline": manifest.pipeline_version, **manifest.informational}
    then = {key: known.get(key) for key in versions}
    changed = {key: now for key, now in sorted(versions.items()) if then[key] not in (None, now)}
    return [f"{key.removeprefix('versions.')} {then[key]} -> {now}" for key, now in changed.items()]


def other_hardware(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A sentence for each thing that a run is computed on now and was not when it began, by `informational`'s keys.

    It can change a result's last bits. It is no reason to refuse: machines that share a run may differ.
    """
    return [
        f"this run was begun with {what.format(then[key])} and goes on with {now[key]}; matrix products can round "
        f"otherwise, so {remedy.format(then[key])} where every last bit counts"
        for key, (what, remedy) in HARDWARE.items()
        if None not in (then.get(key), now.get(key)) and then[key] != now[key]
    ]


def _lock(shown: str, lock: Claims) -> None:
    deadline = time.monotonic() + lock.patience_s
    while not lock.try_claim(RUN_CLAIM):
        if time.monotonic() > deadline:
            raise RunFailed(
                f"{shown} was kept locked by another process for {lock.patience_s:.0f} s; run the same command again"
            )
        time.sleep(lock.retry_s)


def _unreadable(store: Store, error: Exception) -> ConfigError:
    return ConfigError(
        f"output.dir {store.shown()} has a run.json that cannot be read ({error}); restore it, or use another "
        "output.dir"
    )


def _hash_of(values: Mapping[str, Json]) -> str:
    """Of the values as JSON gives them back."""
    text = json.dumps(json.loads(json.dumps(dict(values))), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _file_from(values: dict[str, Json]) -> SourceFile:
    redo = tuple((row, attempt) for row, attempt in values.get("redo", ()))
    return SourceFile(**{**values, "ends": tuple(values.get("ends", ())), "redo": redo})


def _schema_to(schema: pa.Schema) -> Json:
    return {
        "fields": [f"{field.name}: {field.type}" for field in schema],
        "arrow_ipc_base64": base64.b64encode(schema.serialize().to_pybytes()).decode("ascii"),
    }


def _schema_from(text: str) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text, validate=True)))


def _text(value: Json) -> str:
    """A value in the one form that survives run.json, where tuples are lists."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _shortened(then: str, now: str) -> tuple[str, str]:
    """Both values, at most 80 characters each, cut so that their first difference is seen."""
    same = next(
        (index for index, (a, b) in enumerate(zip(then, now, strict=False)) if a != b), min(len(then), len(now))
    )
    start = max(0, same - _LEAD_CHARACTERS) if max(len(then), len(now)) > _SHOWN_CHARACTERS else 0
    return _excerpt(then, start), _excerpt(now, start)


def _excerpt(text: str, start: int) -> str:
    shown = "..." + text[start:] if start > len("...") else text
    return shown if len(shown) <= _SHOWN_CHARACTERS else shown[: _SHOWN_CHARACTERS - 3] + "..."
