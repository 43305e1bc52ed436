"""A run before the device is taken: its input, its output folder, what is done and what is left. No torch here."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import pyarrow as pa

from pipeline import __version__, fingerprint
from pipeline.asked_columns import check_columns, check_output_apart, columns_named, run_labels
from pipeline.data.open import open_source
from pipeline.data.source import Chunk, Source, SourceFile, chunks_within, unfinished_chunk
from pipeline.errors import ConfigError, Interrupted, OutputDiffers, Overtaken, RunFailed
from pipeline.input_files import InputFiles
from pipeline.model_files import open_model_files
from pipeline.output import manifest as manifests
from pipeline.output.claims import Claims
from pipeline.output.journal import Journal
from pipeline.output.manifest import RunManifest
from pipeline.output.open import open_store
from pipeline.output.registration import continued, more_in, redo_of
from pipeline.output.renewal import attempts_of, renew
from pipeline.output.schema import results_schema
from pipeline.output.sink import Sink, committed_parts
from pipeline.output.store import RUN_JSON, Store
from pipeline.settings import RunConfig
from pipeline.template import RowTemplate


class Job:
    """Opens everything that can be looked at cheaply; raises ConfigError on whatever does not fit together."""

    def __init__(
        self, config: RunConfig, output: Store | None = None, version: int = 1, *, looks_only: bool = False
    ) -> None:
        """`output` is the one of `output.dir`, or of a version of it, if it is open already.

        Raises OutputDiffers where it was made with other settings or of other input. Who `looks_only` at what was
        registered is told of new files that a run would refuse (`input.refused`).
        """
        self.config = config
        self.version = version
        self.because = ""
        """Why there is this version."""
        self.has_worked = False
        """Whether this process has answered rows, and left its stats."""
        self._is_settled = False  # whether the files are those of run.json, whatever else there is
        self.announce: Callable[[], None] = lambda: None
        """Called before run.json is made."""
        self.resolved: Mapping[str, Any] | None = None
        self.output: Store = output or open_store(config.output.dir, config.output.storage_options)
        answered = bool(self.committed())  # looked at first: whoever commits has made run.json before
        stored = manifests.find(self.output)
        self.model_files = open_model_files(config.model)
        self.checkpoint, self.adapter = self.model_files.checkpoint, self.model_files.adapter
        self.tokenizer = self.model_files.tokenizer
        self.asked = fingerprint.requested(config, self.checkpoint, self.tokenizer, self.adapter)
        self.source: Source = open_source(config.data)
        if stored is not None:
            self._check_asked(stored)
            self.source.fix_schema(stored.input_schema)
        self.input = InputFiles(self.source, looks_only=looks_only)
        self.input.find(stored)
        self.input_schema: pa.Schema = self._input_schema()
        check_columns(config, self.input_schema)
        check_output_apart(config)
        if config.task.messages is None:
            RowTemplate(config.task.prompt, self.input_schema.names)
        self.schema: pa.Schema = results_schema(
            self.input_schema, config.output.columns, config.task.kind, {}, config.on_request, run_labels(config)
        )
        self.manifest: RunManifest | None = None
        self.failed: dict[str, str] = {}
        """Chunks whose Part has errors that are to be done again, and the attempt that wrote that Part: errors of
        half-written rows that have been continued, and all of them with `retry`."""
        if stored is not None:
            self._adopt(stored)
        elif answered:
            raise ConfigError(
                f"output.dir {self.output.shown()} has results but no run.json to say what they were made with; "
                "restore run.json, or use another output.dir"
            )

    @cached_property
    def files(self) -> tuple[SourceFile, ...]:
        """The registered files; before this process has begun, as it would register them."""
        if self._is_settled and self.manifest is not None:
            return self.input.as_registered(self.manifest, self.committed())
        return self._register(self.manifest or self.fresh_manifest({}, {}, {}))

    @cached_property
    def continued(self) -> frozenset[str]:
        """Chunks of a row that was half-written and is to be done again, now that it goes on."""
        return frozenset() if self.manifest is None else frozenset(continued(self.manifest.files, self.files))

    @cached_property
    def chunks(self) -> list[Chunk]:
        """All chunks of the run in row order, up to `data.limit` rows."""
        return chunks_within(self.files, self.config.data.chunk_rows, self.config.data.limit)

    @property
    def num_rows(self) -> int:
        """Rows of the whole run."""
        return sum(chunk.num_rows for chunk in self.chunks)

    def notes(self) -> list[str]:
        """What is worth knowing of the version, the libraries and the adapter, a sentence each."""
        notes = [f"version {self.version} in {self.output.shown()}: {self.because}"] if self.because else []
        others = [] if self.manifest is None else manifests.other_versions(self.manifest, fingerprint.versions())
        if others:
            notes.append(
                f"libraries have changed since the run began ({', '.join(others)}); rows can differ in their last bits "
                "from those that are done, and run.json says so"
            )
        return [*notes, *self.model_files.notes(self.config.model.path)]

    def committed(self) -> set[str]:
        """Ids of the chunks that have a Part."""
        return committed_parts(self.output)

    def pending(self) -> list[Chunk]:
        """Chunks without a Part, or with one whose errors are to be done again; those of this shard first."""
        committed = self.committed() - self.failed.keys() - self.continued
        first = len(self.chunks) * self.config.shard.index // self.config.shard.count
        ordered = self.chunks[first:] + self.chunks[:first]
        return [chunk for chunk in ordered if chunk.id not in committed]

    def is_answered(self) -> bool:
        """Whether every row has its answer; a dataset without rows, when it has its empty Part."""
        return self.manifest is not None and not self.pending() and bool(self.chunks or self.committed())

    def fresh_manifest(
        self, resolved: Mapping[str, Any], shapes: Mapping[str, Any], noted: Mapping[str, Any]
    ) -> RunManifest:
        """The manifest of a first run; `noted` is for its reader."""
        return RunManifest(
            run_id=uuid.uuid4().hex,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            pipeline_version=__version__,
            fingerprint={**self.asked, **resolved},
            informational={**fingerprint.versions(), **noted},
            files=(),
            chunk_rows=self.config.data.chunk_rows,
            schema=self.schema,
            input_schema=self.input_schema,
            engine=shapes,
            config=self.config.resolved,
        )

    def check_resolved(self, resolved: Mapping[str, Any]) -> None:
        """Refuse to resume on another device, dtype or kernel than the results were made with."""
        self.resolved = resolved
        if self.manifest is not None:
            manifests.check(
                self.manifest.fingerprint,
                {**self.asked, **resolved},
                self.output.shown(),
                started=bool(self.committed()),
            )

    def start(
        self, claims: Claims, resolved: Mapping[str, Any], shapes: Mapping[str, Any], noted: Mapping[str, Any]
    ) -> None:
        """Create run.json, or adopt the one that another process has just made, and register the files."""
        if self.manifest is None:
            self.announce()
            fresh = self.fresh_manifest(resolved, shapes, noted)
            fresh = replace(fresh, files=self._register(fresh))
            manifest, created = manifests.create_or_load(self.output, fresh)
        else:
            manifest, created = manifests.load(self.output), False
        if not created:
            if self.manifest is None and not manifest.input_schema.equals(self.input_schema):
                raise Overtaken
            self._adopt(manifest)
            self.check_resolved(resolved)
            if self.files != manifest.files or manifests.with_versions(manifest, fingerprint.versions()) != manifest:
                manifest = renew(self.output, claims, self._register, fingerprint.versions())
            if self.failed:  # whose Parts will change under the summary
                manifest = manifests.update(self.output, claims, lambda manifest: replace(manifest, summary=None))
        self.source.fix_schema(self.input_schema)
        self._is_settled = True
        self.take(manifest)

    def keep_to_registered(self) -> str | None:
        """Leave aside what nobody has registered yet; returns what that is, for a sentence."""
        if self.manifest is None:
            return None
        now, chunks, again = self.files, self.chunks, self.continued
        self._is_settled = True
        self.take(self.manifest)
        return more_in(now, self.files) if again or chunks != self.chunks else None

    def take(self, manifest: RunManifest) -> None:
        """Go by a run.json as it has just been read or written."""
        self.manifest = manifest
        for name in ("files", "chunks", "continued"):
            self.__dict__.pop(name, None)
        halves = redo_of(manifest.files)
        now = attempts_of(self.output, halves)
        self.failed |= {chunk_id: attempt for chunk_id, attempt in halves.items() if now.get(chunk_id) == attempt}

    def take_over(self) -> bool:
        """Take over what other processes have registered since this one did, so that all have the same to do.

        Returns whether there was any. Raises Interrupted where it cannot be read here, RunFailed where run.json is
        another one.
        """
        if not self._is_settled or self.manifest is None:
            return False
        manifest = self._check_still_ours()
        if manifest.files == self.manifest.files:
            return False
        try:
            self.input.find_registered(manifest, self.committed())
        except ConfigError as error:
            raise Interrupted(
                f"other processes have registered more input, which this one cannot take: {error}"
            ) from error
        self.take(manifest)
        return True

    def is_as_registered(self, chunk: Chunk) -> bool:
        """False for an unfinished row that another process has found continued since this one looked."""
        file = self._file_of(chunk)
        if unfinished_chunk(file) != chunk:
            return True
        now = {file.ordinal: file.size for file in self._check_still_ours().files}
        return now.get(file.ordinal) == file.size

    def sink(self, attempt: str) -> Sink:
        """The writer of this run's Parts, which name the run and its fingerprint in their schema's metadata."""
        asked = self.config.output
        return Sink(
            self.output,
            self.schema.with_metadata(self._identity()),
            attempt,
            asked.compression,
            asked.row_group_rows,
            self._check_still_ours,
        )

    def journal(self, attempt: str) -> Journal:
        """What keeps rows of this run's chunks until they are committed."""
        return Journal(self.output, self._identity(), attempt)

    def content_of(self, chunk: Chunk) -> str:
        """What changes with the content of a chunk's file."""
        return self._file_of(chunk).digest

    def _file_of(self, chunk: Chunk) -> SourceFile:
        return next(file for file in self.files if file.ordinal == chunk.file_ordinal)

    def _identity(self) -> dict[str, str]:
        """The run, and the settings that can change its rows."""
        assert self.manifest is not None
        return self.manifest.part_metadata()

    def _check_still_ours(self) -> RunManifest:
        """run.json as it is now; RunFailed when it has been removed or replaced while this process worked."""
        assert self.manifest is not None
        now = None
        with suppress(FileNotFoundError, ValueError):
            now = manifests.read(self.output)
        if now is None or now.run_id != self.manifest.run_id:
            raise RunFailed(
                f"{self.output.shown(RUN_JSON)} is not the one this process started with any more; nothing is written "
                "under other settings; run the same command again"
            )
        return now

    def _register(self, manifest: RunManifest) -> tuple[SourceFile, ...]:
        """The files of a run.json as they are now."""
        return self.input.register(manifest, self.committed())

    def _adopt(self, manifest: RunManifest) -> None:
        """Take over a run.json after making sure that it is of this run and fits the input."""
        self._check_asked(manifest)
        if not (manifest.schema.equals(self.schema) and manifest.input_schema.equals(self.input_schema)):
            raise OutputDiffers(
                f"output.dir {self.output.shown()} has results of another schema than the input would give now; "
                "restore the input's columns, or use another output.dir, or output.on_change=new",
                "the input has other columns",
            )
        self.take(manifest)

    def _check_asked(self, manifest: RunManifest) -> None:
        """Refuse a run.json that was made with other settings."""
        asked_then = {k: v for k, v in manifest.fingerprint.items() if not k.startswith("resolved.")}
        manifests.check(asked_then, self.asked, self.output.shown(), started=bool(self.committed()))

    def _input_schema(self) -> pa.Schema:
        """The source's; a dataset without rows or known columns has those that the run speaks of, as text."""
        schema = self.source.schema()
        if schema.names or self.input.has_rows():
            return schema
        return pa.schema([(name, pa.string()) for name in columns_named(self.config)])
